//! The whole decoder: loaded from a checkpoint, run forward, and backward block by block.

use std::path::Path;

use finetune_contract::{Dtype, Recompute, Strategy};
use tch::{Device, Kind, Tensor};

use crate::{
    architecture::{config::ModelConfig, names},
    data::sequences::Batch,
    distributed::{self, Ranks},
    failure::Failure,
    hf::weights::WeightFiles,
    layers::{
        dropout::Dropout,
        embedding::Embedding,
        linear::{Input, Projections},
        norm::RmsNorm,
        rope::{Frequencies, Rotary, frequencies},
    },
    lora::trainable::Trainable,
    model::{
        block::{Block, SavedActivations},
        load::{Loader, invalid_model},
        micro_batch::MicroBatch,
    },
    objective::{LossSums, Objective},
    ops,
    params::{
        buckets::{BUCKET_BYTES, GradientBuckets},
        flat::FlatParams,
        layout::{Layout, ROOT, Span, block_unit},
        zero::{ShardedParams, ZeroStage},
    },
    runtime::{
        allocator::{self, Workload},
        rng::RngKey,
        vml,
    },
};

/// A model and its trained parameters.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    trainable: Trainable,
    dtype: Dtype,
    device: Device,
    frequencies: Frequencies,
    embed_tokens: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    lm_head: Projections<1>,
    trained: FlatParams,
    /// The parameters that are sharded over ranks and gathered unit by unit.
    sharded: Option<ShardedParams>,
    /// The gradients that are all-reduced during the backward pass.
    buckets: Option<GradientBuckets>,
    ranks: Ranks,
}

/// The ranks that train a model, and what is sharded over them.
#[derive(Debug, Clone)]
pub struct DataParallel {
    /// The ranks that train it together.
    pub ranks: Ranks,
    /// What is sharded over them, besides the sequences.
    pub strategy: Strategy,
    /// The least bytes of gradients in one all-reduce during the backward pass.
    pub bucket_bytes: u64,
}

impl DataParallel {
    /// A single rank that holds everything.
    pub fn single_rank() -> Self {
        Self { ranks: Ranks::alone(), strategy: Strategy::None, bucket_bytes: BUCKET_BYTES }
    }
}

impl Model {
    /// Loads a model from a Hugging Face directory.
    ///
    /// Frozen weights already in `dtype` stay mapped; others are converted. Trained weights are
    /// copied to fp32 masters. Adapters are initialised as in PEFT from `seed`: `lora_A` random and
    /// `lora_B` zero, and the reverse on the embedding.
    ///
    /// # Errors
    /// A [`Failure`] if the config is refused or a tensor is missing, of another shape or dtype.
    pub fn load(
        directory: &Path,
        config: ModelConfig,
        trainable: Trainable,
        dtype: Dtype,
        device: Device,
        seed: RngKey,
    ) -> Result<Self, Failure> {
        Self::load_data_parallel(
            directory,
            config,
            trainable,
            dtype,
            device,
            seed,
            DataParallel::single_rank(),
        )
    }

