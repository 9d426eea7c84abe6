//! The loop: accumulate, normalise, clip, step, record, evaluate, save, and stop when told.

use std::sync::atomic::{AtomicBool, Ordering};

use finetune_contract::{FailureReason, RunConfig, Stage, StoppedEarly};
use tracing::info;

use crate::{
    checkpoint::{Checkpoints, Evaluated, TrainState},
    data::{
        dataset::Dataset,
        sequences::{Batch, Sequences},
    },
    distributed,
    failure::Failure,
    layers::dropout::Dropout,
    metrics::recorder::{Recorder, StepFigures},
    model::Model,
    optim::{self, AdamW, Clipped},
    runtime::{clock, rng::Counter},
};

/// The share of the largest micro-batch that is as good as it.
const NEARLY: f64 = 0.95;

/// What the loop works on.
pub struct Training<'a> {
    /// The run.
    pub config: &'a RunConfig,
    /// The model, with what is trained.
    pub model: Model,
    /// The optimizer.
    pub optimizer: AdamW,
    /// The rows trained on.
    pub train: DataSplit,
    /// The rows held out.
    pub validation: Option<DataSplit>,
    /// Where to save.
    pub checkpoints: Checkpoints,
    /// What the run has come to.
    pub state: TrainState,
}

/// Rows and how they are arranged in sequences.
pub struct DataSplit {
    /// The rows.
    pub dataset: Dataset,
    /// Their arrangement.
    pub sequences: Sequences,
}

/// How the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All steps are done, or no more are worth doing.
    Complete,
    /// It was told to stop, and saved a checkpoint.
    Interrupted,
}

