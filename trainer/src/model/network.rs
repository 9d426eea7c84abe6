//! The whole decoder: assembled from a checkpoint, run forward, and backward block by block.

use std::path::Path;

use finetune_contract::{Dtype, FailureReason, Recompute, Strategy};
use tch::{Device, Kind, Tensor};

use crate::{
    architecture::{config::ModelConfig, names},
    data::sequences::Batch,
    distributed::{self, Ranks},
    failure::Failure,
    hf::weights::{self, WeightFiles},
    layers::{
        attention::{Attention, Segments},
        dropout::Dropout,
        embedding::{Adapter, Embedding},
        linear::{Down, Input, Linear, Projections, Up},
        norm::RmsNorm,
        rope::{Frequencies, Rotary, frequencies},
    },
    lora::trainable::{Attachment, LoraAttachment, adapter_names},
    model::block::{Block, Kept, Surroundings},
    objective::causal_lm,
    ops,
    params::{
        buckets::{BUCKET_BYTES, Buckets},
        flat::{FlatParams, Param},
        layout::{Layout, OUTER, Span, unit_of_block},
        zero::{Sharded, ZeroStage},
    },
    runtime::{
        allocator::{self, Work},
        rng::Counter,
    },
};

/// Micro-batches whose positions round up to the same multiple of this want buffers of about the same
/// sizes.
const ALIKE: usize = 64;

/// A model with what is trained of it.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    attachment: Attachment,
    dtype: Dtype,
    device: Device,
    frequencies: Frequencies,
    embed_tokens: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    lm_head: Projections<1>,
    trained: FlatParams,
    /// What is divided over ranks and gathered unit by unit.
    sharded: Option<Sharded>,
    /// What is summed over ranks during the backward pass.
    buckets: Option<Buckets>,
    ranks: Ranks,
}

/// Over which ranks a model is divided, and how.
#[derive(Debug, Clone)]
pub struct Division {
    /// The ranks that train it together.
    pub ranks: Ranks,
    /// What is divided over them beside the sequences.
    pub strategy: Strategy,
    /// Bytes of gradients that are summed at once, at least, while more are computed.
    pub bucket_bytes: u64,
}

impl Division {
    /// One rank that has everything.
    pub fn none() -> Self {
        Self { ranks: Ranks::alone(), strategy: Strategy::None, bucket_bytes: BUCKET_BYTES }
    }
}

impl Model {
    /// Assembles a model from a Hugging Face directory.
    ///
    /// Frozen weights already in `dtype` stay mapped; others are converted. Trained weights are
    /// copied to fp32 masters; adapters start as PEFT starts them (`A` random, `B` zero; the other
    /// way round on the embedding), from `seed`.
    ///
    /// # Errors
    /// A [`Failure`] if the config is refused or a tensor is missing, of another shape or dtype.
    pub fn load(
        directory: &Path,
        config: ModelConfig,
        attachment: Attachment,
        dtype: Dtype,
        device: Device,
        seed: Counter,
    ) -> Result<Self, Failure> {
        Self::load_divided(directory, config, attachment, dtype, device, seed, Division::none())
    }

