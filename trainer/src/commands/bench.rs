//! Benchmarks training steps on given tokens; `cargo xtask bench trainer` compares them with other
//! trainers.
//!
//! It uses the engine and optimizer of a run without fetching, checkpoints and publishing, so that
//! only the training step is measured.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use finetune_contract::{
    Dtype, ExitCode, FailureReason, LoraSettings, Optimizer, Parallelism, Recompute, Strategy,
    TargetModules,
};
use serde::{Deserialize, Serialize};
use tch::Device;
use tracing::error;

use crate::{
    data::{chat::rendering::Rendering, sequences::Batch, tokenizer::Tokenizer},
    distributed::{
        self, Ranks,
        rank::{RankInfo, Timeouts},
    },
    failure::Failure,
    hf::read_config,
    layers::dropout::Dropout,
    lora::trainable::Trainable,
    model::{DataParallel, Model},
    objective::causal_lm::CausalLm,
    ops,
    optim::{self, AdamW},
    runtime::{clock, device, memory::PeakMemory, profile, rng::RngKey},
    store::Environment,
};

/// What to benchmark.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A Hugging Face model directory.
    #[arg(long)]
    model: PathBuf,
    /// A JSON list of rows `{"input_ids": […], "labels": […]}`, where label -100 is not a target.
    #[arg(long)]
    rows: PathBuf,
    /// First write `rows`, from the tokens of this text.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Tokens of each row that is made from the text.
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Make rows of random lengths from this one to `length` instead.
    #[arg(long)]
    shortest: Option<usize>,
    /// Compute on a GPU.
    #[arg(long)]
    cuda: bool,
    /// Train all parameters instead of adapters.
    #[arg(long)]
    full: bool,
    /// Rank of the adapters.
    #[arg(long, default_value_t = 8)]
    r: u32,
    /// Dropout on the adapters' inputs.
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Element type.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArgument,
    /// Kernel for bf16 matrix products instead of the fastest: amx, avx512-bf16 or avx512.
    #[arg(long)]
    kernel: Option<String>,
    /// Quantize AdamW's moments to 8 bits.
    #[arg(long = "adamw-8bit")]
    adamw_8bit: bool,
    /// Activation checkpointing: save only the input of each block.
    #[arg(long)]
    recompute: bool,
    /// Rows of one step on each rank.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Steps to time.
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// Untimed steps before those.
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Also report the time of the timed steps by operator.
    #[arg(long)]
    profile: bool,
    /// Learning rate, constant.
    #[arg(long, default_value_t = 1e-4)]
    learning_rate: f64,
    /// Number of ranks, each with its own rows; torch's variables say which one this is.
    #[arg(long, default_value_t = 1)]
    ranks: u32,
    /// The parallelism strategy, as in a `RunConfig`.
    #[arg(long, value_parser = parse_strategy, default_value = "ddp")]
    strategy: Strategy,
}

