//! Continues a prompt with a model, so that a person can see what training did.
//!
//! This is not a server: one sequence with a key/value cache, greedy or sampled, to standard output.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;
use finetune_contract::{Dtype, FailureReason, Manifest, artifact::MANIFEST_NAME};
use tch::{Device, Kind, Tensor};

use crate::{
    data::{
        chat::rendering::Rendering,
        conversation::{ChatRole, Message},
        tokenizer::Tokenizer,
    },
    failure::Failure,
    hf::{extension, read_config},
    layers::linear::Input,
    model::{
        Model,
        block::{Block, self_attention::SelfAttention},
    },
    ops,
    runtime::rng::RngKey,
    store::Environment,
    verification::load_frozen,
};

/// The model, the prompt and the sampling settings.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A Hugging Face model directory.
    #[arg(long)]
    model: PathBuf,
    /// A PEFT adapter directory to apply to the model.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// The message of the user.
    #[arg(long)]
    prompt: String,
    /// The system message before it.
    #[arg(long)]
    system: Option<String>,
    /// The maximum number of tokens to generate.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// The sampling temperature; 0 always takes the most likely token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// The seed of the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Continue the prompt as it is, without a chat template.
    #[arg(long)]
    raw: bool,
}

/// Generates a continuation and prints it token by token.
///
/// # Errors
/// A [`Failure`] if model, adapter or prompt cannot be used.
pub fn run(arguments: &Arguments, _environment: &Environment) -> Result<(), Failure> {
    let scratch = std::env::temp_dir().join(format!("finetune-generate-{}", std::process::id()));
    let loaded = base_directory(arguments, &scratch).and_then(|base| {
        let tokenizer = Tokenizer::load(&base, &Rendering::of_model())?;
        Ok((tokenizer, load(&base, arguments.adapter.as_deref())?))
    });
    // Files that are mapped into memory remain readable after their deletion.
    let _ = std::fs::remove_dir_all(&scratch);
    let (tokenizer, model) = loaded?;
    let prompt = prompt_tokens(&tokenizer, arguments)
        .map_err(|reason| Failure::new(FailureReason::InvalidConfiguration, reason))?;
    let mut out = std::io::stdout().lock();
    let mut print = |text: &str| {
        // A closed pipe is not an error.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    };
    let sampling =
        Sampling { temperature: arguments.temperature, rng: RngKey::from_seed(arguments.seed) };
    let mut decoder = StreamDecoder::default();
    for token in Generator::new(&model, &prompt, sampling).take(arguments.max_new_tokens) {
        if tokenizer.eos_ids().contains(&token) {
            break;
        }
        print(&decoder.push(&tokenizer, token));
    }
    print("\n");
    Ok(())
}

/// Returns the directory of the base model, with the tokens added that the adapter was trained with.
fn base_directory(arguments: &Arguments, scratch: &Path) -> Result<PathBuf, Failure> {
    let published = arguments.adapter.as_ref().map(|adapter| adapter.join(MANIFEST_NAME));
    let manifest = match published.map(std::fs::read_to_string) {
        Some(Ok(text)) => finetune_contract::parse::<Manifest>(&text),
        _ => return Ok(arguments.model.clone()),
    };
    let manifest = manifest
        .map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))?;
    extension::add_tokens(&arguments.model, &manifest.base_model.added_tokens, scratch)
}

fn load(model: &Path, adapter: Option<&Path>) -> Result<Model, Failure> {
    // Every CPU is fast enough for one sequence in fp32, which loses no precision.
    match adapter {
        Some(adapter) => {
            Model::load_with_adapter(model, read_config(model)?, adapter, Dtype::Fp32, Device::Cpu)
        }
        None => load_frozen(model, Dtype::Fp32, Device::Cpu),
    }
}

fn prompt_tokens(tokenizer: &Tokenizer, arguments: &Arguments) -> Result<Vec<u32>, String> {
    let is_raw = arguments.raw || !tokenizer.has_template();
    if is_raw && arguments.system.is_some() {
        let why = if arguments.raw { "--raw disables it" } else { "this model has none" };
        return Err(format!("--system requires a chat template, but {why}: remove --system"));
    }
    let tokens = if is_raw {
        tokenizer.encode(&arguments.prompt, true)?
    } else {
        let system = arguments.system.iter().map(|system| Message::new(ChatRole::System, system));
        let user = Message::new(ChatRole::User, &arguments.prompt);
        let messages: Vec<Message> = system.chain([user]).collect();
        tokenizer.encode(&tokenizer.render_chat(&messages, true)?, false)?
    };
    if tokens.is_empty() { Err("the prompt has no tokens".to_owned()) } else { Ok(tokens) }
}

