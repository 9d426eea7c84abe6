//! Loads the modules of a decoder from its weight files, with what is trained of them.

use finetune_contract::{Dtype, FailureReason};
use tch::{Device, Tensor};

use super::{
    block::{Block, feed_forward::FeedForward, self_attention::SelfAttention},
    network::kind_of,
};
use crate::{
    architecture::{config::ModelConfig, names},
    failure::Failure,
    hf::weights::{self, WeightFiles},
    layers::{
        attention::Attention,
        embedding::{Embedding, EmbeddingAdapter},
        linear::{Linear, LoraA, LoraB, Projections},
        norm::RmsNorm,
    },
    lora::trainable::{LoraAdapters, Trainable, adapter_names},
    params::{
        flat::{FlatParams, Param},
        zero::ShardedParams,
    },
    runtime::rng::RngKey,
};

/// Loads modules from a checkpoint.
pub(super) struct Loader<'a> {
    pub(super) checkpoint: &'a WeightFiles,
    pub(super) config: &'a ModelConfig,
    pub(super) trainable: &'a Trainable,
    pub(super) trained: &'a FlatParams,
    pub(super) sharded: Option<&'a ShardedParams>,
    pub(super) dtype: Dtype,
    pub(super) device: Device,
    pub(super) seed: RngKey,
}

impl Loader<'_> {
    pub(super) fn block(&self, layer: usize) -> Result<Block, Failure> {
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
        let self_attention = SelfAttention {
            layer: layer as u64,
            head_dim: config.head_dim as i64,
            attention: Attention { window: config.sliding_window[layer] },
            input_layernorm: norm("input_layernorm", config.hidden_size)?,
            qkv_proj: self.projections([q_proj?, k_proj?, v_proj?]),
            qk_norm,
            o_proj: self.projections([o_proj?]),
        };
        let feed_forward = FeedForward {
            layer: layer as u64,
            post_attention_layernorm: norm("post_attention_layernorm", config.hidden_size)?,
            gate_up_proj: self.projections([gate_proj?, up_proj?]),
            down_proj: self.projections([down_proj?]),
        };
        Ok(Block { self_attention, feed_forward })
    }

    fn linear(&self, path: &str, shape: [usize; 2], bias: bool) -> Result<Linear, Failure> {
        let weight = self.param(&format!("{path}.weight"), &shape)?;
        let bias =
            if bias { Some(self.param(&format!("{path}.bias"), &shape[..1])?) } else { None };
        Ok(Linear { weight, bias, lora_b: None })
    }

    /// Joins layers that share an input, and adds their adapters.
    fn projections<const N: usize>(&self, layers: [(String, Linear); N]) -> Projections<N> {
        let mut stacked = Vec::new();
        let mut first_row = 0;
        let layers = layers.map(|(path, mut linear)| {
            if let Some([a, b]) = self.init_adapter(&path) {
                let weight = self.trained.param(&b).expect("adapters are trained"); // [out, R]
                let rank = weight.value().size()[1];
                linear.lora_b = Some(LoraB { weight, first_row });
                first_row += rank;
                stacked.push(a);
            }
            linear
        });
        let lora_a = self.trained.stacked(&stacked); // [ΣR, in]
        let lora_a = lora_a.map(|weight| LoraA { weight, scaling: self.scaling() });
        Projections { layers, lora_a }
    }

    pub(super) fn norm(&self, path: &str, width: usize) -> Result<RmsNorm, Failure> {
        Ok(RmsNorm {
            weight: self.param(&format!("{path}.weight"), &[width])?,
            eps: self.config.rms_norm_eps,
        })
    }

    pub(super) fn embedding(&self) -> Result<Embedding, Failure> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let weight = self.param(&format!("{}.weight", names::EMBED_TOKENS), &shape)?;
        let adapter = self.init_adapter(names::EMBED_TOKENS).and_then(|[a, b]| {
            let (lora_a, lora_b) = (self.trained.param(&a)?, self.trained.param(&b)?);
            Some(EmbeddingAdapter { lora_a, lora_b, scaling: self.scaling() })
        });
        Ok(Embedding { weight, adapter })
    }

    pub(super) fn lm_head(&self, embed_tokens: &Embedding) -> Result<Projections<1>, Failure> {
        let name = format!("{}.weight", names::LM_HEAD);
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let weight = if !self.config.tie_word_embeddings {
            self.param(&name, &shape)?
        } else if let Some(own) = self.trained.param(&name) {
            // A head that is trained on a tied model: it starts as a copy of the embedding.
            let start = self.stored(&format!("{}.weight", names::EMBED_TOKENS), &shape)?;
            self.set_master(&name, &start);
            own
        } else if self.is_saved(names::EMBED_TOKENS) {
            // The embedding is trained without the head, which keeps the checkpoint's values.
            Param::frozen(self.frozen(&format!("{}.weight", names::EMBED_TOKENS), &shape)?)
        } else {
            embed_tokens.weight.share()
        };
        let linear = Linear { weight, bias: None, lora_b: None };
        Ok(self.projections([(names::LM_HEAD.to_owned(), linear)]))
    }

    fn scaling(&self) -> f64 {
        match self.trainable {
            Trainable::Lora(lora) => lora.scaling,
            Trainable::Frozen | Trainable::Full => 1.0,
        }
    }

    /// Initialises the adapter of a module and returns the names of `lora_A` and `lora_B`; `None`
    /// if the module has none.
    fn init_adapter(&self, path: &str) -> Option<[String; 2]> {
        let Trainable::Lora(LoraAdapters { targets, .. }) = self.trainable else {
            return None;
        };
        targets.get(path)?;
        let [a, b] = adapter_names(path);
        let seed = self.seed.fold_in_name(&a);
        // PEFT: kaiming_uniform_(a = √5) on lora_A, whose bound is 1 / √in, and zeros on lora_B; on
        // an embedding zeros on lora_A and a normal distribution on lora_B.
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
        matches!(self.trainable, Trainable::Lora(lora) if lora.modules_to_save.iter().any(|saved| saved == path))
    }

    /// Loads a parameter, as a trained one if it is in the list of trained tensors.
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
            sharded.store_shard(name, &stored, self.trained.master());
        } else {
            sharded.store_frozen_shard(name, &stored);
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

/// Reports weights that do not fit their config.
pub(super) fn invalid_model(error: weights::Error) -> Failure {
    Failure::from_chain(FailureReason::InvalidModel, &error)
}