    /// Loads one rank's part of a model that several ranks train; see [`Model::load`].
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_data_parallel(
        directory: &Path,
        config: ModelConfig,
        trainable: Trainable,
        dtype: Dtype,
        device: Device,
        seed: RngKey,
        data_parallel: DataParallel,
    ) -> Result<Self, Failure> {
        vml::resolve_kernels();
        let checkpoint = WeightFiles::open(directory).map_err(invalid_model)?;
        checkpoint.check_all_used(&config).map_err(invalid_model)?;
        let DataParallel { ranks, strategy, bucket_bytes } = data_parallel;
        let specs = trainable.trained_tensors(&config);
        let rank = [ranks.rank(), ranks.world_size()];
        let (trained, sharded) = match (&trainable, zero_stage(strategy)) {
            (Trainable::Full, Some(stage)) => {
                let layout = Layout::new(&specs, rank);
                let trained = FlatParams::sharded(&layout, dtype, device);
                let sharded = ShardedParams::trained(layout, ranks.clone(), stage, &trained);
                (trained, Some(sharded))
            }
            // Adapters are small and replicated; at stage 3 the frozen weights are sharded.
            (_, None | Some(ZeroStage::One | ZeroStage::Two)) => {
                (FlatParams::new(&specs, dtype, device), None)
            }
            (Trainable::Lora(_) | Trainable::Frozen, Some(ZeroStage::Three)) => {
                let mut frozen = config.tensors();
                frozen.retain(|spec| specs.iter().all(|trained| trained.name != spec.name));
                let layout = Layout::new(&frozen, rank);
                let sharded = ShardedParams::frozen(layout, ranks.clone(), kind_of(dtype), device);
                (FlatParams::new(&specs, dtype, device), Some(sharded))
            }
        };
        let loader = Loader {
            checkpoint: &checkpoint,
            config: &config,
            trainable: &trainable,
            trained: &trained,
            sharded: sharded.as_ref(),
            dtype,
            device,
            seed,
        };
        let embed_tokens = loader.embedding()?;
        let layers = config.num_hidden_layers;
        let blocks = (0..layers).map(|layer| loader.block(layer)).collect::<Result<_, _>>()?;
        let norm = loader.norm(names::NORM, config.hidden_size)?;
        let lm_head = loader.lm_head(&embed_tokens)?;
        let is_replicated = sharded.as_ref().is_none_or(|sharded| !sharded.is_trained());
        let buckets = is_replicated
            .then(|| GradientBuckets::new(&trained, layers, &ranks, bucket_bytes))
            .flatten();
        let mut model = Self {
            frequencies: frequencies(&config.rope, config.head_dim),
            config,
            trainable,
            dtype,
            device,
            embed_tokens,
            blocks,
            norm,
            lm_head,
            trained,
            sharded,
            buckets,
            ranks,
        };
        model.trained.refresh_compute();
        Ok(model)
    }

    /// Returns the architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns which parameters are trained.
    pub fn trainable(&self) -> &Trainable {
        &self.trainable
    }

    /// Returns the trained parameters.
    pub fn trained(&self) -> &FlatParams {
        &self.trained
    }

    /// Returns the trained parameters, to be updated or restored; call
    /// [`FlatParams::refresh_compute`] afterwards.
    pub fn trained_mut(&mut self) -> &mut FlatParams {
        if let Some(sharded) = &self.sharded {
            sharded.invalidate();
        }
        &mut self.trained
    }

    /// Returns the ranks that train the model together.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Returns the parameters that are sharded over ranks, if any are.
    pub fn sharded(&self) -> Option<&ShardedParams> {
        self.sharded.as_ref()
    }

    /// Returns the sharded parameters if they are the trained ones.
    pub fn sharded_training(&self) -> Option<&ShardedParams> {
        self.sharded.as_ref().filter(|sharded| sharded.is_trained())
    }

    /// Returns the number of trained parameters over all ranks.
    pub fn trained_parameters(&self) -> usize {
        self.sharded_training().map_or_else(
            || self.trained.master().numel(),
            |sharded| sharded.layout().unsharded_length(),
        )
    }

    /// Lists the elements of the unsharded flat tensor of trained parameters that this rank holds.
    pub fn trained_spans(&self) -> Vec<Span> {
        self.sharded_training().map_or_else(
            || vec![Span::all(self.trained.master().numel())],
            |sharded| sharded.layout().spans(),
        )
    }

    /// Returns the layout that the trained parameters would have on a rank of a world size.
    pub fn layout_of(&self, [rank, world_size]: [u32; 2]) -> Layout {
        Layout::new(&self.trainable.trained_tensors(&self.config), [rank, world_size])
    }

    /// Marks the next backward pass as this rank's last one of the step: its gradients may be
    /// reduced over ranks as soon as they are complete.
    pub fn mark_last_backward(&self) {
        if let Some(sharded) = &self.sharded {
            sharded.mark_last_backward();
        }
        if let Some(buckets) = &self.buckets {
            buckets.mark_last_backward();
        }
    }