/// Decodes a stream of tokens into text. A token may end in the middle of a character.
#[derive(Default)]
struct StreamDecoder {
    tokens: Vec<u32>,
    printed: usize,
}

impl StreamDecoder {
    /// Adds a token and returns the text that is complete with it.
    fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        self.tokens.push(token);
        let text = tokenizer.decode(&self.tokens, true);
        if text.ends_with('\u{FFFD}') {
            return String::new();
        }
        let new = text.get(self.printed..).unwrap_or_default().to_owned();
        self.printed = text.len();
        new
    }
}

/// How the next token is sampled.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// The temperature; 0 takes the most likely token.
    pub temperature: f64,
    /// The source of random numbers.
    pub rng: RngKey,
}

/// Generates the endless continuation of a prompt.
pub struct Generator<'a> {
    model: &'a Model,
    sampling: Sampling,
    /// Keys and values of each block for all earlier positions.
    cache: Vec<Option<(Tensor, Tensor)>>,
    /// Tokens that the model has not processed yet.
    pending: Vec<u32>,
    position: i64,
}

impl<'a> Generator<'a> {
    /// Starts after a prompt of at least one token.
    pub fn new(model: &'a Model, prompt: &[u32], sampling: Sampling) -> Self {
        let cache = model.blocks().iter().map(|_| None).collect();
        Self { model, sampling, cache, pending: prompt.to_vec(), position: 0 }
    }

    /// Processes the pending tokens and returns the logits after the last of them, `[V]` in fp32.
    fn logits(&mut self) -> Tensor {
        let tokens: Vec<i64> = self.pending.iter().map(|&token| i64::from(token)).collect();
        let positions: Vec<i64> = (self.position..self.position + tokens.len() as i64).collect();
        let rotary = self.model.rotary(&positions);
        let mut x = self.model.embedding().forward(&Tensor::from_slice(&tokens));
        for (block, cache) in self.model.blocks().iter().zip(&mut self.cache) {
            x = forward_cached(block, &x, &rotary, cache);
        }
        self.position += tokens.len() as i64;
        let (norm, lm_head) = self.model.head();
        let last = x.narrow(0, tokens.len() as i64 - 1, 1);
        let [logits] = lm_head.forward_only(&Input::without_dropout(norm.forward(&last)));
        logits.to_kind(Kind::Float).view(-1)
    }

    fn sample(&self, logits: &Tensor) -> u32 {
        if self.sampling.temperature <= 0.0 {
            return logits.argmax(0, false).int64_value(&[]) as u32;
        }
        let cumulative =
            (logits / self.sampling.temperature).softmax(0, Kind::Double).cumsum(0, Kind::Double);
        let point = self.sampling.rng.uniform(self.position as u64);
        let last = logits.size()[0] - 1;
        cumulative.le(point).sum(Kind::Int64).int64_value(&[]).min(last) as u32
    }
}

impl Iterator for Generator<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let logits = self.logits();
        let token = self.sample(&logits);
        self.pending = vec![token];
        Some(token)
    }
}

/// Computes a block for `t` new tokens, `[t, D]`, and appends their keys and values to the cache.
fn forward_cached(
    block: &Block,
    x: &Tensor,
    rotary: &crate::layers::rope::Rotary,
    cache: &mut Option<(Tensor, Tensor)>,
) -> Tensor {
    let Block { self_attention, feed_forward } = block;
    let split_heads = |x: &Tensor| x.view([x.size()[0], -1, self_attention.head_dim]);
    let qkv = self_attention
        .qkv_proj
        .forward_only(&Input::without_dropout(self_attention.input_layernorm.forward(x)));
    let [mut q, mut k, mut v] = qkv.each_ref().map(split_heads);
    if let Some((q_norm, k_norm)) = &self_attention.qk_norm {
        (q, k) = (q_norm.forward(&q), k_norm.forward(&k));
    }
    (q, k) = (rotary.rotate(q), rotary.rotate(k));
    if let Some((keys, values)) = cache.take() {
        (k, v) = (Tensor::cat(&[keys, k], 0), Tensor::cat(&[values, v], 0));
    }
    let out = attention(self_attention, &q, &k, &v);
    *cache = Some((k, v));
    let [o] = self_attention.o_proj.forward_only(&Input::without_dropout(out));
    let x = o + x;
    let normed = Input::without_dropout(feed_forward.post_attention_layernorm.forward(&x));
    let [gate, up] = feed_forward.gate_up_proj.forward_only(&normed);
    let [down] =
        feed_forward.down_proj.forward_only(&Input::without_dropout(ops::swiglu(&gate, &up)));
    down + x
}