    /// Assembles one rank's share of a model, as [`Model::load`] does the whole.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_divided(
        directory: &Path,
        config: ModelConfig,
        attachment: Attachment,
        dtype: Dtype,
        device: Device,
        seed: Counter,
        division: Division,
    ) -> Result<Self, Failure> {
        let checkpoint = WeightFiles::open(directory).map_err(invalid_model)?;
        checkpoint.check_all_used(&config).map_err(invalid_model)?;
        let Division { ranks, strategy, bucket_bytes } = division;
        let specs = attachment.trained(&config);
        let place = [ranks.rank(), ranks.world_size()];
        let (trained, sharded) = match (&attachment, stage(strategy)) {
            (Attachment::Full, Some(stage)) => {
                let layout = Layout::new(&specs, place);
                let trained = FlatParams::parts(&layout, dtype, device);
                let sharded = Sharded::trained(layout, ranks.clone(), stage, &trained);
                (trained, Some(sharded))
            }
            // Adapters are small and whole everywhere; what they adapt is divided at stage 3.
            (_, None | Some(ZeroStage::One | ZeroStage::Two)) => {
                (FlatParams::new(&specs, dtype, device), None)
            }
            (Attachment::Lora(_) | Attachment::Frozen, Some(ZeroStage::Three)) => {
                let mut frozen = config.tensors();
                frozen.retain(|spec| specs.iter().all(|trained| trained.name != spec.name));
                let layout = Layout::new(&frozen, place);
                let sharded = Sharded::frozen(layout, ranks.clone(), kind_of(dtype), device);
                (FlatParams::new(&specs, dtype, device), Some(sharded))
            }
        };
        let parts = Parts {
            checkpoint: &checkpoint,
            config: &config,
            attachment: &attachment,
            trained: &trained,
            sharded: sharded.as_ref(),
            dtype,
            device,
            seed,
        };
        let embed_tokens = parts.embedding()?;
        let layers = config.num_hidden_layers;
        let blocks = (0..layers).map(|layer| parts.block(layer)).collect::<Result<_, _>>()?;
        let norm = parts.norm(names::NORM, config.hidden_size)?;
        let lm_head = parts.lm_head(&embed_tokens)?;
        let is_whole = sharded.as_ref().is_none_or(|sharded| !sharded.is_trained());
        let buckets =
            is_whole.then(|| Buckets::new(&trained, layers, &ranks, bucket_bytes)).flatten();
        let mut model = Self {
            frequencies: frequencies(&config.rope, config.head_dim),
            config,
            attachment,
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

    /// Returns the model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns what is trained.
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }

    /// Returns the trained parameters.
    pub fn trained(&self) -> &FlatParams {
        &self.trained
    }

    /// Returns the trained parameters, to be stepped or restored; call
    /// [`FlatParams::refresh_compute`] afterwards.
    pub fn trained_mut(&mut self) -> &mut FlatParams {
        if let Some(sharded) = &self.sharded {
            sharded.forget();
        }
        &mut self.trained
    }

    /// Returns the ranks that train the model together.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Returns what is divided over ranks, if anything is.
    pub fn sharded(&self) -> Option<&Sharded> {
        self.sharded.as_ref()
    }

    /// Returns the parameters that are trained and divided over ranks, if they are.
    pub fn sharded_training(&self) -> Option<&Sharded> {
        self.sharded.as_ref().filter(|sharded| sharded.is_trained())
    }

    /// Returns how many parameters are trained, on all ranks together.
    pub fn trained_parameters(&self) -> usize {
        self.sharded_training().map_or_else(
            || self.trained.master().numel(),
            |sharded| sharded.layout().undivided_length(),
        )
    }

    /// Lists which elements of all that is trained, undivided, this rank has in its flat tensors.
    pub fn trained_spans(&self) -> Vec<Span> {
        self.sharded_training().map_or_else(
            || vec![Span::all(self.trained.master().numel())],
            |sharded| sharded.layout().spans(),
        )
    }

    /// Returns how what is trained would be divided.
    pub fn layout_of(&self, [rank, world_size]: [u32; 2]) -> Layout {
        Layout::new(&self.attachment.trained(&self.config), [rank, world_size])
    }

    /// Says that the next micro-batch is this rank's last one of the step: what it finishes may be
    /// summed over ranks at once.
    pub fn expect_last(&self) {
        if let Some(sharded) = &self.sharded {
            sharded.expect_last();
        }
        if let Some(buckets) = &self.buckets {
            buckets.open();
        }
    }

    /// Sums the gradients of a step over all ranks, once after its last micro-batch.
    ///
    /// # Errors
    /// [`distributed::Error`] if another rank was lost, now or during the micro-batches.
    pub fn reduce_gradients(&self) -> Result<(), distributed::Error> {
        self.trained.settle_gradients();
        match (self.sharded_training(), &self.buckets) {
            (Some(sharded), _) => sharded.finish_gradients()?,
            (None, Some(buckets)) => buckets.finish()?,
            (None, None) => self.ranks.all_reduce(self.trained.grad())?,
        }
        self.ranks.check()
    }

    /// Sums the squares of a step's gradient, over all ranks that have parts of it.
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

    /// Returns the device computed on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Returns the value a parameter is computed with, by checkpoint name, trained or not.
    pub fn embedding(&self) -> &Embedding {
        &self.embed_tokens
    }

    /// Returns the blocks, bottom up.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Returns the last norm and the output head.
    pub fn head(&self) -> (&RmsNorm, &Projections<1>) {
        (&self.norm, &self.lm_head)
    }

    /// Returns the angles of positions, in the computation's dtype.
    pub fn rotary(&self, positions: &[i64]) -> Rotary {
        Rotary::new(&self.frequencies, positions, self.kind(), self.device)
    }

    /// Adds the gradients of a micro-batch's summed loss and returns that sum.
    pub fn accumulate_gradients(
        &self,
        batch: &Batch,
        recompute: Recompute,
        dropout: Option<&Dropout>,
    ) -> f64 {
        let flow = Flow::new(self, batch, dropout);
        allocator::begin(Work::Train(flow.about()));
        let around = flow.surroundings();
        let lowest = self.lowest_trained_block();
        self.gather(OUTER, None);
        let mut x = self.embed_tokens.forward(&flow.tokens); // [T, D]
        let mut kept: Vec<Option<Kept>> = Vec::with_capacity(self.blocks.len());
        for (index, block) in self.blocks.iter().enumerate() {
            self.gather(unit_of_block(index), self.block_above(index));
            let recompute = (index >= lowest).then_some(recompute);
            let (y, block_kept) = block.forward(x, &around, recompute);
            kept.push(block_kept);
            x = y;
        }
        let rows = x.index_select(0, &flow.predicting); // [N, D]
        let (loss, d_normed) = causal_lm::loss_and_gradient(
            &self.lm_head,
            &self.norm.forward(&rows),
            &flow.labels,
            dropout,
        );
        let d_rows = self.norm.backward(&rows, d_normed, None);
        let mut dx = x.zeros_like();
        let _ = dx.index_copy_(0, &flow.predicting, &d_rows);
        drop(x);
        for (index, (block, block_kept)) in self.blocks.iter().zip(kept).enumerate().rev() {
            let Some(block_kept) = block_kept else { break };
            let wants_input_grad = index > lowest || self.embed_tokens.is_trained();
            self.gather(unit_of_block(index), (index > lowest).then(|| unit_of_block(index - 1)));
            self.begin_gradients(index);
            let below = block.backward(block_kept, &dx, &around, wants_input_grad);
            self.finished(index);
            match below {
                Some(below) => dx = below,
                None => break,
            }
        }
        if self.embed_tokens.is_trained() {
            self.embed_tokens.backward(&flow.tokens, &dx);
        }
        loss
    }

    /// Computes the summed loss of a micro-batch, without noise and gradients.
    pub fn loss(&self, batch: &Batch) -> f64 {
        let flow = Flow::new(self, batch, None);
        allocator::begin(Work::Evaluate(flow.about()));
        let rows = self.hidden(&flow).index_select(0, &flow.predicting);
        causal_lm::loss(&self.lm_head, &self.norm.forward(&rows), &flow.labels)
    }

    /// Computes the logits of one sequence, `[T, V]` in fp32.
    pub fn logits(&self, tokens: &[u32]) -> Tensor {
        let batch = Batch {
            tokens: tokens.iter().map(|&token| i64::from(token)).collect(),
            segment_lengths: vec![tokens.len()],
            predicting: Vec::new(),
            labels: Vec::new(),
        };
        let hidden = self.hidden(&Flow::new(self, &batch, None)).narrow(0, 0, tokens.len() as i64);
        let [logits] = self.lm_head.apply(&Input::plain(self.norm.forward(&hidden)));
        logits.to_kind(Kind::Float)
    }

    fn hidden(&self, flow: &Flow<'_>) -> Tensor {
        let around = flow.surroundings();
        self.gather(OUTER, None);
        let x = self.embed_tokens.forward(&flow.tokens);
        self.blocks.iter().enumerate().fold(x, |x, (index, block)| {
            self.gather(unit_of_block(index), self.block_above(index));
            block.forward(x, &around, None).0
        })
    }

    /// Makes a unit whole, and lets the next one come meanwhile.
    fn gather(&self, unit: usize, next: Option<usize>) {
        let Some(sharded) = &self.sharded else { return };
        sharded.hold(unit);
        if let Some(next) = next {
            sharded.prefetch(next);
        }
    }

    fn block_above(&self, index: usize) -> Option<usize> {
        (index + 1 < self.blocks.len()).then(|| unit_of_block(index + 1))
    }

    // If either of these fails, [`Model::reduce_gradients`] says so.

    fn begin_gradients(&self, index: usize) {
        if let Some(sharded) = &self.sharded {
            let _ = sharded.begin_gradients(unit_of_block(index));
        }
    }

    /// Says that a micro-batch has added all it adds to a block's gradients.
    fn finished(&self, index: usize) {
        if let Some(sharded) = &self.sharded {
            let _ = sharded.finished(unit_of_block(index));
        }
        if let Some(buckets) = &self.buckets {
            buckets.finished(index);
        }
    }

    /// Returns the first block whose backward pass anything needs.
    fn lowest_trained_block(&self) -> usize {
        if self.embed_tokens.is_trained() {
            return 0;
        }
        self.blocks.iter().position(Block::is_trained).unwrap_or(self.blocks.len())
    }

    fn kind(&self) -> Kind {
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

/// Returns what stays whole where state is divided; `None` where it is not.
const fn stage(strategy: Strategy) -> Option<ZeroStage> {
    match strategy {
        Strategy::None | Strategy::Ddp => None,
        Strategy::Zero1 => Some(ZeroStage::One),
        Strategy::Zero2 => Some(ZeroStage::Two),
        Strategy::Zero3 => Some(ZeroStage::Three),
    }
}

/// A micro-batch as tensors.
struct Flow<'a> {
    tokens: Tensor,
    predicting: Tensor,
    labels: Tensor,
    rotary: Rotary,
    segments: Segments,
    dropout: Option<&'a Dropout>,
}

impl<'a> Flow<'a> {
    fn new(model: &Model, batch: &Batch, dropout: Option<&'a Dropout>) -> Self {
        let on_device = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(model.device);
        // The filling is a segment of its own that predicts nothing: no other position sees it, and
        // its gradients are zero.
        let length = batch.tokens.len();
        let filling = ops::whole_positions(length, model.kind(), model.device) - length;
        let mut tokens = batch.tokens.clone();
        tokens.resize(length + filling, 0);
        let mut segment_lengths = batch.segment_lengths.clone();
        segment_lengths.extend((filling > 0).then_some(filling));
        let positions: Vec<i64> =
            segment_lengths.iter().flat_map(|&length| 0..length as i64).collect();
        Self {
            tokens: on_device(&tokens),
            predicting: on_device(&batch.predicting),
            labels: on_device(&batch.labels),
            rotary: model.rotary(&positions),
            segments: Segments::new(&segment_lengths),
            dropout,
        }
    }

    /// Returns about how many positions there are.
    fn about(&self) -> i64 {
        self.tokens.numel().next_multiple_of(ALIKE) as i64
    }

    fn surroundings(&self) -> Surroundings<'_> {
        Surroundings { rotary: &self.rotary, segments: &self.segments, dropout: self.dropout }
    }
}

