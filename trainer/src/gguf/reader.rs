//! Reads the metadata and the tensor table of a GGUF file.
//!
//! Reading is strict: every length is checked against the file size before it is used.
//!
//! # Source
//! `docs/gguf.md` of ggml-org/ggml, versions 2 and 3, little endian.

use std::{collections::BTreeMap, fs::File, path::Path};

use memmap2::Mmap;

/// Why a GGUF file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("the file cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// The file does not start with the magic number.
    #[error("this is not a GGUF file (it starts with {0:?})")]
    NotGguf(Vec<u8>),
    /// The version is not supported.
    #[error("GGUF version {0} is not supported, only 2 and 3")]
    Version(u32),
    /// The file ends too early.
    #[error("the file is truncated: {what} needs {needed} bytes at {position}, but it has {size}")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// The number of bytes it needs.
        needed: u64,
        /// The position in the file.
        position: u64,
        /// The size of the file.
        size: u64,
    },
    /// The file contains an impossible value.
    #[error("the file is damaged: {0}")]
    Damaged(String),
}

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer.
    Integer(i64),
    /// Any float.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A string.
    Text(String),
    /// A list.
    List(Vec<Value>),
}

/// The shape, storage type and position of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The shape, outermost first.
    pub shape: Vec<usize>,
    /// The number of its storage type.
    pub ggml_type: u32,
    /// The position of the first byte in the file.
    pub start: usize,
}