impl Training<'_> {
    /// Runs the steps that are left.
    ///
    /// # Errors
    /// A [`Failure`] if the loss is no longer finite, a checkpoint cannot be saved, or another rank
    /// is lost.
    pub fn run(
        &mut self,
        stop: &AtomicBool,
        recorder: &mut Recorder<'_>,
    ) -> Result<Ended, Failure> {
        let settings = &self.config.training;
        if self.state.step == 0 && self.state.base_eval_loss.is_none() {
            self.state.base_eval_loss = self.evaluate(recorder)?;
            recorder.record_evaluation(&self.state);
        }
        let mut order = Order::new(settings.seed);
        if !self.is_over() {
            self.rehearse(&mut order)?;
        }
        let mut since = clock::now();
        while !self.is_over() {
            let figures = self.step(&mut order)?;
            self.state.training_seconds += since.elapsed().as_secs_f64();
            since = clock::now();
            recorder.record_step(&self.state, self.epoch(), &figures);
            if self.state.step < settings.total_steps && self.is_out_of_time()? {
                info!(step = self.state.step, "stopping early: its time is over");
                self.state.stopped_early = Some(StoppedEarly::Time);
            }
            let is_to_evaluate =
                self.is_over() || is_due(self.state.step, settings.evaluation_steps);
            let is_best = is_to_evaluate && self.evaluate_and_compare(recorder)?;
            if !self.is_over() && self.is_out_of_patience() {
                let evaluations = self.state.evaluations_since_best;
                let step = self.state.step;
                info!(step, evaluations, "stopping early: the validation loss no longer falls");
                self.state.stopped_early = Some(StoppedEarly::Patience);
            }
            self.checkpoints.look()?;
            // One rank is told to stop, rank 0 knows what a checkpoint costs, and each whether its part
            // of one is written; all must do the same after the same step.
            let ranks = self.model.ranks();
            let is_time =
                ranks.is_first() && self.checkpoints.is_due(self.state.step, figures.seconds);
            let said =
                [stop.load(Ordering::Relaxed), is_time, self.checkpoints.has_written_its_part()];
            let [stops, times, written] =
                ranks.sum(said.map(|is_so| f64::from(u8::from(is_so))))?;
            let (is_stopped, is_time) = (stops > 0.0, times > 0.0);
            if written >= f64::from(ranks.world_size()) {
                self.checkpoints.join_parts()?;
            }
            let is_time = is_time && !self.checkpoints.is_waiting_for_parts();
            if self.is_over() || is_stopped || is_best || is_time {
                self.checkpoints.save(&self.state, &self.model, &self.optimizer)?;
            }
            self.record_checkpoint(recorder);
            if is_stopped && !self.is_over() {
                self.checkpoints.settle()?;
                self.record_checkpoint(recorder);
                return Ok(Ended::Interrupted);
            }
        }
        self.checkpoints.settle()?;
        self.record_checkpoint(recorder);
        recorder.record_final_state(&self.state);
        Ok(Ended::Complete)
    }

    /// Tells whether no step is left.
    fn is_over(&self) -> bool {
        self.state.step >= self.config.training.total_steps || self.state.stopped_early.is_some()
    }

    /// Tells whether a rank has trained as long as the run may.
    fn is_out_of_time(&self) -> Result<bool, distributed::Error> {
        let Some(limit) = self.config.training.max_time_seconds else { return Ok(false) };
        self.model.ranks().any(self.state.training_seconds >= limit as f64)
    }

    /// Tells whether too many evaluations have brought nothing better.
    fn is_out_of_patience(&self) -> bool {
        let patience = self.config.training.early_stopping_patience;
        patience > 0 && self.state.evaluations_since_best >= patience
    }

    fn record_checkpoint(&self, recorder: &mut Recorder<'_>) {
        if let Some(saved) = self.checkpoints.saved() {
            recorder.record_checkpoint(saved);
        }
    }

    /// Computes the mean validation loss, each rank a share of it; `None` without a validation set.
    ///
    /// # Errors
    /// [`distributed::Error`] if another rank is lost.
    pub fn evaluate(&self, recorder: &mut Recorder<'_>) -> Result<Option<f64>, distributed::Error> {
        let Some(DataSplit { dataset, sequences }) = &self.validation else { return Ok(None) };
        recorder.record_stage(Stage::Evaluating);
        let ranks = self.model.ranks();
        let all: Vec<usize> = (0..sequences.len()).collect();
        let batches: Vec<_> = all.chunks(self.config.training.micro_batch_size as usize).collect();
        let (mut loss, mut targets) = (0.0, 0);
        for round in batches.chunks(ranks.world_size() as usize) {
            if let Some(own) = round.get(ranks.rank() as usize) {
                let batch = sequences.batch(dataset, own);
                loss += self.model.loss(&batch);
                targets += batch.labels.len();
            } else if self.model.sharded().is_some() {
                // The others need this rank's part of the weights: it goes the same way, for nothing.
                let _ = self.model.loss(&sequences.batch(dataset, round[0]));
            }
        }
        let [loss, targets] = ranks.sum([loss, targets as f64])?;
        Ok(Some(loss / targets))
    }

    /// Returns the passes over the data done.
    fn epoch(&self) -> f64 {
        let sequences = self.state.step * self.config.global_batch_size();
        let sequences = self.config.training.total_sequences.map_or(sequences, |total| {
            let is_whole = self.state.step < self.config.training.total_steps;
            if is_whole { sequences } else { sequences.min(total) }
        });
        sequences as f64 / self.train.sequences.len() as f64
    }

    /// Computes the largest micro-batch there can be, for nothing, if the first step has none nearly as
    /// large: too little memory shows at once and not hours later.
    ///
    /// Packed sequences are nearly equal, so for them it costs nothing; else a micro-batch a process.
    fn rehearse(&self, order: &mut Order) -> Result<(), distributed::Error> {
        let settings = &self.config.training;
        let DataSplit { dataset, sequences } = &self.train;
        let largest = sequences.largest(dataset, settings.micro_batch_size as usize);
        let largest = sequences.batch(dataset, &largest);
        let first = (0..self.micro_batches(self.state.step))
            .map(|micro| self.micro_batch(order, self.state.step, micro));
        let first = first.map(|batch| batch.tokens.len()).max().unwrap_or(0);
        if (first as f64) < NEARLY * largest.tokens.len() as f64 {
            let noise = self.dropout(self.state.step);
            self.model.accumulate_gradients(&largest, settings.recompute, noise.as_ref());
            // Rooms of gradients are emptied by this; the rest by the step.
            self.model.reduce_gradients()?;
        }
        Ok(())
    }

    /// Does one optimizer step.
    fn step(&mut self, order: &mut Order) -> Result<StepFigures, Failure> {
        let started = clock::now();
        let settings = &self.config.training;
        let step = self.state.step;
        let (mut loss, mut targets, mut tokens) = (0.0, 0, 0);
        let sent_before = self.model.ranks().sent_bytes();
        self.model.trained().forget_gradients();
        let ranks = self.model.ranks().clone();
        let world_size = u64::from(ranks.world_size());
        let noise = self.dropout(step);
        let (mut tokens_before, mut targets_before) = (0, 0);
        let micro_batches = self.micro_batches(step);
        for micro in 0..micro_batches {
            let is_own = micro % world_size == u64::from(ranks.rank());
            // Of the others' only the sizes matter, and only to noise.
            if !is_own && noise.is_none() {
                continue;
            }
            let batch = self.micro_batch(order, step, micro);
            let (batch_tokens, batch_targets) =
                (batch.tokens.len() as u64, batch.labels.len() as u64);
            // The step's micro-batches are dealt out like cards: neither how many there are nor which
            // rank computes one changes rows or noise.
            if is_own {
                let noise = noise.map(|noise| noise.after(tokens_before, targets_before));
                if micro + world_size >= micro_batches {
                    self.model.expect_last();
                }
                loss += self.model.accumulate_gradients(&batch, settings.recompute, noise.as_ref());
                targets += batch_targets;
                tokens += batch_tokens;
            }
            tokens_before += batch_tokens;
            targets_before += batch_targets;
        }
        self.model.reduce_gradients()?;
        let [loss, all_targets, all_tokens] = ranks.sum([loss, targets as f64, tokens as f64])?;
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
            // The last good step is what one may want to start from.
            self.checkpoints.settle()?;
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

    /// Evaluates, and tells whether the weights are the best so far, which must be kept.
    fn evaluate_and_compare(&mut self, recorder: &mut Recorder<'_>) -> Result<bool, Failure> {
        let Some(loss) = self.evaluate(recorder)? else { return Ok(false) };
        let evaluated = Evaluated { step: self.state.step, loss };
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
        let of_all_ranks = u64::from(self.config.training.micro_batch_size) * world_size;
        self.config.sequences_of_step(step).div_ceil(of_all_ranks) * world_size
    }

    fn micro_batch(&self, order: &mut Order, step: u64, micro: u64) -> Batch {
        let start = step * self.config.global_batch_size();
        // All of equal size but in a short last step, whose sequences are dealt out evenly.
        let (sequences_of_step, micro_batches) =
            (self.config.sequences_of_step(step), self.micro_batches(step));
        let until = |micro: u64| start + sequences_of_step * micro / micro_batches;
        let DataSplit { dataset, sequences } = &self.train;
        let chosen: Vec<usize> =
            (until(micro)..until(micro + 1)).map(|index| order.at(sequences, index)).collect();
        sequences.batch(dataset, &chosen)
    }

    fn dropout(&self, step: u64) -> Option<Dropout> {
        let probability = self.config.lora.as_ref()?.lora_dropout;
        let noise = Counter::from_seed(self.config.training.seed).fold_name("dropout");
        Dropout::new(probability, noise.fold(step))
    }
}

fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// The endless stream of sequences: epoch after epoch without gaps, each in an order of its own.
pub struct Order {
    seed: u64,
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// Makes the stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, epoch: None }
    }

    /// Returns the `index`-th sequence of the stream.
    pub fn at(&mut self, sequences: &Sequences, index: u64) -> usize {
        let length = sequences.len() as u64;
        let epoch = index / length;
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, sequences.epoch_order(self.seed, epoch)));
        }
        let (_, order) = self.epoch.as_ref().expect("it was just set");
        order[(index % length) as usize]
    }
}