/// Computes attention of the last `t` of `S` positions: `q` is `[t, H, E]`, `k` and `v` are
/// `[S, K, E]`.
fn attention(self_attention: &SelfAttention, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (new, all, groups) = (q.size()[0], k.size()[0], q.size()[1] / k.size()[1]);
    let repeat = |x: &Tensor| x.repeat_interleave_self_int(groups, 1, None).transpose(0, 1); // [H, S, E]
    let scores = q.transpose(0, 1).matmul(&repeat(k).transpose(1, 2))
        / (self_attention.head_dim as f64).sqrt();
    let mut visible = Tensor::ones([new, all], (Kind::Bool, Device::Cpu)).tril(all - new);
    if let Some(window) = self_attention.attention.window {
        visible = visible.triu(all - new + 1 - window as i64);
    }
    let scores = scores.masked_fill(&visible.logical_not(), f64::NEG_INFINITY);
    let out = scores.softmax(-1, Kind::Float).to_kind(v.kind()).matmul(&repeat(v)); // [H, t, E]
    out.transpose(0, 1).reshape([new, -1])
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A tiny random model of `tests/golden/gen.py`.
    fn directory(family: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data").join(family)
    }

    #[test]
    fn a_cached_step_gives_the_logits_of_the_whole_text() {
        // Two families have a sliding window of six positions; qwen3 normalizes queries and keys.
        for family in ["llama", "llama-biases", "mistral-window", "qwen2-window", "qwen3"] {
            let model = load(&directory(family), None).unwrap();
            let sampling = Sampling { temperature: 0.0, rng: RngKey::from_seed(0) };
            let mut tokens: Vec<u32> = (5..14).collect();
            let mut generator = Generator::new(&model, &tokens, sampling);
            for _ in 0..8 {
                let whole = model.logits(&tokens).select(0, tokens.len() as i64 - 1);
                let cached = generator.logits();
                let largest = (&cached - &whole).abs().max().double_value(&[]);
                assert!(largest < 1e-5, "{family}: {largest:e} after {} tokens", tokens.len());
                let token = generator.sample(&cached);
                generator.pending = vec![token];
                tokens.push(token);
            }
        }
    }

    #[test]
    fn the_seed_decides_what_is_sampled() {
        let model = load(&directory("llama"), None).unwrap();
        let sampled = |seed| {
            let sampling = Sampling { temperature: 5.0, rng: RngKey::from_seed(seed) };
            Generator::new(&model, &[5, 6, 7], sampling).take(12).collect::<Vec<u32>>()
        };
        assert_eq!(sampled(1), sampled(1));
        assert_ne!(sampled(1), sampled(2));
    }

    #[test]
    fn prints_characters_once_they_are_complete() {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("model");
        let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gguf/golden/qwen2.gguf");
        crate::gguf::convert(&gguf, &to).unwrap();
        let tokenizer = Tokenizer::load(&to, &Rendering::of_model()).unwrap();
        let text = "hé 你好 🌸!";
        let tokens = tokenizer.encode(text, true).unwrap();
        assert!(tokens.len() > text.chars().count(), "some tokens must be parts of characters");
        let mut decoder = StreamDecoder::default();
        let pieces: Vec<String> =
            tokens.iter().map(|&token| decoder.push(&tokenizer, token)).collect();
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn refuses_a_system_prompt_without_a_chat_template() {
        let tokenizer = Tokenizer::load(&directory("llama"), &Rendering::of_model()).unwrap();
        let refused = |raw| {
            let arguments = Arguments {
                model: PathBuf::new(),
                adapter: None,
                prompt: "t1".to_owned(),
                system: Some("t2".to_owned()),
                max_new_tokens: 1,
                temperature: 0.0,
                seed: 0,
                raw,
            };
            prompt_tokens(&tokenizer, &arguments).unwrap_err()
        };
        insta::assert_snapshot!(refused(true), @"--system requires a chat template, but --raw disables it: remove --system");
        insta::assert_snapshot!(refused(false), @"--system requires a chat template, but this model has none: remove --system");
    }
}
