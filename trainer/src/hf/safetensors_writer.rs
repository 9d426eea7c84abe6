//! Writes safetensors files one tensor at a time, so that memory stays bounded.
//!
//! # Source
//! Format: `safetensors/README.md` of huggingface/safetensors, 0.8. transformers 4 requires
//! `__metadata__` to be `{"format": "pt"}`.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::hex;

/// The number of elements that are copied out of a tensor at once.
const CHUNK: i64 = 1 << 20;

/// The name, type and shape of a tensor that will be written.
#[derive(Debug, Clone)]
pub struct Declared {
    /// The name in the file.
    pub name: String,
    /// The element type in the file: `Float`, `Half` or `BFloat16`.
    pub kind: Kind,
    /// The size of each dimension.
    pub shape: Vec<i64>,
}

impl Declared {
    /// Returns the size of the tensor in the file, in bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * self.kind.elt_size_in_bytes() as u64
    }
}

/// Writes a file of declared tensors; `tensor` returns each in turn, in any element type.
///
/// Returns the size and SHA-256 of the file.
///
/// # Errors
/// An error of `tensor`, or of a file operation.
pub fn write<E: From<std::io::Error>>(
    path: &Path,
    declared: &[Declared],
    mut tensor: impl FnMut(&Declared) -> Result<Tensor, E>,
) -> Result<(u64, String), E> {
    let mut file = HashingWriter {
        file: BufWriter::with_capacity(1 << 20, File::create(path)?),
        hash: Sha256::new(),
        size: 0,
    };
    write_pieces::<E>(&mut file, declared, |declared, write| write(&tensor(declared)?))?;
    let HashingWriter { file, hash, size } = file;
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    Ok((size, hex(&hash.finalize())))
}

/// Writes the next elements of a tensor that is written in pieces.
pub type WritePiece<'a, E> = dyn FnMut(&Tensor) -> Result<(), E> + 'a;

/// Writes a file of declared tensors to `out`. `pieces` writes each tensor in one or more pieces,
/// which together must have all of its elements.
///
/// # Errors
/// As [`write()`].
pub fn write_pieces<E: From<std::io::Error>>(
    out: &mut impl Write,
    declared: &[Declared],
    mut pieces: impl FnMut(&Declared, &mut WritePiece<'_, E>) -> Result<(), E>,
) -> Result<(), E> {
    let header = header(declared);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut bytes = Vec::new();
    for declared in declared {
        pieces(declared, &mut |piece| {
            let flat = piece.contiguous().view(-1);
            for start in (0..flat.size()[0]).step_by(CHUNK as usize) {
                let length = CHUNK.min(flat.size()[0] - start);
                let chunk = flat.narrow(0, start, length).to_kind(declared.kind);
                bytes.resize(length as usize * declared.kind.elt_size_in_bytes(), 0);
                chunk.copy_data_u8(&mut bytes, length as usize);
                out.write_all(&bytes)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn header(declared: &[Declared]) -> String {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), serde_json::json!({"format": "pt"}));
    let mut end = 0;
    for tensor in declared {
        let start = end;
        end += tensor.bytes();
        let dtype = match tensor.kind {
            Kind::BFloat16 => "BF16",
            Kind::Half => "F16",
            _ => "F32",
        };
        let entry = serde_json::json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut text = serde_json::Value::Object(header).to_string();
    // Data starts at a multiple of eight, so that any element type can be mapped.
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    text
}

/// Hashes and counts the bytes that it passes on to a file.
struct HashingWriter {
    file: BufWriter<File>,
    hash: Sha256,
    size: u64,
}

impl Write for HashingWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{hf::weights::WeightFiles, store::hash_file};

    #[test]
    fn writes_what_the_strict_reader_accepts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.safetensors");
        let value = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
        let declared = [Kind::Float, Kind::BFloat16].map(|kind| Declared {
            name: format!("{kind:?}"),
            kind,
            shape: vec![2, 3],
        });
        let written =
            write::<std::io::Error>(&path, &declared, |_| Ok(value.tr().tr().shallow_clone()))
                .unwrap();
        assert_eq!(written, hash_file(&path).unwrap());
        let read = WeightFiles::open_file(&path).unwrap();
        for name in ["Float", "BFloat16"] {
            assert!(read.tensor_of(name, &[2, 3]).unwrap().to_kind(Kind::Float).equal(&value));
        }
    }
}
