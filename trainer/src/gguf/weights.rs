//! Writes the weights of a converted model: dequantized, in the order of Hugging Face, rounded to bf16, one
//! tensor at a time.

use std::{collections::BTreeSet, path::Path};

use finetune_contract::FailureReason;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    architecture::{GgufFamily, config::ModelConfig, modules::TensorSpec},
    failure::Failure,
    gguf::{
        dequantize::storage_type,
        reader::{Gguf, TensorInfo},
    },
    hf::{
        safetensors_writer::{self, Declared},
        weights::SINGLE_FILE,
    },
};

/// Why weights cannot be written.
enum Error {
    Invalid(String),
    Disk(std::io::Error),
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::Disk(error)
    }
}

/// Writes `model.safetensors` into `directory`.
///
/// # Errors
/// A [`Failure`] if a tensor is missing, has another shape, or has an unsupported storage type.
pub(super) fn write(gguf: &Gguf, config: &Value, directory: &Path) -> Result<(), Failure> {
    let invalid = |reason: String| Failure::new(FailureReason::InvalidModel, reason);
    let config =
        ModelConfig::parse(&config.to_string()).map_err(|error| invalid(error.to_string()))?;
    let specs = config.tensors();
    refuse_unused(gguf, &specs).map_err(invalid)?;
    let declared: Vec<Declared> = specs
        .iter()
        .map(|spec| Declared {
            name: spec.name.clone(),
            kind: Kind::BFloat16,
            shape: spec.shape.iter().map(|&size| size as i64).collect(),
        })
        .collect();
    let path = directory.join(SINGLE_FILE);
    let mut specs = specs.iter();
    let written = safetensors_writer::write(&path, &declared, |_| {
        let spec = specs.next().expect("each declared tensor is asked for once, in order");
        tensor(gguf, &config, spec).map_err(Error::Invalid)
    });
    match written {
        Ok(_) => Ok(()),
        Err(Error::Invalid(reason)) => Err(invalid(reason)),
        Err(Error::Disk(error)) => Err(Failure::from_io(&error, &format!("cannot write {path:?}"))),
    }
}

/// Refuses a file with weights that the model does not use, such as biases of another variant.
fn refuse_unused(gguf: &Gguf, specs: &[TensorSpec]) -> Result<(), String> {
    let used: BTreeSet<String> = specs.iter().map(|spec| gguf_name(&spec.name)).collect();
    let unused: Vec<&String> = gguf.tensors().keys().filter(|name| !used.contains(*name)).collect();
    match unused.as_slice() {
        [] => Ok(()),
        [first, ..] => Err(format!(
            "its architecture does not use {} of its tensors, such as {first:?}: use the model's original \
             Hugging Face files",
            unused.len()
        )),
    }
}

fn tensor(gguf: &Gguf, config: &ModelConfig, spec: &TensorSpec) -> Result<Tensor, String> {
    let name = gguf_name(&spec.name);
    let info =
        gguf.tensors().get(&name).ok_or_else(|| format!("the file has no tensor {name:?}"))?;
    if info.shape != spec.shape {
        return Err(format!(
            "tensor {name:?} has shape {:?}, but the metadata requires {:?}",
            info.shape, spec.shape
        ));
    }
    let value = dequantize(gguf, &name, info)?;
    let interleaves_heads = GgufFamily::of_architecture(&config.model_type)
        .is_some_and(|family| family.interleaves_heads);
    let heads = match spec.name.rsplit('.').nth(1) {
        Some("q_proj") if interleaves_heads => config.num_attention_heads,
        Some("k_proj") if interleaves_heads => config.num_key_value_heads,
        _ => return Ok(value),
    };
    Ok(interleaved_to_halves(&value, heads as i64))
}

fn dequantize(gguf: &Gguf, name: &str, info: &TensorInfo) -> Result<Tensor, String> {
    let storage = storage_type(info.ggml_type).ok_or_else(|| {
        format!("tensor {name:?} has the storage type {}, which is not supported", info.ggml_type)
    })?;
    let elements = info.shape.iter().fold(1, |all: usize, &size| all.saturating_mul(size));
    if !elements.is_multiple_of(storage.elements) {
        return Err(format!(
            "tensor {name:?} has {elements} elements, which are not whole blocks of {}",
            storage.name
        ));
    }
    // Saturating, so that an absurd size is reported as larger than the file.
    let length = (elements / storage.elements).saturating_mul(storage.bytes);
    let bytes = gguf.bytes(info, length).map_err(|error| format!("tensor {name:?}: {error}"))?;
    let shape: Vec<i64> = info.shape.iter().map(|&size| size as i64).collect();
    Ok(Tensor::from_slice(&storage.dequantize(bytes)).view(shape.as_slice()))
}

/// Reverts the row order of llama.cpp, which rotates adjacent elements where Hugging Face rotates halves.
///
/// # Source
/// The inverse of `LlamaModel.permute` in `convert_hf_to_gguf.py`, ggml-org/llama.cpp.
fn interleaved_to_halves(rows: &Tensor, heads: i64) -> Tensor {
    let size = rows.size();
    let width = size[0] / heads;
    let mut paired = vec![heads, width / 2, 2];
    paired.extend(&size[1..]);
    rows.view(paired.as_slice()).transpose(1, 2).reshape(size.as_slice())
}

/// Translates a Hugging Face tensor name to that of GGUF.
fn gguf_name(name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".to_owned(),
        "model.norm.weight" => return "output_norm.weight".to_owned(),
        "lm_head.weight" => return "output.weight".to_owned(),
        _ => {}
    }
    let words = [
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
    ];
    words.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn undoes_the_permutation_of_the_converter() {
        // Two heads of width four: the converter puts row 0, 2, 1, 3 of each head in this order.
        let original = Tensor::arange(8, (Kind::Float, Device::Cpu)).view([8, 1]);
        let permuted = original.view([2, 2, 2, 1]).transpose(1, 2).reshape([8, 1]);
        assert!(!permuted.equal(&original));
        assert!(interleaved_to_halves(&permuted, 2).equal(&original));
    }

    #[test]
    fn translates_names() {
        assert_eq!(gguf_name("model.layers.3.self_attn.q_norm.weight"), "blk.3.attn_q_norm.weight");
        assert_eq!(
            gguf_name("model.layers.3.post_attention_layernorm.weight"),
            "blk.3.ffn_norm.weight"
        );
        assert_eq!(gguf_name("model.layers.11.self_attn.q_proj.bias"), "blk.11.attn_q.bias");
    }
}