    /// Completes the reduction of a step's gradients over all ranks; called after its last
    /// micro-batch.
    ///
    /// # Errors
    /// [`distributed::Error`] if another rank was lost, now or during the micro-batches.
    pub fn reduce_gradients(&self) -> Result<(), distributed::Error> {
        self.trained.zero_stale_gradients();
        match (self.sharded_training(), &self.buckets) {
            (Some(sharded), _) => sharded.finish_backward()?,
            (None, Some(buckets)) => buckets.finish_backward()?,
            (None, None) => self.ranks.all_reduce(self.trained.grad())?,
        }
        self.ranks.check()
    }

    /// Returns the squared norm of a step's gradient, summed over its shards.
    ///
    /// # Errors
    /// [`distributed::Error`] if another rank is lost.
    pub fn gradient_square(&self) -> Result<f64, distributed::Error> {
        let square = ops::sum_of_squares(self.trained.grad());
        if self.sharded_training().is_none() {
            return Ok(square);
        }
        let [square] = self.ranks.sum([square])?;
        Ok(square)
    }

    /// Returns the device of the model.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Returns the token embedding.
    pub fn embedding(&self) -> &Embedding {
        &self.embed_tokens
    }

    /// Returns the blocks, the first one first.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Returns the last norm and the output head.
    pub fn head(&self) -> (&RmsNorm, &Projections<1>) {
        (&self.norm, &self.lm_head)
    }

    /// Returns the rotary embedding of positions, in the compute dtype.
    pub fn rotary(&self, positions: &[i64]) -> Rotary {
        Rotary::new(&self.frequencies, positions, self.kind(), self.device)
    }

    /// Runs a micro-batch forward and backward: adds the gradients of its summed loss to the
    /// trained parameters, and returns its sums.
    ///
    /// # Shapes
    /// `T` is the number of tokens with padding, `N` the number of targets. Activations between
    /// blocks are `[T, D]` in the compute dtype; only the `N` positions that predict a target pass
    /// the last norm and the head, `[N, D]`. Gradients of parameters are fp32, in their shapes.
    pub fn accumulate_gradients(
        &self,
        batch: &Batch,
        objective: &dyn Objective,
        recompute: Recompute,
        dropout: Option<&Dropout>,
    ) -> LossSums {
        let micro_batch = MicroBatch::new(self, batch, dropout);
        allocator::start_workload(Workload::Train(micro_batch.size_class()));
        let context = micro_batch.block_context();
        let lowest = self.lowest_trained_block();
        self.gather(ROOT, None);
        let mut x = self.embed_tokens.forward(&micro_batch.tokens); // [T, D]
        let mut saved: Vec<Option<SavedActivations>> = Vec::with_capacity(self.blocks.len());
        for (index, block) in self.blocks.iter().enumerate() {
            self.gather(block_unit(index), self.block_above(index));
            let recompute = (index >= lowest).then_some(recompute);
            let (y, block_saved) = block.forward(x, &context, recompute);
            saved.push(block_saved);
            x = y; // [T, D]
        }
        let last = x.index_select(0, &micro_batch.target_positions); // [N, D]
        let (sums, d_normed) = objective.loss_and_gradient(
            &self.lm_head,
            &self.norm.forward(&last),
            &micro_batch.labels,
            dropout,
        ); // d_normed: [N, D]
        let d_last = self.norm.backward(&last, d_normed, None); // [N, D]
        let mut dx = x.zeros_like(); // [T, D]
        let _ = dx.index_copy_(0, &micro_batch.target_positions, &d_last);
        drop(x);
        for (index, (block, block_saved)) in self.blocks.iter().zip(saved).enumerate().rev() {
            let Some(block_saved) = block_saved else { break };
            let needs_input_grad = index > lowest || self.embed_tokens.is_trained();
            self.gather(block_unit(index), (index > lowest).then(|| block_unit(index - 1)));
            self.pre_backward(index);
            let block_dx = block.backward(block_saved, &dx, &context, needs_input_grad); // [T, D]
            self.post_backward(index);
            match block_dx {
                Some(block_dx) => dx = block_dx,
                None => break,
            }
        }
        if self.embed_tokens.is_trained() {
            self.embed_tokens.backward(&micro_batch.tokens, &dx);
        }
        sums
    }