/// An opened GGUF file.
#[derive(Debug)]
pub struct Gguf {
    map: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error`] if it is not a GGUF file or is damaged.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path)?;
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others may change it")]
        // SAFETY: the map is read-only, and a model file is not written while it is converted.
        let map = unsafe { Mmap::map(&file) }?;
        let (metadata, tensors) = parse(&map)?;
        Ok(Self { map, metadata, tensors })
    }

    /// Returns a value of the metadata.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Returns an integer of the metadata.
    pub fn integer(&self, key: &str) -> Option<i64> {
        match self.value(key)? {
            Value::Integer(number) => Some(*number),
            _ => None,
        }
    }

    /// Returns a number of the metadata.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.value(key)? {
            Value::Float(number) => Some(*number),
            Value::Integer(number) => Some(*number as f64),
            _ => None,
        }
    }

    /// Returns a string of the metadata.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.value(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns a list of the metadata.
    pub fn list(&self, key: &str) -> Option<&[Value]> {
        match self.value(key)? {
            Value::List(list) => Some(list),
            _ => None,
        }
    }

    /// Returns the tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Returns the first `length` bytes of a tensor.
    ///
    /// # Errors
    /// [`Error::Truncated`].
    pub fn bytes(&self, tensor: &TensorInfo, length: usize) -> Result<&[u8], Error> {
        let end = tensor.start.checked_add(length).filter(|&end| end <= self.map.len());
        end.map(|end| &self.map[tensor.start..end]).ok_or(Error::Truncated {
            what: "a tensor",
            needed: length as u64,
            position: tensor.start as u64,
            size: self.map.len() as u64,
        })
    }
}

type Parsed = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

fn parse(bytes: &[u8]) -> Result<Parsed, Error> {
    let mut reader = Parser { bytes, position: 0 };
    let magic = reader.take(4, "the magic number")?;
    if magic != b"GGUF" {
        return Err(Error::NotGguf(magic.to_vec()));
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(Error::Version(version));
    }
    let (tensor_count, value_count) = (reader.u64()?, reader.u64()?);
    let mut metadata = BTreeMap::new();
    for _ in 0..value_count {
        let key = reader.text()?;
        let kind = reader.u32()?;
        metadata.insert(key, reader.value(kind, 0)?);
    }
    let mut found = Vec::new();
    for _ in 0..tensor_count {
        let name = reader.text()?;
        let dimensions = reader.u32()?;
        if dimensions > 4 {
            return Err(Error::Damaged(format!("tensor {name:?} has {dimensions} dimensions")));
        }
        let mut shape = (0..dimensions)
            .map(|_| Ok(reader.u64()? as usize))
            .collect::<Result<Vec<_>, Error>>()?;
        shape.reverse();
        let ggml_type = reader.u32()?;
        found.push((name, shape, ggml_type, reader.u64()?));
    }
    let alignment = match metadata.get("general.alignment") {
        Some(Value::Integer(number)) if *number > 0 && *number <= 1 << 20 => *number as usize,
        None => 32,
        Some(other) => return Err(Error::Damaged(format!("general.alignment is {other:?}"))),
    };
    let data = reader.position.next_multiple_of(alignment);
    let tensors = found.into_iter().map(|(name, shape, ggml_type, offset)| {
        let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let start = start
            .ok_or_else(|| Error::Damaged(format!("the offset of tensor {name:?} overflows")))?;
        Ok((name, TensorInfo { shape, ggml_type, start }))
    });
    Ok((metadata, tensors.collect::<Result<_, Error>>()?))
}

struct Parser<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Parser<'a> {
    fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], Error> {
        let end = self.position.checked_add(length).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or(Error::Truncated {
            what,
            needed: length as u64,
            position: self.position as u64,
            size: self.bytes.len() as u64,
        })?;
        let taken = &self.bytes[self.position..end];
        self.position = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let bytes = self.take(N, "a number")?;
        Ok(*bytes.first_chunk().expect("as many bytes were taken"))
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String, Error> {
        let length = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let bytes = self.take(length, "a string")?;
        // A token may be a part of a character. The escapes of the vocabulary are valid UTF-8.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, Error> {
        Ok(match kind {
            0 => Value::Integer(i64::from(self.array::<1>()?[0])),
            1 => Value::Integer(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Integer(i64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Integer(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Integer(i64::from(self.u32()?)),
            5 => Value::Integer(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < 4 => {
                let (inner, length) = (self.u32()?, self.u64()?);
                let mut list = Vec::new();
                for _ in 0..length {
                    list.push(self.value(inner, depth + 1)?);
                }
                Value::List(list)
            }
            10 => Value::Integer(i64::try_from(self.u64()?).unwrap_or(i64::MAX)),
            11 => Value::Integer(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(Error::Damaged(format!("a value has the unknown type {other}"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8]) -> String {
        match parse(bytes) {
            Ok((metadata, tensors)) => format!("{metadata:?} {tensors:?}"),
            Err(error) => error.to_string(),
        }
    }

    fn file() -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(1_u64.to_le_bytes());
        bytes.extend(1_u64.to_le_bytes());
        let text = |bytes: &mut Vec<u8>, text: &str| {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        };
        text(&mut bytes, "n");
        bytes.extend(4_u32.to_le_bytes());
        bytes.extend(7_u32.to_le_bytes());
        text(&mut bytes, "w");
        bytes.extend(2_u32.to_le_bytes());
        bytes.extend(3_u64.to_le_bytes());
        bytes.extend(2_u64.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(0_u64.to_le_bytes());
        bytes
    }

    #[test]
    fn reads_metadata_and_shapes() {
        insta::assert_snapshot!(check(&file()), @r#"{"n": Integer(7)} {"w": TensorInfo { shape: [2, 3], ggml_type: 0, start: 96 }}"#);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = file();
        for length in 0..whole.len() {
            assert!(parse(&whole[..length]).is_err(), "{length} bytes");
        }
        insta::assert_snapshot!(check(b"PK\x03\x04"), @"this is not a GGUF file (it starts with [80, 75, 3, 4])");
        insta::assert_snapshot!(check(b"GGUF\x01\0\0\0"), @"GGUF version 1 is not supported, only 2 and 3");
        insta::assert_snapshot!(check(&whole[..40]), @"the file is truncated: a number needs 4 bytes at 37, but it has 40");
    }
}
