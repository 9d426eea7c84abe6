//! Telling the world how a run is going: lines of JSON on standard output, and a history on disk.

use std::{
    collections::VecDeque,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use finetune_contract::{CONTRACT_VERSION, Progress, RunConfig, Stage, parse, render};

use crate::{
    checkpoint::{Saved, TrainState},
    runtime::{device, memory::PeakMemory},
};

/// The history's name in the work directory: one [`Progress`] per line.
pub const HISTORY_FILE: &str = "metrics.jsonl";
/// Steps the speed is averaged over.
const SPEED_WINDOW: usize = 10;

/// What one optimizer step came to.
#[derive(Debug, Clone, Copy)]
pub struct StepFigures {
    /// Mean loss per target token.
    pub loss: f64,
    /// The learning rate used.
    pub learning_rate: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
    /// Positions trained on.
    pub tokens: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// Bytes this rank sent.
    pub sent_bytes: u64,
}

/// Tells progress.
pub struct Teller<'a> {
    line: &'a mut dyn FnMut(&str),
    history: PathBuf,
    last: Progress,
    state: TrainState,
    recent: VecDeque<(u64, f64)>,
    speeds: Vec<f64>,
    sent_bytes: Option<u64>,
    rows_left_out: u64,
    memory: PeakMemory,
    /// Seconds the run may train, over all attempts.
    max_seconds: f64,
    started: Instant,
}

impl<'a> Teller<'a> {
    /// Starts telling; each line goes to `line`, and the history into `work_dir`.
    pub fn new(config: &RunConfig, work_dir: &Path, line: &'a mut dyn FnMut(&str)) -> Self {
        let last = Progress {
            version: CONTRACT_VERSION,
            run_id: config.run_id.clone(),
            stage: Stage::Fetching,
            step: 0,
            total_steps: config.training.total_steps,
            epoch: 0.0,
            loss: None,
            eval_loss: None,
            learning_rate: None,
            grad_norm: None,
            tokens_per_second: None,
            tokens_seen: 0,
            eta_seconds: None,
            peak_memory_bytes: 0,
            checkpoint_step: None,
            checkpoint_stall_seconds: None,
            checkpoint_write_seconds: None,
            resumed_from_step: None,
        };
        Self {
            line,
            history: work_dir.join(HISTORY_FILE),
            last,
            state: TrainState::default(),
            recent: VecDeque::new(),
            speeds: Vec::new(),
            sent_bytes: None,
            rows_left_out: 0,
            memory: PeakMemory::watch(device::of(config.device)),
            max_seconds: config
                .training
                .max_time_seconds
                .map_or(f64::INFINITY, |seconds| seconds as f64),
            started: crate::runtime::clock::now(),
        }
    }

    /// Tells that another stage began.
    pub fn stage(&mut self, stage: Stage) {
        self.last.stage = stage;
        self.tell();
    }

    /// Takes how many training rows could not be used.
    pub fn left_out(&mut self, rows: u64) {
        self.rows_left_out = rows;
    }

    /// Returns how many training rows could not be used; `None` for none.
    pub fn rows_left_out(&self) -> Option<u64> {
        Some(self.rows_left_out).filter(|&rows| rows > 0)
    }

    /// Takes over what a checkpoint knows, and cuts the history back to it.
    pub fn resume(&mut self, state: &TrainState) {
        self.last.resumed_from_step = (state.step > 0).then_some(state.step);
        self.last.checkpoint_step = self.last.resumed_from_step;
        self.take(state, 0.0);
        self.cut_history(state.step);
    }

    /// Tells that an earlier attempt did all up to the step whose weights it published.
    pub fn done_before(&mut self, step: u64) {
        self.last.step = step;
        self.last.resumed_from_step = Some(step);
    }

