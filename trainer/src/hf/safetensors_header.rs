//! Parses the header of a safetensors file without its tensors.
//!
//! Parsing is strict, so that a damaged or hostile file is an error and never an out-of-bounds read:
//! lengths must fit the file size, offsets must be ordered and without gaps, and shapes must agree
//! with byte counts.
//!
//! # Source
//! Format: `safetensors/README.md` of huggingface/safetensors, 0.8.

use std::collections::BTreeMap;

use serde_json::Value;

/// The largest accepted header in bytes, as in the reference reader.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Why a safetensors header is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The file is shorter than its header says.
    #[error("the file has {actual} bytes but needs {needed}: it is truncated")]
    Truncated {
        /// Bytes the file has.
        actual: u64,
        /// Bytes it needs.
        needed: u64,
    },
    /// The header claims to be longer than allowed.
    #[error(
        "the header claims {bytes} bytes, more than {MAX_HEADER_BYTES}: this is not a safetensors file"
    )]
    HeaderTooLong {
        /// The claimed length.
        bytes: u64,
    },
    /// The header is not JSON of the expected form.
    #[error("the header is damaged: {reason}")]
    Damaged {
        /// What is wrong.
        reason: String,
    },
    /// The byte range of a tensor contradicts its shape, its neighbors or the file size.
    #[error("tensor {name:?}: {reason}")]
    BadTensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// The type, shape and byte range of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// The element type, as the file names it (`BF16`).
    pub dtype: String,
    /// The size of each dimension.
    pub shape: Vec<usize>,
    /// Its first byte, counted from the start of the file.
    pub start: u64,
    /// The byte after its last.
    pub end: u64,
}

impl TensorEntry {
    /// Returns whether another tensor has the same type and shape.
    pub fn has_same_layout(&self, other: &Self) -> bool {
        self.dtype == other.dtype && self.shape == other.shape
    }
}

/// Reads the length of the header from the first eight bytes of a file of `file_size` bytes.
///
/// # Errors
/// [`Error::Truncated`] or [`Error::HeaderTooLong`].
pub fn header_length(first_bytes: &[u8], file_size: u64) -> Result<u64, Error> {
    let Some(bytes) = first_bytes.first_chunk::<8>() else {
        return Err(Error::Truncated { actual: file_size, needed: 8 });
    };
    let length = u64::from_le_bytes(*bytes);
    if length > MAX_HEADER_BYTES {
        return Err(Error::HeaderTooLong { bytes: length });
    }
    if 8 + length > file_size {
        return Err(Error::Truncated { actual: file_size, needed: 8 + length });
    }
    Ok(length)
}

/// Reads the JSON of a header (without its eight length bytes) of a file of `file_size` bytes.
///
/// # Errors
/// [`Error`] if the JSON is damaged or the byte range of a tensor is invalid.
pub fn parse(json: &[u8], file_size: u64) -> Result<BTreeMap<String, TensorEntry>, Error> {
    let damaged = |reason: String| Error::Damaged { reason };
    let value: Value = serde_json::from_slice(json).map_err(|error| damaged(error.to_string()))?;
    let Value::Object(table) = value else {
        return Err(damaged("it is not a JSON object".to_owned()));
    };
    let data_start = 8 + json.len() as u64;
    let mut tensors = BTreeMap::new();
    for (name, fields) in &table {
        if name != "__metadata__" {
            tensors.insert(name.clone(), entry(name, fields, data_start)?);
        }
    }
    let mut in_order: Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|(_, tensor)| (tensor.start, tensor.end));
    let mut expected_start = data_start;
    for (name, tensor) in in_order {
        if tensor.start != expected_start {
            let reason = format!(
                "its bytes start at {} instead of {expected_start}: tensors overlap or leave a gap",
                tensor.start
            );
            return Err(Error::BadTensor { name: name.clone(), reason });
        }
        expected_start = tensor.end;
    }
    if expected_start > file_size {
        return Err(Error::Truncated { actual: file_size, needed: expected_start });
    }
    Ok(tensors)
}

