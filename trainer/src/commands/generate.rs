//! Continuing a prompt with a model, so that a person can see what training did.
//!
//! Not a server: one sequence, a key/value cache, greedy or sampled, straight to standard output.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;
use finetune_contract::{Dtype, FailureReason, Manifest, artifact::MANIFEST_NAME};
use tch::{Device, Kind, Tensor};

use crate::{
    data::{
        Rendering, Tokenizer,
        conversation::{ChatRole, Message},
    },
    failure::Failure,
    hf::{extension, read_config},
    layers::linear::Input,
    model::{Model, block::Block},
    ops,
    runtime::rng::RngKey,
    store::Environment,
    verification::load_frozen,
};

/// What to continue, and how.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A Hugging Face model directory.
    #[arg(long)]
    model: PathBuf,
    /// A PEFT adapter directory to put on it.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// What the user says.
    #[arg(long)]
    prompt: String,
    /// What the system says before.
    #[arg(long)]
    system: Option<String>,
    /// Tokens to generate, at most.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// How much to leave to chance; 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Seed of the chance.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Continue the prompt as it is, without a chat template.
    #[arg(long)]
    raw: bool,
}

/// Generates and prints as it goes.
///
/// # Errors
/// A [`Failure`] if model, adapter or prompt cannot be used.
pub fn run(arguments: &Arguments, _environment: &Environment) -> Result<(), Failure> {
    let scratch = std::env::temp_dir().join(format!("finetune-generate-{}", std::process::id()));
    let loaded = base(arguments, &scratch).and_then(|base| {
        let tokenizer = Tokenizer::load(&base, &Rendering::of_model())?;
        Ok((tokenizer, load(&base, arguments.adapter.as_deref())?))
    });
    // What was mapped stays there.
    let _ = std::fs::remove_dir_all(&scratch);
    let (tokenizer, model) = loaded?;
    let prompt = prompt_tokens(&tokenizer, arguments)
        .map_err(|reason| Failure::new(FailureReason::InvalidConfiguration, reason))?;
    let mut out = std::io::stdout().lock();
    let mut tell = |text: &str| {
        // Nobody listening is no failure of ours.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    };
    let choice =
        Choice { temperature: arguments.temperature, numbers: RngKey::from_seed(arguments.seed) };
    let mut said = Said::default();
    for token in Continuation::new(&model, &prompt, choice).take(arguments.max_new_tokens) {
        if tokenizer.eos_ids().contains(&token) {
            break;
        }
        tell(&said.next(&tokenizer, token));
    }
    tell("\n");
    Ok(())
}

/// Returns the base model's directory, with the tokens that were added to it for the adapter.
fn base(arguments: &Arguments, scratch: &Path) -> Result<PathBuf, Failure> {
    let published = arguments.adapter.as_ref().map(|adapter| adapter.join(MANIFEST_NAME));
    let manifest = match published.map(std::fs::read_to_string) {
        Some(Ok(text)) => finetune_contract::parse::<Manifest>(&text),
        _ => return Ok(arguments.model.clone()),
    };
    let manifest = manifest
        .map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))?;
    extension::with_tokens(&arguments.model, &manifest.base_model.added_tokens, scratch)
}

fn load(model: &Path, adapter: Option<&Path>) -> Result<Model, Failure> {
    // In fp32 every processor is fast enough for one sequence, and nothing is rounded away.
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
        let why = if arguments.raw { "with --raw there is none" } else { "this model has none" };
        return Err(format!("--system needs a chat template, and {why}: leave it out"));
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

/// Text so far; a token may end in the middle of a character.
#[derive(Default)]
struct Said {
    tokens: Vec<u32>,
    printed: usize,
}

impl Said {
    fn next(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
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

/// How a token is chosen.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// 0 takes the likeliest.
    pub temperature: f64,
    /// Numbers for the rest.
    pub numbers: RngKey,
}

/// The endless continuation of a prompt.
pub struct Continuation<'a> {
    model: &'a Model,
    choice: Choice,
    cache: Vec<Option<(Tensor, Tensor)>>,
    next: Vec<u32>,
    position: i64,
}

impl<'a> Continuation<'a> {
    /// Starts after a prompt of at least one token.
    pub fn new(model: &'a Model, prompt: &[u32], choice: Choice) -> Self {
        let cache = model.blocks().iter().map(|_| None).collect();
        Self { model, choice, cache, next: prompt.to_vec(), position: 0 }
    }

    /// Returns the logits after the tokens that are waiting, `[V]` in fp32.
    fn logits(&mut self) -> Tensor {
        let tokens: Vec<i64> = self.next.iter().map(|&token| i64::from(token)).collect();
        let positions: Vec<i64> = (self.position..self.position + tokens.len() as i64).collect();
        let rotary = self.model.rotary(&positions);
        let mut x = self.model.embedding().forward(&Tensor::from_slice(&tokens));
        for (block, cache) in self.model.blocks().iter().zip(&mut self.cache) {
            x = step(block, &x, &rotary, cache);
        }
        self.position += tokens.len() as i64;
        let (norm, lm_head) = self.model.head();
        let last = x.narrow(0, tokens.len() as i64 - 1, 1);
        let [logits] = lm_head.forward_only(&Input::without_dropout(norm.forward(&last)));
        logits.to_kind(Kind::Float).view(-1)
    }

    fn choose(&self, logits: &Tensor) -> u32 {
        if self.choice.temperature <= 0.0 {
            return logits.argmax(0, false).int64_value(&[]) as u32;
        }
        let sums =
            (logits / self.choice.temperature).softmax(0, Kind::Double).cumsum(0, Kind::Double);
        let point = self.choice.numbers.uniform(self.position as u64);
        let last = logits.size()[0] - 1;
        sums.le(point).sum(Kind::Int64).int64_value(&[]).min(last) as u32
    }
}

impl Iterator for Continuation<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let logits = self.logits();
        let token = self.choose(&logits);
        self.next = vec![token];
        Some(token)
    }
}

