//! Builds the config.json of a converted model from GGUF metadata.

use serde_json::{Value, json};

use crate::{
    architecture::families::{FAMILIES, Family},
    gguf::reader::Gguf,
};

/// Builds config.json.
///
/// # Errors
/// A message that says which metadata is missing or unsupported.
pub(super) fn config(gguf: &Gguf) -> Result<Value, String> {
    let architecture =
        gguf.text("general.architecture").ok_or("the metadata lacks general.architecture")?;
    let family = Family::of_model_type(architecture).filter(|family| family.gguf.is_some());
    let Some(family) = family else {
        let known = FAMILIES.iter().filter(|family| family.gguf.is_some());
        let known: Vec<_> = known.map(|family| family.model_type).collect();
        return Err(format!(
            "the architecture {architecture:?} is not supported: use one of {}",
            known.join(", ")
        ));
    };
    let key = |name: &str| format!("{architecture}.{name}");
    let integer =
        |name: &str| gguf.integer(&key(name)).ok_or(format!("the metadata lacks {}", key(name)));
    if gguf.tensors().contains_key("rope_freqs.weight") {
        return Err("it has rope_freqs.weight, a scaled rotary embedding whose settings GGUF does not store: \
                    use the model's original Hugging Face files"
            .to_owned());
    }
    if let Some(kind) = gguf.text(&key("rope.scaling.type")).filter(|kind| *kind != "none") {
        return Err(format!(
            "its rotary embedding is scaled by {kind:?}: use the model's original Hugging Face files"
        ));
    }
    let (width, heads) = (integer("embedding_length")?, integer("attention.head_count")?);
    if heads <= 0 || width <= 0 {
        return Err(format!(
            "{} is {width} and {} is {heads}",
            key("embedding_length"),
            key("attention.head_count")
        ));
    }
    // The number of tensors that will be listed depends on this number, so it must be plausible.
    let (blocks, tensors) = (integer("block_count")?, gguf.tensors().len());
    if usize::try_from(blocks).is_ok_and(|blocks| blocks > tensors) {
        return Err(format!(
            "{} is {blocks}, but the file has {tensors} tensors",
            key("block_count")
        ));
    }
    let head_dim = gguf.integer(&key("attention.key_length")).unwrap_or(width / heads);
    let context_length = integer("context_length")?;
    refuse_unsupported_features(gguf, architecture, head_dim, context_length)?;
    let vocabulary = gguf.list("tokenizer.ggml.tokens").map_or(0, <[_]>::len);
    let mut config = json!({
        "architectures": [family.class],
        "model_type": architecture,
        "hidden_size": width,
        "intermediate_size": integer("feed_forward_length")?,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.integer(&key("attention.head_count_kv")).unwrap_or(heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context_length,
        // The file has it in fp32, but the intended decimal has few digits.
        "rms_norm_eps": shortest_decimal(gguf.number(&key("attention.layer_norm_rms_epsilon")).unwrap_or(1e-6)),
        "rope_theta": shortest_decimal(gguf.number(&key("rope.freq_base")).unwrap_or(10_000.0)),
        "vocab_size": vocabulary,
        "tie_word_embeddings": !gguf.tensors().contains_key("output.weight"),
        "torch_dtype": "bfloat16",
        "use_cache": true,
    });
    for (name, id) in special_ids(gguf) {
        config[name] = id;
    }
    Ok(config)
}

/// Refuses features that GGUF metadata can express for these architectures but config.json cannot.
fn refuse_unsupported_features(
    gguf: &Gguf,
    architecture: &str,
    head_dim: i64,
    context_length: i64,
) -> Result<(), String> {
    let whole_head = head_dim..=head_dim;
    let allowed = [
        ("expert_count", 0..=0, "a mixture of experts"),
        ("rope.dimension_count", whole_head.clone(), "a partial rotary embedding"),
        (
            "attention.value_length",
            whole_head,
            "a head width of values that differs from that of keys",
        ),
        ("attention.sliding_window", context_length..=i64::MAX, "a sliding window"),
    ];
    for (name, allowed, what) in allowed {
        let key = format!("{architecture}.{name}");
        if let Some(number) = gguf.integer(&key).filter(|number| !allowed.contains(number)) {
            return Err(format!(
                "{key} is {number}: {what} is not supported, use the model's original Hugging Face files"
            ));
        }
    }
    Ok(())
}

/// Builds generation_config.json.
pub(super) fn generation_config(gguf: &Gguf) -> Value {
    special_ids(gguf)
        .into_iter()
        .map(|(name, id)| (name.to_owned(), id))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn special_ids(gguf: &Gguf) -> Vec<(&'static str, Value)> {
    [
        ("bos_token_id", "tokenizer.ggml.bos_token_id"),
        ("eos_token_id", "tokenizer.ggml.eos_token_id"),
        ("pad_token_id", "tokenizer.ggml.padding_token_id"),
    ]
    .into_iter()
    .filter_map(|(name, key)| Some((name, json!(gguf.integer(key)?))))
    .collect()
}

/// Returns the decimal with the fewest digits that rounds to the same fp32 number.
fn shortest_decimal(number: f64) -> f64 {
    (number as f32).to_string().parse().unwrap_or(number)
}