/// Builds modules from a checkpoint.
struct Parts<'a> {
    checkpoint: &'a WeightFiles,
    config: &'a ModelConfig,
    attachment: &'a Attachment,
    trained: &'a FlatParams,
    sharded: Option<&'a Sharded>,
    dtype: Dtype,
    device: Device,
    seed: Counter,
}

impl Parts<'_> {
    fn block(&self, layer: usize) -> Result<Block, Failure> {
        let config = self.config;
        let path = |name: &str| names::in_block(layer, name);
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] =
            config.block_linears().map(|(name, out, width, bias)| {
                let path = path(name);
                self.linear(&path, [out, width], bias).map(|linear| (path, linear))
            });
        let norm = |name: &str, width| self.norm(&path(name), width);
        let qk_norm = if config.qk_norm {
            Some((
                norm("self_attn.q_norm", config.head_dim)?,
                norm("self_attn.k_norm", config.head_dim)?,
            ))
        } else {
            None
        };
        Ok(Block {
            layer: layer as u64,
            head_dim: config.head_dim as i64,
            attention: Attention { window: config.sliding_window[layer] },
            input_layernorm: norm("input_layernorm", config.hidden_size)?,
            post_attention_layernorm: norm("post_attention_layernorm", config.hidden_size)?,
            qkv_proj: self.projections([q_proj?, k_proj?, v_proj?]),
            o_proj: self.projections([o_proj?]),
            gate_up_proj: self.projections([gate_proj?, up_proj?]),
            down_proj: self.projections([down_proj?]),
            qk_norm,
        })
    }

    fn linear(&self, path: &str, shape: [usize; 2], bias: bool) -> Result<Linear, Failure> {
        let weight = self.param(&format!("{path}.weight"), &shape)?;
        let bias =
            if bias { Some(self.param(&format!("{path}.bias"), &shape[..1])?) } else { None };
        Ok(Linear { weight, bias, up: None })
    }

    /// Puts layers with one input together and gives them their adapters.
    fn projections<const N: usize>(&self, parts: [(String, Linear); N]) -> Projections<N> {
        let mut stacked = Vec::new();
        let mut first = 0;
        let layers = parts.map(|(path, mut linear)| {
            if let Some([a, b]) = self.started_adapter(&path) {
                let up = self.trained.param(&b).expect("adapters are trained");
                let rank = up.value.size()[1];
                linear.up = Some(Up { b: up, first });
                first += rank;
                stacked.push(a);
            }
            linear
        });
        let down = self.trained.stacked(&stacked).map(|a| Down { a, scaling: self.scaling() });
        Projections { layers, down }
    }

    fn norm(&self, path: &str, width: usize) -> Result<RmsNorm, Failure> {
        Ok(RmsNorm {
            weight: self.param(&format!("{path}.weight"), &[width])?,
            eps: self.config.rms_norm_eps,
        })
    }

    fn embedding(&self) -> Result<Embedding, Failure> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let weight = self.param(&format!("{}.weight", names::EMBED_TOKENS), &shape)?;
        let adapter = self.started_adapter(names::EMBED_TOKENS).and_then(|[a, b]| {
            let (a, b) = (self.trained.param(&a)?, self.trained.param(&b)?);
            Some(Adapter { a, b, scaling: self.scaling() })
        });
        Ok(Embedding { weight, adapter })
    }

    fn lm_head(&self, embed_tokens: &Embedding) -> Result<Projections<1>, Failure> {
        let name = format!("{}.weight", names::LM_HEAD);
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let weight = if !self.config.tie_word_embeddings {
            self.param(&name, &shape)?
        } else if let Some(own) = self.trained.param(&name) {
            // Trained whole on a tied model: it starts as the embedding and goes its own way.
            let start = self.stored(&format!("{}.weight", names::EMBED_TOKENS), &shape)?;
            self.set_master(&name, &start);
            own
        } else if self.is_saved(names::EMBED_TOKENS) {
            // The embedding goes its own way; the head stays what the checkpoint has.
            Param::frozen(self.frozen(&format!("{}.weight", names::EMBED_TOKENS), &shape)?)
        } else {
            embed_tokens.weight.share()
        };
        let linear = Linear { weight, bias: None, up: None };
        Ok(self.projections([(names::LM_HEAD.to_owned(), linear)]))
    }

    fn scaling(&self) -> f64 {
        match self.attachment {
            Attachment::Lora(lora) => lora.scaling,
            Attachment::Frozen | Attachment::Full => 1.0,
        }
    }

    /// Gives an adapted module's two tensors their first values and returns their names.
    fn started_adapter(&self, path: &str) -> Option<[String; 2]> {
        let Attachment::Lora(LoraAttachment { targets, .. }) = self.attachment else {
            return None;
        };
        targets.get(path)?;
        let [a, b] = adapter_names(path);
        let seed = self.seed.fold_name(&a);
        // PEFT: kaiming_uniform_(a = √5) on A, whose bound is 1 / √in; zeros on B. On an embedding
        // zeros on A and normal numbers on B.
        if path == names::EMBED_TOKENS {
            let shape = self.trained.master_of(&b)?.size();
            self.set_master(&b, &seed.normal_tensor(&shape, self.device));
        } else {
            let shape = self.trained.master_of(&a)?.size();
            let bound = 1.0 / (shape[1] as f64).sqrt();
            self.set_master(&a, &seed.uniform_tensor(&shape, bound, self.device));
        }
        Some([a, b])
    }

    fn is_saved(&self, path: &str) -> bool {
        matches!(self.attachment, Attachment::Lora(lora) if lora.saved.iter().any(|saved| saved == path))
    }

    /// Returns a parameter: trained if it is among the trained ones, else frozen.
    fn param(&self, name: &str, shape: &[usize]) -> Result<Param, Failure> {
        if let Some(param) = self.trained.param(name) {
            self.set_master(name, &self.stored(name, shape)?);
            return Ok(param);
        }
        let Some((sharded, param)) =
            self.sharded.and_then(|sharded| Some((sharded, sharded.param(name)?)))
        else {
            return Ok(Param::frozen(self.frozen(name, shape)?));
        };
        let stored = self.stored(name, shape)?;
        if sharded.is_trained() {
            sharded.keep(name, &stored, self.trained.master());
        } else {
            sharded.keep_value(name, &stored);
        }
        Ok(param)
    }

    fn set_master(&self, name: &str, value: &Tensor) {
        if let Some(mut master) = self.trained.master_of(name) {
            master.copy_(value);
        }
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Tensor, Failure> {
        Ok(self.stored(name, shape)?.to_device(self.device).to_kind(kind_of(self.dtype)))
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<Tensor, Failure> {
        self.checkpoint.tensor_of(name, shape).map_err(invalid_model)
    }
}

fn invalid_model(error: weights::Error) -> Failure {
    Failure::from_chain(FailureReason::InvalidModel, &error)
}