    /// Computes the summed loss of a micro-batch, without dropout or gradients.
    pub fn loss(&self, batch: &Batch, objective: &dyn Objective) -> LossSums {
        let micro_batch = MicroBatch::new(self, batch, None);
        allocator::start_workload(Workload::Evaluate(micro_batch.size_class()));
        let hidden = self.hidden_states(&micro_batch); // [T, D]
        let last = hidden.index_select(0, &micro_batch.target_positions); // [N, D]
        objective.loss(&self.lm_head, &self.norm.forward(&last), &micro_batch.labels)
    }

    /// Computes the logits of one sequence, `[T, V]` in fp32.
    pub fn logits(&self, tokens: &[u32]) -> Tensor {
        let batch = Batch {
            tokens: tokens.iter().map(|&token| i64::from(token)).collect(),
            segment_lengths: vec![tokens.len()],
            target_positions: Vec::new(),
            labels: Vec::new(),
        };
        let hidden = self.hidden_states(&MicroBatch::new(self, &batch, None));
        let hidden = hidden.narrow(0, 0, tokens.len() as i64); // [T, D], without padding
        let input = Input::without_dropout(self.norm.forward(&hidden));
        let [logits] = self.lm_head.forward_only(&input); // [T, V]
        logits.to_kind(Kind::Float)
    }

    /// Computes the output of the last block, `[T, D]`.
    fn hidden_states(&self, micro_batch: &MicroBatch<'_>) -> Tensor {
        let context = micro_batch.block_context();
        self.gather(ROOT, None);
        let x = self.embed_tokens.forward(&micro_batch.tokens); // [T, D]
        self.blocks.iter().enumerate().fold(x, |x, (index, block)| {
            self.gather(block_unit(index), self.block_above(index));
            block.forward(x, &context, None).0
        })
    }

    /// Gathers a unit, and prefetches the next one while it is computed.
    fn gather(&self, unit: usize, next: Option<usize>) {
        let Some(sharded) = &self.sharded else { return };
        sharded.all_gather(unit);
        if let Some(next) = next {
            sharded.prefetch(next);
        }
    }

    fn block_above(&self, index: usize) -> Option<usize> {
        (index + 1 < self.blocks.len()).then(|| block_unit(index + 1))
    }

    // If either of the next two fails, [`Model::reduce_gradients`] returns the error.

    /// Prepares a block's gradient buffer for a backward pass.
    fn pre_backward(&self, index: usize) {
        if let Some(sharded) = &self.sharded {
            let _ = sharded.pre_backward(block_unit(index));
        }
    }

    /// Starts to reduce a block's gradients if a backward pass has completed them.
    fn post_backward(&self, index: usize) {
        if let Some(sharded) = &self.sharded {
            let _ = sharded.post_backward(block_unit(index));
        }
        if let Some(buckets) = &self.buckets {
            buckets.post_backward(index);
        }
    }

    /// Returns the first block that needs a backward pass.
    fn lowest_trained_block(&self) -> usize {
        if self.embed_tokens.is_trained() {
            return 0;
        }
        self.blocks.iter().position(Block::is_trained).unwrap_or(self.blocks.len())
    }

    pub(super) fn kind(&self) -> Kind {
        kind_of(self.dtype)
    }
}

/// Returns the tensor type of a dtype.
pub fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::Fp32 => Kind::Float,
    }
}

/// Returns the ZeRO stage of a strategy; `None` if it shards nothing.
const fn zero_stage(strategy: Strategy) -> Option<ZeroStage> {
    match strategy {
        Strategy::None | Strategy::Ddp => None,
        Strategy::Zero1 => Some(ZeroStage::One),
        Strategy::Zero2 => Some(ZeroStage::Two),
        Strategy::Zero3 => Some(ZeroStage::Three),
    }
}
