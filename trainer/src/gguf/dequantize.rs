//! Dequantizes the storage types of GGUF tensors to fp32.
//!
//! # Source
//! The block structures and `dequantize_row_*` of `ggml/src/ggml-quants.c`, ggml-org/llama.cpp. Each
//! is compared bit for bit with the PyPI package `gguf`: `golden/blocks.json`, made by `golden/gen.py`.

use half::{bf16, f16};

/// The block format of one storage type.
pub(super) struct StorageType {
    /// The usual name.
    pub name: &'static str,
    /// The number of elements in a block.
    pub elements: usize,
    /// The number of bytes in a block.
    pub bytes: usize,
    dequantize: fn(&[u8], &mut [f32]),
}

/// Returns the storage type with a number; `None` if it is not supported.
pub(super) fn storage_type(number: u32) -> Option<StorageType> {
    let plain =
        |name, elements, bytes, dequantize| StorageType { name, elements, bytes, dequantize };
    Some(match number {
        0 => plain("F32", 1, 4, |block, out| {
            out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        }),
        1 => plain("F16", 1, 2, |block, out| out[0] = f16_at(block, 0)),
        30 => plain("BF16", 1, 2, |block, out| {
            out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32();
        }),
        2 => plain("Q4_0", 32, 18, |block, out| {
            let scale = f16_at(block, 0);
            q4(&block[2..], out, |number| (number - 8.0) * scale);
        }),
        3 => plain("Q4_1", 32, 20, |block, out| {
            let (scale, minimum) = (f16_at(block, 0), f16_at(block, 2));
            q4(&block[4..], out, |number| number * scale + minimum);
        }),
        6 => plain("Q5_0", 32, 22, |block, out| {
            let scale = f16_at(block, 0);
            q5(&block[2..], out, |number| (number - 16.0) * scale);
        }),
        7 => plain("Q5_1", 32, 24, |block, out| {
            let (scale, minimum) = (f16_at(block, 0), f16_at(block, 2));
            q5(&block[4..], out, |number| number * scale + minimum);
        }),
        8 => plain("Q8_0", 32, 34, q8_0),
        12 => plain("Q4_K", 256, 144, q4_k),
        13 => plain("Q5_K", 256, 176, q5_k),
        14 => plain("Q6_K", 256, 210, q6_k),
        _ => return None,
    })
}

impl StorageType {
    /// Dequantizes whole blocks.
    pub(super) fn dequantize(&self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / self.bytes * self.elements];
        for (block, out) in
            bytes.chunks_exact(self.bytes).zip(values.chunks_exact_mut(self.elements))
        {
            (self.dequantize)(block, out);
        }
        values
    }
}

fn f16_at(block: &[u8], position: usize) -> f32 {
    f16::from_le_bytes([block[position], block[position + 1]]).to_f32()
}

/// Unpacks sixteen bytes of two elements each: the low nibbles are the first sixteen elements, the high
/// nibbles the last sixteen.
fn q4(nibbles: &[u8], out: &mut [f32], value: impl Fn(f32) -> f32) {
    for index in 0..16 {
        out[index] = value(f32::from(nibbles[index] & 15));
        out[index + 16] = value(f32::from(nibbles[index] >> 4));
    }
}

/// As [`q4`], with a fifth bit of each element in the four bytes before.
fn q5(block: &[u8], out: &mut [f32], value: impl Fn(f32) -> f32) {
    let high = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    for index in 0..16 {
        let (low, packed) = (high >> index & 1, block[4 + index]);
        out[index] = value(f32::from(packed & 15 | (low as u8) << 4));
        let top = high >> (index + 16) & 1;
        out[index + 16] = value(f32::from(packed >> 4 | (top as u8) << 4));
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 0);
    for (value, &byte) in out.iter_mut().zip(&block[2..]) {
        *value = f32::from(byte.cast_signed()) * scale;
    }
}

/// Returns scale and minimum of one of eight groups; each has six bits, all are in twelve bytes.
fn scale_and_minimum(scales: &[u8], index: usize) -> (f32, f32) {
    let (scale, minimum) = if index < 4 {
        (scales[index] & 63, scales[index + 4] & 63)
    } else {
        (
            scales[index + 4] & 15 | scales[index - 4] >> 6 << 4,
            scales[index + 4] >> 4 | scales[index] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(minimum))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    dequantize_k_groups(block, &block[16..], |_, _| 0, out);
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let high = &block[16..48];
    dequantize_k_groups(block, &block[48..], |group, index| (high[index] >> group & 1) << 4, out);
}

/// Dequantizes eight groups of 32 elements; two groups share 32 bytes of nibbles.
fn dequantize_k_groups(
    block: &[u8],
    nibbles: &[u8],
    fifth_bit: impl Fn(usize, usize) -> u8,
    out: &mut [f32],
) {
    let (scale, minimum) = (f16_at(block, 0), f16_at(block, 2));
    for group in 0..8 {
        let (group_scale, group_minimum) = scale_and_minimum(&block[4..16], group);
        for index in 0..32 {
            let packed = nibbles[group / 2 * 32 + index];
            let four = if group % 2 == 0 { packed & 15 } else { packed >> 4 };
            let value = f32::from(four | fifth_bit(group, index));
            out[group * 32 + index] = scale * group_scale * value - minimum * group_minimum;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let scale = f16_at(block, 208);
    for (index, value) in out.iter_mut().enumerate() {
        let (section, inside) = (index / 128, index % 128);
        let (quarter, lane) = (inside / 32, inside % 32);
        let byte = low[section * 64 + (quarter % 2) * 32 + lane];
        let four = if quarter < 2 { byte & 15 } else { byte >> 4 };
        let two = high[section * 32 + lane] >> (2 * quarter) & 3;
        let quantized = i16::from(four | two << 4) - 32;
        *value = scale * f32::from(scales[index / 16].cast_signed()) * f32::from(quantized);
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Blocks {
        types: Vec<Golden>,
    }

    #[derive(Deserialize)]
    struct Golden {
        number: u32,
        name: String,
        elements: usize,
        bytes: usize,
        data: String,
        bits: String,
    }

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len())
            .step_by(2)
            .map(|position| u8::from_str_radix(&hex[position..position + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn unpacks_every_storage_type_as_the_python_package_does() {
        let blocks: Blocks = serde_json::from_str(include_str!("golden/blocks.json")).unwrap();
        assert_eq!(blocks.types.len(), 11);
        for golden in blocks.types {
            let storage = storage_type(golden.number).unwrap();
            let facts = (storage.name, storage.elements, storage.bytes);
            assert_eq!(facts, (golden.name.as_str(), golden.elements, golden.bytes));
            let found = storage.dequantize(&bytes(&golden.data));
            let found: Vec<u8> = found.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(found, bytes(&golden.bits), "{}", golden.name);
        }
    }
}
