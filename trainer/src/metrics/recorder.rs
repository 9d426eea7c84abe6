//! Records the progress of a run and passes each update to the sinks.

use std::{collections::VecDeque, time::Instant};

use finetune_contract::{CONTRACT_VERSION, Progress, RunConfig, Stage};

use crate::{
    checkpoint::{Saved, TrainState},
    metrics::sink::Sink,
    runtime::{device, memory::PeakMemory},
};

/// The number of steps over which the speed is averaged.
const SPEED_WINDOW: usize = 10;

/// Measurements of one optimizer step.
#[derive(Debug, Clone, Copy)]
pub struct StepFigures {
    /// Mean loss per target token.
    pub loss: f64,
    /// The learning rate of the step.
    pub learning_rate: f64,
    /// The 2-norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens processed.
    pub tokens: u64,
    /// The duration of the step in seconds.
    pub seconds: f64,
    /// Bytes that this rank sent to other ranks.
    pub sent_bytes: u64,
}

/// Records the progress of a run and passes each update to the sinks.
pub struct Recorder {
    sinks: Vec<Box<dyn Sink>>,
    last: Progress,
    state: TrainState,
    recent: VecDeque<(u64, f64)>,
    speeds: Vec<f64>,
    sent_bytes: Option<u64>,
    skipped_rows: u64,
    memory: PeakMemory,
    /// The time limit of training in seconds, over all attempts.
    max_seconds: f64,
    started: Instant,
}

impl Recorder {
    /// Creates a recorder that passes each update to `sinks`, one after the other.
    pub fn new(config: &RunConfig, sinks: Vec<Box<dyn Sink>>) -> Self {
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
            sinks,
            last,
            state: TrainState::default(),
            recent: VecDeque::new(),
            speeds: Vec::new(),
            sent_bytes: None,
            skipped_rows: 0,
            memory: PeakMemory::watch(device::of(config.device)),
            max_seconds: config
                .training
                .max_time_seconds
                .map_or(f64::INFINITY, |seconds| seconds as f64),
            started: crate::runtime::clock::now(),
        }
    }

    /// Records that another stage began.
    pub fn record_stage(&mut self, stage: Stage) {
        self.last.stage = stage;
        self.last.peak_memory_bytes = self.memory.bytes();
        for sink in &mut self.sinks {
            sink.record_stage(&self.last);
        }
    }

    /// Records how many training rows could not be used.
    pub fn record_skipped_rows(&mut self, rows: u64) {
        self.skipped_rows = rows;
    }

    /// Returns how many training rows could not be used; `None` if all could.
    pub fn skipped_rows(&self) -> Option<u64> {
        Some(self.skipped_rows).filter(|&rows| rows > 0)
    }

    /// Continues from the state of a checkpoint; sinks discard what was recorded after its step.
    pub fn resume(&mut self, state: &TrainState) {
        self.last.resumed_from_step = (state.step > 0).then_some(state.step);
        self.last.checkpoint_step = self.last.resumed_from_step;
        self.update(state, 0.0);
        for sink in &mut self.sinks {
            sink.resume(state.step);
        }
    }

    /// Records that a result of the same inputs was already published, with the weights of `step`.
    pub fn record_earlier_result(&mut self, step: u64) {
        self.last.step = step;
        self.last.resumed_from_step = Some(step);
    }

    /// Records a finished step.
    pub fn record_step(&mut self, state: &TrainState, epoch: f64, figures: &StepFigures) {
        self.update(state, epoch);
        self.last.stage = Stage::Training;
        self.last.learning_rate = Some(figures.learning_rate);
        self.last.grad_norm = finite(figures.grad_norm);
        // A step after an evaluation sends less, because the weights are already gathered.
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
        self.record_metrics();
    }

    /// Records a validation loss.
    pub fn record_evaluation(&mut self, state: &TrainState) {
        self.update(state, self.last.epoch);
        self.record_metrics();
    }

    /// Records the last complete checkpoint; the next update contains it.
    pub fn record_checkpoint(&mut self, saved: Saved) {
        self.last.checkpoint_step = Some(saved.step);
        self.last.checkpoint_stall_seconds = Some(saved.stall_seconds);
        self.last.checkpoint_write_seconds = Some(saved.write_seconds);
    }

    /// Records the state at the end of training.
    pub fn record_final_state(&mut self, state: &TrainState) {
        self.state = state.clone();
    }

    /// Returns the latest progress.
    pub fn last(&self) -> &Progress {
        &self.last
    }

    /// Returns the latest training state.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// Returns the median speed of the steps of this process, in tokens per second.
    pub fn median_speed(&self) -> Option<f64> {
        let mut speeds = self.speeds.clone();
        speeds.sort_by(f64::total_cmp);
        speeds.get(speeds.len() / 2).copied()
    }

    /// Returns the most bytes that this rank sent in one step.
    pub fn sent_bytes(&self) -> Option<u64> {
        self.sent_bytes
    }

    /// Returns the peak memory of the process, or of its GPU if it has one, in bytes.
    pub fn peak_memory(&self) -> u64 {
        self.memory.bytes()
    }

    /// Returns the seconds since the start.
    pub fn elapsed_seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn update(&mut self, state: &TrainState, epoch: f64) {
        self.last.step = state.step;
        self.last.tokens_seen = state.tokens_seen;
        self.last.loss = state.last_loss;
        self.last.epoch = epoch;
        self.last.eval_loss = state.last_eval.map(|eval| eval.loss).or(state.base_eval_loss);
        self.state = state.clone();
    }

    fn record_metrics(&mut self) {
        self.last.peak_memory_bytes = self.memory.bytes();
        for sink in &mut self.sinks {
            sink.record_metrics(&self.last);
        }
    }
}

/// Returns `None` for infinities and NaN, which JSON cannot represent.
fn finite(number: f64) -> Option<f64> {
    number.is_finite().then_some(number)
}