/// Computes a block for new tokens `[t, D]`, adding their keys and values to the cache.
fn step(
    block: &Block,
    x: &Tensor,
    rotary: &crate::layers::rope::Rotary,
    cache: &mut Option<(Tensor, Tensor)>,
) -> Tensor {
    let split = |x: &Tensor| x.view([x.size()[0], -1, block.head_dim]);
    let qkv =
        block.qkv_proj.forward_only(&Input::without_dropout(block.input_layernorm.forward(x)));
    let [mut q, mut k, mut v] = qkv.each_ref().map(split);
    if let Some((q_norm, k_norm)) = &block.qk_norm {
        (q, k) = (q_norm.forward(&q), k_norm.forward(&k));
    }
    (q, k) = (rotary.rotate(q), rotary.rotate(k));
    if let Some((keys, values)) = cache.take() {
        (k, v) = (Tensor::cat(&[keys, k], 0), Tensor::cat(&[values, v], 0));
    }
    let attended = attend(block, &q, &k, &v);
    *cache = Some((k, v));
    let [o] = block.o_proj.forward_only(&Input::without_dropout(attended));
    let x = o + x;
    let normed = Input::without_dropout(block.post_attention_layernorm.forward(&x));
    let [gate, up] = block.gate_up_proj.forward_only(&normed);
    let [down] = block.down_proj.forward_only(&Input::without_dropout(ops::swiglu(&gate, &up)));
    down + x
}

/// Attention of the last `t` positions over all `S`: `q` is `[t, H, E]`, `k` and `v` are `[S, K, E]`.
fn attend(block: &Block, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (new, all, groups) = (q.size()[0], k.size()[0], q.size()[1] / k.size()[1]);
    let repeat = |x: &Tensor| x.repeat_interleave_self_int(groups, 1, None).transpose(0, 1); // [H, S, E]
    let scores =
        q.transpose(0, 1).matmul(&repeat(k).transpose(1, 2)) / (block.head_dim as f64).sqrt();
    let mut visible = Tensor::ones([new, all], (Kind::Bool, Device::Cpu)).tril(all - new);
    if let Some(window) = block.attention.window {
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
        // Among them a window of six positions, and normed queries and keys.
        for family in ["llama", "llama-biases", "mistral-window", "qwen2-window", "qwen3"] {
            let model = load(&directory(family), None).unwrap();
            let choice = Choice { temperature: 0.0, numbers: RngKey::from_seed(0) };
            let mut tokens: Vec<u32> = (5..14).collect();
            let mut continuation = Continuation::new(&model, &tokens, choice);
            for _ in 0..8 {
                let whole = model.logits(&tokens).select(0, tokens.len() as i64 - 1);
                let cached = continuation.logits();
                let largest = (&cached - &whole).abs().max().double_value(&[]);
                assert!(largest < 1e-5, "{family}: {largest:e} after {} tokens", tokens.len());
                let token = continuation.choose(&cached);
                continuation.next = vec![token];
                tokens.push(token);
            }
        }
    }

    #[test]
    fn the_seed_decides_what_is_sampled() {
        let model = load(&directory("llama"), None).unwrap();
        let sampled = |seed| {
            let choice = Choice { temperature: 5.0, numbers: RngKey::from_seed(seed) };
            Continuation::new(&model, &[5, 6, 7], choice).take(12).collect::<Vec<u32>>()
        };
        assert_eq!(sampled(1), sampled(1));
        assert_ne!(sampled(1), sampled(2));
    }

    #[test]
    fn prints_characters_when_they_are_whole() {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("model");
        let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gguf/golden/qwen2.gguf");
        crate::gguf::convert(&gguf, &to).unwrap();
        let tokenizer = Tokenizer::load(&to, &Rendering::of_model()).unwrap();
        let text = "hé 你好 🌸!";
        let tokens = tokenizer.encode(text, true).unwrap();
        assert!(tokens.len() > text.chars().count(), "some tokens must be parts of characters");
        let mut said = Said::default();
        let pieces: Vec<String> =
            tokens.iter().map(|&token| said.next(&tokenizer, token)).collect();
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
        assert_eq!(pieces.concat(), text);
    }

    #[test]
    fn refuses_a_system_prompt_that_nobody_would_see() {
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
        insta::assert_snapshot!(refused(true), @"--system needs a chat template, and with --raw there is none: leave it out");
        insta::assert_snapshot!(refused(false), @"--system needs a chat template, and this model has none: leave it out");
    }
}