fn parse_strategy(word: &str) -> Result<Strategy, String> {
    serde_json::from_value(word.into()).map_err(|error| error.to_string())
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DtypeArgument {
    Bf16,
    Fp32,
}

#[derive(Debug, Deserialize, Serialize)]
struct Row {
    input_ids: Vec<i64>,
    labels: Vec<i64>,
}

#[derive(Debug, Serialize)]
struct Figures {
    step_seconds: Vec<f64>,
    /// Tokens of each timed step, without padding.
    step_tokens: Vec<usize>,
    losses: Vec<f64>,
    peak_anonymous_bytes: u64,
    seconds_to_first_step: f64,
    sent_bytes_per_step: u64,
    /// Seconds a step and calls a step, by operator; an operator may contain others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<(&'static str, f64, f64)>,
}

impl Arguments {
    fn device(&self) -> finetune_contract::Device {
        if self.cuda { finetune_contract::Device::Cuda } else { finetune_contract::Device::Cpu }
    }
}

/// Runs the steps and returns the figures as JSON.
///
/// # Errors
/// A [`Failure`] if the model or the rows cannot be used.
pub fn run(arguments: &Arguments, environment: &Environment) -> Result<String, Failure> {
    let device = device::open(arguments.device())?;
    let ranks = join(arguments, device, environment)?;
    let started = clock::now();
    let memory = PeakMemory::watch(device);
    let invalid = |message: String| Failure::new(FailureReason::InvalidConfiguration, message);
    if let Some(kernel) = &arguments.kernel {
        ops::choose_bf16_kernel(kernel).map_err(invalid)?;
    }
    if let Some(text) = &arguments.text {
        write_rows(arguments, text).map_err(invalid)?;
    }
    let text = std::fs::read_to_string(&arguments.rows)
        .map_err(|error| invalid(format!("cannot read {:?}: {error}", arguments.rows)))?;
    let rows: Vec<Row> = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    if rows.is_empty()
        || rows.iter().any(|row| row.input_ids.len() != row.labels.len() || row.labels.len() < 2)
    {
        return Err(invalid("each row needs as many labels as input_ids, at least 2".to_owned()));
    }
    let config = read_config(&arguments.model)?;
    let trainable = if arguments.full {
        Trainable::Full
    } else {
        Trainable::lora(&config, &lora(arguments)).map_err(|error| invalid(error.to_string()))?
    };
    let dtype = match arguments.dtype {
        DtypeArgument::Bf16 => Dtype::Bf16,
        DtypeArgument::Fp32 => Dtype::Fp32,
    };
    let recompute = if arguments.recompute { Recompute::Block } else { Recompute::None };
    let seed = RngKey::from_seed(0);
    let data_parallel = DataParallel {
        ranks: ranks.clone(),
        strategy: strategy(arguments),
        ..DataParallel::single_rank()
    };
    let mut model = Model::load_data_parallel(
        &arguments.model,
        config,
        trainable,
        dtype,
        device,
        seed,
        data_parallel,
    )?;
    let optimizer = if arguments.adamw_8bit { Optimizer::Adamw8bit } else { Optimizer::Adamw };
    let mut adamw = AdamW::new(model.trained(), optimizer, 0.0);
    let mut figures = Figures {
        step_seconds: Vec::new(),
        step_tokens: Vec::new(),
        losses: Vec::new(),
        peak_anonymous_bytes: 0,
        seconds_to_first_step: 0.0,
        sent_bytes_per_step: 0,
        profile: Vec::new(),
    };
    for step in 0..arguments.warmup + arguments.steps {
        let chosen: Vec<&Row> = (0..arguments.batch)
            .map(|index| {
                let batch = step * arguments.ranks as usize + ranks.rank() as usize;
                &rows[(batch * arguments.batch + index) % rows.len()]
            })
            .collect();
        let batch = pack(&chosen);
        if step == arguments.warmup && arguments.profile {
            profile::start();
        }
        let (step_started, sent) = (clock::now(), ranks.sent_bytes());
        let dropout = Dropout::new(arguments.dropout, seed.fold_in(step as u64));
        model.trained().zero_grad();
        model.mark_last_backward();
        let sums = model.accumulate_gradients(&batch, &CausalLm, recompute, dropout.as_ref());
        model.reduce_gradients()?;
        let [all_targets] = ranks.sum([batch.labels.len() as f64])?;
        let clipped = optim::clip(model.gradient_square()?, all_targets as u64, 1.0);
        let rate = arguments.learning_rate;
        adamw.step(model.trained_mut(), clipped.scale, rate, step as u64 + 1);
        figures.losses.push(sums.mean());
        figures.sent_bytes_per_step = ranks.sent_bytes() - sent;
        if step == 0 {
            figures.seconds_to_first_step = started.elapsed().as_secs_f64();
        }
        if step >= arguments.warmup {
            figures.step_seconds.push(step_started.elapsed().as_secs_f64());
            figures.step_tokens.push(batch.tokens.len());
        }
    }
    let steps = arguments.steps as f64;
    let mut times: Vec<_> = profile::stop()
        .into_iter()
        .map(|(name, (time, calls))| (name, time.as_secs_f64() / steps, calls as f64 / steps))
        .collect();
    times.sort_by(|one, other| other.1.total_cmp(&one.1));
    figures.profile = times;
    figures.peak_anonymous_bytes = memory.bytes();
    ranks.done();
    serde_json::to_string(&figures).map_err(|error| invalid(error.to_string()))
}

fn strategy(arguments: &Arguments) -> Strategy {
    match arguments.strategy {
        Strategy::Ddp if arguments.ranks == 1 => Strategy::None,
        strategy => strategy,
    }
}

/// Joins the other ranks, if there are any.
fn join(
    arguments: &Arguments,
    device: Device,
    environment: &Environment,
) -> Result<Ranks, Failure> {
    let parallelism = Parallelism {
        world_size: arguments.ranks,
        strategy: strategy(arguments),
        ..Parallelism::SINGLE
    };
    let Some(info) = RankInfo::read(parallelism, environment)? else { return Ok(Ranks::alone()) };
    let on_lost = Box::new(|why: &str| {
        error!("{why}");
        distributed::exit(ExitCode::PeerLost)
    });
    Ok(Ranks::join(&info, "bench", device, Timeouts::default(), on_lost)?)
}

/// Divides the tokens of a text into rows in which every token is a target.
fn write_rows(arguments: &Arguments, text: &Path) -> Result<(), String> {
    let text = std::fs::read_to_string(text)
        .map_err(|error| format!("cannot read {}: {error}", text.display()))?;
    let tokenizer = Tokenizer::load(&arguments.model, &Rendering::of_model())
        .map_err(|failure| failure.message)?;
    let tokens: Vec<i64> = tokenizer.encode(&text, false)?.into_iter().map(i64::from).collect();
    let shortest = arguments.shortest.unwrap_or(arguments.length);
    let key = RngKey::from_seed(0);
    if shortest < 2 || shortest > arguments.length {
        return Err(format!("--shortest is {shortest}, must be 2 to {}", arguments.length));
    }
    let mut rows: Vec<Row> = Vec::new();
    let mut rest = &tokens[..];
    while rest.len() >= arguments.length {
        let choices = (arguments.length - shortest + 1) as u64;
        let length = shortest + (key.draw(rows.len() as u64) % choices) as usize;
        let (row, remaining) = rest.split_at(length);
        rows.push(Row { input_ids: row.to_vec(), labels: row.to_vec() });
        rest = remaining;
    }
    let json = serde_json::to_string(&rows).map_err(|error| error.to_string())?;
    std::fs::write(&arguments.rows, json).map_err(|error| error.to_string())
}

fn lora(arguments: &Arguments) -> LoraSettings {
    LoraSettings {
        r: arguments.r,
        lora_alpha: 16.0,
        lora_dropout: arguments.dropout,
        target_modules: TargetModules::AllLinear,
        modules_to_save: Vec::new(),
        exclude_modules: None,
        layers_to_transform: Vec::new(),
        use_rslora: false,
    }
}

/// Packs rows into a micro-batch; label `i` of a row is predicted from the tokens before it.
fn pack(rows: &[&Row]) -> Batch {
    let mut batch = Batch {
        tokens: Vec::new(),
        segment_lengths: Vec::new(),
        target_positions: Vec::new(),
        labels: Vec::new(),
    };
    for row in rows {
        let start = batch.tokens.len() as i64;
        for (index, &label) in
            row.labels.iter().enumerate().skip(1).filter(|(_, label)| **label != -100)
        {
            batch.target_positions.push(start + index as i64 - 1);
            batch.labels.push(label);
        }
        batch.tokens.extend(&row.input_ids);
        batch.segment_lengths.push(row.input_ids.len());
    }
    batch
}