fn entry(name: &str, fields: &Value, data_start: u64) -> Result<TensorEntry, Error> {
    let bad = |reason: &str| Error::BadTensor { name: name.to_owned(), reason: reason.to_owned() };
    let dtype =
        fields.get("dtype").and_then(Value::as_str).ok_or_else(|| bad("it has no dtype"))?;
    let numbers = |key: &str| -> Option<Vec<u64>> {
        fields.get(key)?.as_array()?.iter().map(Value::as_u64).collect()
    };
    let shape = numbers("shape").ok_or_else(|| bad("it has no shape"))?;
    let Some(&[start, end]) = numbers("data_offsets").as_deref() else {
        return Err(bad("it has no data_offsets"));
    };
    let elements = shape
        .iter()
        .try_fold(1_u64, |product, &size| product.checked_mul(size))
        .ok_or_else(|| bad("its shape overflows"))?;
    if let Some(bytes) = element_bytes(dtype)
        && end.checked_sub(start) != elements.checked_mul(bytes)
    {
        return Err(bad("its data_offsets do not agree with its shape"));
    }
    let from_start = |offset: u64| {
        data_start.checked_add(offset).ok_or_else(|| bad("its data_offsets overflow"))
    };
    Ok(TensorEntry {
        dtype: dtype.to_owned(),
        shape: shape.into_iter().map(|size| size as usize).collect(),
        start: from_start(start)?,
        end: from_start(end)?,
    })
}

/// Returns the size of an element in bytes; `None` for types that are unknown or smaller than a byte.
fn element_bytes(dtype: &str) -> Option<u64> {
    match dtype {
        "F64" | "I64" | "U64" => Some(8),
        "F32" | "I32" | "U32" => Some(4),
        "F16" | "BF16" | "I16" | "U16" => Some(2),
        "I8" | "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => Some(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, data_bytes: u64) -> String {
        match parse(json.as_bytes(), 8 + json.len() as u64 + data_bytes) {
            Ok(tensors) => format!("{} tensors", tensors.len()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn accepts_tensors_in_any_order_without_gaps() {
        let json = r#"{"__metadata__": {"format": "pt"}, "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
            "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}"#;
        assert_eq!(check(json, 12), "2 tensors");
    }

    #[test]
    fn refuses_hostile_headers() {
        let tensor = |fields: &str| format!(r#"{{"w": {{{fields}}}}}"#);
        let cases = [
            (tensor(r#""dtype": "F32", "shape": [2], "data_offsets": [0, 8]"#), 4),
            (tensor(r#""dtype": "F32", "shape": [2], "data_offsets": [4, 12]"#), 12),
            (tensor(r#""dtype": "F32", "shape": [3], "data_offsets": [0, 8]"#), 8),
            (
                tensor(
                    r#""dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], "data_offsets": [0, 8]"#,
                ),
                8,
            ),
            (tensor(r#""dtype": "F32", "shape": [-1], "data_offsets": [0, 8]"#), 8),
            (tensor(r#""dtype": "F32", "shape": [2], "data_offsets": [8, 0]"#), 8),
            ("[]".to_owned(), 0),
            ("{".to_owned(), 0),
        ];
        let messages: Vec<_> = cases.iter().map(|(json, bytes)| check(json, *bytes)).collect();
        insta::assert_snapshot!(messages.join("\n"), @r#"
        the file has 73 bytes but needs 77: it is truncated
        tensor "w": its bytes start at 74 instead of 70: tensors overlap or leave a gap
        tensor "w": its data_offsets do not agree with its shape
        tensor "w": its shape overflows
        tensor "w": it has no shape
        tensor "w": its data_offsets do not agree with its shape
        the header is damaged: it is not a JSON object
        the header is damaged: EOF while parsing an object at line 1 column 1
        "#);
        assert_eq!(header_length(&[255; 8], 100), Err(Error::HeaderTooLong { bytes: u64::MAX }));
        assert_eq!(header_length(&[1, 2], 2), Err(Error::Truncated { actual: 2, needed: 8 }));
    }
}
