//! The training loop: accumulate, normalise, clip, step, record, evaluate, save, and stop on
//! request.

use std::sync::atomic::{AtomicBool, Ordering};

use finetune_contract::{FailureReason, RunConfig, Stage, StoppedEarly};
use tracing::info;

use crate::{
    checkpoint::{Checkpoints, Evaluation, TrainState},
    data::{
        dataset::Dataset,
        sequences::{Batch, Sequences},
    },
    distributed,
    failure::Failure,
    layers::dropout::Dropout,
    metrics::recorder::{Recorder, StepFigures},
    model::Model,
    objective::{LossSums, Objective},
    optim::{self, AdamW, Clipped},
    runtime::{clock, rng::RngKey},
};

/// A micro-batch of this share of the largest one needs nearly the same memory.
const NEARLY_LARGEST: f64 = 0.95;

/// The training loop and its state.
pub struct TrainLoop<'a> {
    /// The configuration of the run.
    pub config: &'a RunConfig,
    /// The model with its trained parameters.
    pub model: Model,
    /// What is minimized.
    pub objective: &'a dyn Objective,
    /// The optimizer.
    pub optimizer: AdamW,
    /// The training rows.
    pub train: DataSplit,
    /// The validation rows, if there are any.
    pub validation: Option<DataSplit>,
    /// The checkpoints of the run.
    pub checkpoints: Checkpoints,
    /// The progress of the run.
    pub state: TrainState,
}

/// The rows of a split, and their sequences.
pub struct DataSplit {
    /// The rows.
    pub dataset: Dataset,
    /// The sequences that the rows are packed into.
    pub sequences: Sequences,
}

/// How the training loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainOutcome {
    /// All steps are done, or it stopped early.
    Complete,
    /// It was asked to stop, and saved a checkpoint.
    Interrupted,
}