    /// Tells a finished step.
    pub fn step(&mut self, state: &TrainState, epoch: f64, figures: &StepFigures) {
        self.take(state, epoch);
        self.last.stage = Stage::Training;
        self.last.learning_rate = Some(figures.learning_rate);
        self.last.grad_norm = finite(figures.grad_norm);
        // A step after an evaluation finds weights gathered and sends less.
        self.sent_bytes = self.sent_bytes.max(Some(figures.sent_bytes));
        self.recent.push_back((figures.tokens, figures.seconds));
        if self.recent.len() > SPEED_WINDOW {
            self.recent.pop_front();
        }
        let (tokens, seconds) = self
            .recent
            .iter()
            .fold((0, 0.0), |(tokens, seconds), step| (tokens + step.0, seconds + step.1));
        self.last.tokens_per_second = finite(tokens as f64 / seconds);
        self.speeds.push(figures.tokens as f64 / figures.seconds);
        let steps_left = self.last.total_steps.saturating_sub(state.step) as f64;
        let left = steps_left * seconds / self.recent.len() as f64;
        let allowed = self.max_seconds - state.training_seconds;
        self.last.eta_seconds = Some(left.min(allowed).max(0.0).round() as u64);
        self.tell();
        self.append_history();
    }

    /// Tells a validation loss.
    pub fn evaluated(&mut self, state: &TrainState) {
        self.take(state, self.last.epoch);
        self.tell();
        self.append_history();
    }

    /// Notes the last complete checkpoint; the next line tells it.
    pub fn saved(&mut self, saved: Saved) {
        self.last.checkpoint_step = Some(saved.step);
        self.last.checkpoint_stall_seconds = Some(saved.stall_seconds);
        self.last.checkpoint_write_seconds = Some(saved.write_seconds);
    }

    /// Notes what training came to.
    pub fn finished(&mut self, state: &TrainState) {
        self.state = state.clone();
    }

    /// Returns the last snapshot.
    pub fn last(&self) -> &Progress {
        &self.last
    }

    /// Returns what the run has come to.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// Returns the median speed of this process's steps, in positions per second.
    pub fn median_speed(&self) -> Option<f64> {
        let mut speeds = self.speeds.clone();
        speeds.sort_by(f64::total_cmp);
        speeds.get(speeds.len() / 2).copied()
    }

    /// Returns the bytes this rank sent in its last step.
    pub fn sent_bytes(&self) -> Option<u64> {
        self.sent_bytes
    }

    /// Returns the most memory so far, of the process or of its GPU, in bytes.
    pub fn peak_memory(&self) -> u64 {
        self.memory.bytes()
    }

    /// Returns the seconds since the start.
    pub fn elapsed_seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn take(&mut self, state: &TrainState, epoch: f64) {
        self.last.step = state.step;
        self.last.tokens_seen = state.tokens_seen;
        self.last.loss = state.last_loss;
        self.last.epoch = epoch;
        self.last.eval_loss = state.last_eval.map(|eval| eval.loss).or(state.base_eval_loss);
        self.state = state.clone();
    }

    fn tell(&mut self) {
        self.last.peak_memory_bytes = self.memory.bytes();
        (self.line)(&render(&self.last));
    }

    /// Adds the last snapshot to the history. The history is a convenience: a full disk must not
    /// end a run that could still be published.
    fn append_history(&self) {
        let path = &self.history;
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let _ = file.and_then(|mut file| writeln!(file, "{}", render(&self.last)));
    }

    fn cut_history(&self, step: u64) {
        let path = &self.history;
        let kept: String = std::fs::read_to_string(path)
            .unwrap_or_default()
            .lines()
            .filter(|line| parse::<Progress>(line).is_ok_and(|progress| progress.step <= step))
            .flat_map(|line| [line, "\n"])
            .collect();
        let _ = std::fs::write(path, if step == 0 { String::new() } else { kept });
    }
}

/// JSON has no infinity.
fn finite(number: f64) -> Option<f64> {
    number.is_finite().then_some(number)
}
