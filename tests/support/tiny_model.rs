//! A tiny llama with random weights, a byte-level tokenizer and a ChatML template.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};

const VOCAB: usize = 264;
const HIDDEN: usize = 32;
const FEED_FORWARD: usize = 64;
const LAYERS: usize = 2;
const KEY_VALUE: usize = 16;

const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Writes the model's directory.
pub(crate) fn write(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    let json = |name: &str, value: Value| {
        fs::write(directory.join(name), value.to_string()).unwrap();
    };
    json(
        "config.json",
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
            "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": true, "torch_dtype": "float32",
        }),
    );
    json("tokenizer.json", tokenizer());
    json("tokenizer_config.json", json!({"eos_token": "<|im_end|>"}));
    fs::write(directory.join("chat_template.jinja"), CHATML).unwrap();
    fs::write(directory.join("model.safetensors"), safetensors(&shapes())).unwrap();
}

fn shapes() -> BTreeMap<String, Vec<usize>> {
    let mut shapes = BTreeMap::from([
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ]);
    for layer in 0..LAYERS {
        let of_layer = [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![KEY_VALUE, HIDDEN]),
            ("self_attn.v_proj", vec![KEY_VALUE, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![FEED_FORWARD, HIDDEN]),
            ("mlp.up_proj", vec![FEED_FORWARD, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FEED_FORWARD]),
        ];
        shapes.extend(
            of_layer
                .into_iter()
                .map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)),
        );
    }
    shapes
}

/// Returns a safetensors file of fp32 tensors: norms of ones, all else small random numbers.
fn safetensors(shapes: &BTreeMap<String, Vec<usize>>) -> Vec<u8> {
    let mut random = Random::new(1);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape) in shapes {
        let start = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            let value = if shape.len() == 1 { 1.0 } else { 0.4 * random.fraction() - 0.2 };
            data.extend((value as f32).to_le_bytes());
        }
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let mut header = Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// Returns a byte-level tokenizer without merges: every byte is a token.
fn tokenizer() -> Value {
    // GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on.
    let is_printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    let alphabet =
        (0..256).map(|byte| if is_printable(byte) { byte } else { others.next().unwrap() });
    let vocab: serde_json::Map<String, Value> = alphabet
        .enumerate()
        .map(|(id, character)| (char::from_u32(character).unwrap().to_string(), json!(id)))
        .collect();
    let added: Vec<Value> = ["<|im_start|>", "<|im_end|>"]
        .into_iter()
        .enumerate()
        .map(|(index, content)| {
            json!({"id": 256 + index, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab, "merges": []},
    })
}

/// Random numbers of a seed, the same everywhere.
///
/// # Source
/// SplitMix64, as in `java.util.SplittableRandom`.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number from 0 to below 1.
    pub(crate) fn fraction(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1_u64 << 53) as f64
    }
}