impl TrainLoop<'_> {
    /// Runs the remaining steps.
    ///
    /// # Errors
    /// A [`Failure`] if the loss is no longer finite, a checkpoint cannot be saved, or another rank
    /// is lost.
    pub fn run(
        &mut self,
        stop: &AtomicBool,
        recorder: &mut Recorder,
    ) -> Result<TrainOutcome, Failure> {
        let settings = &self.config.training;
        if self.state.step == 0 && self.state.base_eval_loss.is_none() {
            self.state.base_eval_loss = self.evaluate(recorder)?;
            recorder.record_evaluation(&self.state);
        }
        let mut sample_order = SampleOrder::new(settings.seed);
        if !self.is_over() {
            self.probe_peak_memory(&mut sample_order)?;
        }
        let mut since = clock::now();
        while !self.is_over() {
            let figures = self.step(&mut sample_order)?;
            self.state.training_seconds += since.elapsed().as_secs_f64();
            since = clock::now();
            recorder.record_step(&self.state, self.epoch(), &figures);
            if self.state.step < settings.total_steps && self.is_out_of_time()? {
                info!(step = self.state.step, "stopping early: training.maxTimeSeconds is reached");
                self.state.stopped_early = Some(StoppedEarly::Time);
            }
            let is_evaluation_due =
                self.is_over() || is_due(self.state.step, settings.evaluation_steps);
            let is_best = is_evaluation_due && self.evaluate_and_compare(recorder)?;
            if !self.is_over() && self.is_out_of_patience() {
                let evaluations = self.state.evaluations_since_best;
                let step = self.state.step;
                info!(step, evaluations, "stopping early: the validation loss no longer falls");
                self.state.stopped_early = Some(StoppedEarly::Patience);
            }
            self.checkpoints.poll()?;
            // One rank is asked to stop, rank 0 knows the cost of a checkpoint, and each rank knows
            // whether its shard is written. All must act alike after the same step, so they share
            // it.
            let ranks = self.model.ranks();
            let is_save_due =
                ranks.is_first() && self.checkpoints.is_due(self.state.step, figures.seconds);
            let flags =
                [stop.load(Ordering::Relaxed), is_save_due, self.checkpoints.has_written_shard()];
            let [stops, saves_due, written] =
                ranks.sum(flags.map(|flag| f64::from(u8::from(flag))))?;
            let (is_stopped, is_save_due) = (stops > 0.0, saves_due > 0.0);
            if written >= f64::from(ranks.world_size()) {
                self.checkpoints.complete_shards()?;
            }
            let is_save_due = is_save_due && !self.checkpoints.is_waiting_for_shards();
            if self.is_over() || is_stopped || is_best || is_save_due {
                self.checkpoints.save(&self.state, &self.model, &self.optimizer)?;
            }
            self.record_checkpoint(recorder);
            if is_stopped && !self.is_over() {
                self.checkpoints.flush()?;
                self.record_checkpoint(recorder);
                return Ok(TrainOutcome::Interrupted);
            }
        }
        self.checkpoints.flush()?;
        self.record_checkpoint(recorder);
        recorder.record_final_state(&self.state);
        Ok(TrainOutcome::Complete)
    }

    /// Reports whether no step is left.
    fn is_over(&self) -> bool {
        self.state.step >= self.config.training.total_steps || self.state.stopped_early.is_some()
    }

    /// Reports whether any rank has reached `maxTimeSeconds`.
    fn is_out_of_time(&self) -> Result<bool, distributed::Error> {
        let Some(limit) = self.config.training.max_time_seconds else { return Ok(false) };
        self.model.ranks().any(self.state.training_seconds >= limit as f64)
    }

    /// Reports whether too many evaluations have passed without a better one.
    fn is_out_of_patience(&self) -> bool {
        let patience = self.config.training.early_stopping_patience;
        patience > 0 && self.state.evaluations_since_best >= patience
    }

    fn record_checkpoint(&self, recorder: &mut Recorder) {
        if let Some(saved) = self.checkpoints.saved() {
            recorder.record_checkpoint(saved);
        }
    }

    /// Computes the mean validation loss, distributed over ranks; `None` without a validation set.
    ///
    /// # Errors
    /// [`distributed::Error`] if another rank is lost.
    pub fn evaluate(&self, recorder: &mut Recorder) -> Result<Option<f64>, distributed::Error> {
        let Some(DataSplit { dataset, sequences }) = &self.validation else { return Ok(None) };
        recorder.record_stage(Stage::Evaluating);
        let ranks = self.model.ranks();
        let all: Vec<usize> = (0..sequences.len()).collect();
        let batches: Vec<_> = all.chunks(self.config.training.micro_batch_size as usize).collect();
        let mut sums = LossSums::default();
        for round in batches.chunks(ranks.world_size() as usize) {
            if let Some(own) = round.get(ranks.rank() as usize) {
                sums += self.model.loss(&sequences.batch(dataset, own), self.objective);
            } else if self.model.sharded().is_some() {
                // The other ranks need this rank's shards of the weights, so it runs the same
                // forward pass and discards the result.
                let _ = self.model.loss(&sequences.batch(dataset, round[0]), self.objective);
            }
        }
        let [loss, targets] = ranks.sum([sums.loss, sums.targets as f64])?;
        Ok(Some(loss / targets))
    }

    /// Returns the number of passes over the training data.
    fn epoch(&self) -> f64 {
        let sequences = self.state.step * self.config.global_batch_size();
        let sequences = self.config.training.total_sequences.map_or(sequences, |total| {
            let has_steps_left = self.state.step < self.config.training.total_steps;
            if has_steps_left { sequences } else { sequences.min(total) }
        });
        sequences as f64 / self.train.sequences.len() as f64
    }

    /// Computes the largest possible micro-batch and discards the result, unless the first step has
    /// one that is nearly as large: running out of memory then shows at once instead of hours
    /// later.
    ///
    /// Packed sequences have nearly equal lengths, so they need no extra micro-batch; otherwise it
    /// costs one per process.
    fn probe_peak_memory(&self, sample_order: &mut SampleOrder) -> Result<(), distributed::Error> {
        let settings = &self.config.training;
        let DataSplit { dataset, sequences } = &self.train;
        let largest = sequences.largest(dataset, settings.micro_batch_size as usize);
        let largest = sequences.batch(dataset, &largest);
        let first = (0..self.micro_batches(self.state.step))
            .map(|micro| self.micro_batch(sample_order, self.state.step, micro));
        let first = first.map(|batch| batch.tokens.len()).max().unwrap_or(0);
        if (first as f64) < NEARLY_LARGEST * largest.tokens.len() as f64 {
            let dropout = self.dropout(self.state.step);
            self.model.accumulate_gradients(
                &largest,
                self.objective,
                settings.recompute,
                dropout.as_ref(),
            );
            // This zeroes the gradient buffers of sharded parameters; the step zeroes all others.
            self.model.reduce_gradients()?;
        }
        Ok(())
    }

    /// Does one optimizer step.
    fn step(&mut self, sample_order: &mut SampleOrder) -> Result<StepFigures, Failure> {
        let started = clock::now();
        let settings = &self.config.training;
        let step = self.state.step;
        let (mut sums, mut tokens) = (LossSums::default(), 0);
        let sent_before = self.model.ranks().sent_bytes();
        self.model.trained().zero_grad();
        let ranks = self.model.ranks().clone();
        let world_size = u64::from(ranks.world_size());
        let dropout = self.dropout(step);
        let (mut tokens_before, mut targets_before) = (0, 0);
        let micro_batches = self.micro_batches(step);
        for micro in 0..micro_batches {
            let is_own = micro % world_size == u64::from(ranks.rank());
            // Of other ranks' micro-batches only the sizes matter, and only to dropout.
            if !is_own && dropout.is_none() {
                continue;
            }
            let batch = self.micro_batch(sample_order, step, micro);
            let (batch_tokens, batch_targets) =
                (batch.tokens.len() as u64, batch.labels.len() as u64);
            // Micro-batches are distributed round-robin: neither their number nor the rank that
            // computes one changes its rows or dropout masks.
            if is_own {
                let dropout =
                    dropout.map(|dropout| dropout.at_offset(tokens_before, targets_before));
                if micro + world_size >= micro_batches {
                    self.model.mark_last_backward();
                }
                sums += self.model.accumulate_gradients(
                    &batch,
                    self.objective,
                    settings.recompute,
                    dropout.as_ref(),
                );
                tokens += batch_tokens;
            }
            tokens_before += batch_tokens;
            targets_before += batch_targets;
        }
        self.model.reduce_gradients()?;
        let [loss, all_targets, all_tokens] =
            ranks.sum([sums.loss, sums.targets as f64, tokens as f64])?;
        let (targets, tokens) = (all_targets as u64, all_tokens as u64);
        let loss = loss / all_targets;
        let square = self.model.gradient_square()?;
        let Clipped { norm: grad_norm, scale } =
            optim::clip(square, targets, settings.max_grad_norm);
        let learning_rate = optim::learning_rate(settings, step);
        if !loss.is_finite() || !grad_norm.is_finite() {
            let message = format!(
                "step {} has loss {loss} and gradient norm {grad_norm}: the run diverged. Lower training.learningRate \
                 (now {}), add warm-up steps, or set training.dtype to fp32",
                step + 1,
                settings.learning_rate,
            );
            // The user may want to start from the last good step.
            self.checkpoints.flush()?;
            return Err(Failure::new(FailureReason::Diverged, message));
        }
        self.optimizer.step(self.model.trained_mut(), scale, learning_rate, step + 1);
        self.state.step += 1;
        self.state.tokens_seen += tokens;
        self.state.first_loss.get_or_insert(loss);
        self.state.last_loss = Some(loss);
        Ok(StepFigures {
            loss,
            learning_rate,
            grad_norm,
            tokens,
            seconds: started.elapsed().as_secs_f64(),
            sent_bytes: ranks.sent_bytes() - sent_before,
        })
    }

    /// Evaluates, and reports whether the weights are the best so far and must be saved.
    fn evaluate_and_compare(&mut self, recorder: &mut Recorder) -> Result<bool, Failure> {
        let Some(loss) = self.evaluate(recorder)? else { return Ok(false) };
        let evaluated = Evaluation { step: self.state.step, loss };
        self.state.last_eval = Some(evaluated);
        let is_best = self.state.best.is_none_or(|best| loss < best.loss);
        if is_best {
            self.state.best = Some(evaluated);
            self.state.evaluations_since_best = 0;
        } else {
            self.state.evaluations_since_best += 1;
        }
        recorder.record_evaluation(&self.state);
        Ok(is_best)
    }

    /// Returns the micro-batches of a step over all ranks, the same number on each.
    fn micro_batches(&self, step: u64) -> u64 {
        let world_size = u64::from(self.config.parallelism.world_size);
        let sequences_per_round = u64::from(self.config.training.micro_batch_size) * world_size;
        self.config.sequences_of_step(step).div_ceil(sequences_per_round) * world_size
    }

    fn micro_batch(&self, sample_order: &mut SampleOrder, step: u64, micro: u64) -> Batch {
        let start = step * self.config.global_batch_size();
        // All micro-batches have the same size, except in a short last step, whose sequences are
        // distributed evenly.
        let (sequences_of_step, micro_batches) =
            (self.config.sequences_of_step(step), self.micro_batches(step));
        let first = |micro: u64| start + sequences_of_step * micro / micro_batches;
        let DataSplit { dataset, sequences } = &self.train;
        let chosen: Vec<usize> = (first(micro)..first(micro + 1))
            .map(|index| sample_order.get(sequences, index))
            .collect();
        sequences.batch(dataset, &chosen)
    }

    fn dropout(&self, step: u64) -> Option<Dropout> {
        let probability = self.config.lora.as_ref()?.lora_dropout;
        let key = RngKey::from_seed(self.config.training.seed).fold_in_name("dropout");
        Dropout::new(probability, key.fold_in(step))
    }
}

fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// The infinite stream of training sequences: one epoch after another, each in its own order.
pub struct SampleOrder {
    seed: u64,
    epoch: Option<(u64, Vec<usize>)>,
}

impl SampleOrder {
    /// Creates the stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, epoch: None }
    }

    /// Returns the `index`-th sequence of the stream.
    pub fn get(&mut self, sequences: &Sequences, index: u64) -> usize {
        let length = sequences.len() as u64;
        let epoch = index / length;
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, sequences.epoch_order(self.seed, epoch)));
        }
        let (_, order) = self.epoch.as_ref().expect("the epoch was just set");
        order[(index % length) as usize]
    }
}
