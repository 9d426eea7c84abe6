//! A second implementation of the decoder, as simple as possible: unfused and with autograd.

use std::collections::BTreeMap;

use finetune_trainer::{
    architecture::{config::ModelConfig, names},
    data::sequences::Batch,
    hf::weights::WeightFiles,
    layers::rope::frequencies,
    lora::trainable::{Trainable, adapter_names},
    model::Model,
};
use tch::{Kind, Tensor};

/// A model whose trained tensors record gradients.
pub struct Reference<'a> {
    config: &'a ModelConfig,
    trainable: &'a Trainable,
    frozen: BTreeMap<String, Tensor>,
    trained: BTreeMap<String, Tensor>,
}

impl<'a> Reference<'a> {
    /// Copies the parameters of a model.
    pub fn of(model: &'a Model, checkpoint: &WeightFiles) -> Self {
        let copy = |name: &String| {
            let value = model.trained().master_of(name).unwrap().copy().set_requires_grad(true);
            (name.clone(), value)
        };
        Self {
            config: model.config(),
            trainable: model.trainable(),
            frozen: checkpoint
                .names()
                .map(|name| (name.to_owned(), checkpoint.tensor(name).unwrap()))
                .collect(),
            trained: model.trained().names().iter().map(copy).collect(),
        }
    }

    /// Computes the summed loss and the gradient of every trained tensor.
    pub fn loss_and_gradients(&self, batch: &Batch) -> (f64, BTreeMap<String, Tensor>) {
        let loss = self.loss(batch);
        loss.backward();
        let gradients =
            self.trained.iter().map(|(name, tensor)| (name.clone(), tensor.grad())).collect();
        (loss.double_value(&[]), gradients)
    }

    fn loss(&self, batch: &Batch) -> Tensor {
        let logits =
            self.logits(batch).index_select(0, &Tensor::from_slice(&batch.target_positions));
        let labels = Tensor::from_slice(&batch.labels).unsqueeze(1);
        -logits.log_softmax(-1, Kind::Float).gather(1, &labels, false).sum(Kind::Float)
    }

    fn logits(&self, batch: &Batch) -> Tensor {
        let tokens = Tensor::from_slice(&batch.tokens);
        let mut x = self.get("model.embed_tokens.weight").index_select(0, &tokens);
        if let Some((a, b, scaling)) = self.adapter(names::EMBED_TOKENS) {
            x += a.index_select(1, &tokens).tr().matmul(&b.tr()) * scaling;
        }
        for layer in 0..self.config.num_hidden_layers {
            x = self.block(layer, &x, batch);
        }
        let x = self.norm("model.norm", &x);
        let mut logits = x.matmul(&self.head_weight().tr());
        if let Some((a, b, scaling)) = self.adapter(names::LM_HEAD) {
            logits += x.matmul(&a.tr()).matmul(&b.tr()) * scaling;
        }
        logits
    }

    fn block(&self, layer: usize, x: &Tensor, batch: &Batch) -> Tensor {
        let path = |name: &str| names::in_block(layer, name);
        let (heads, kv_heads, width) = (
            self.config.num_attention_heads as i64,
            self.config.num_key_value_heads as i64,
            self.config.head_dim as i64,
        );
        let tokens = x.size()[0];
        let normed = self.norm(&path("input_layernorm"), x);
        let split =
            |name: &str, heads: i64| self.linear(&path(name), &normed).view([tokens, heads, width]);
        let (mut q, mut k, v) = (
            split("self_attn.q_proj", heads),
            split("self_attn.k_proj", kv_heads),
            split("self_attn.v_proj", kv_heads),
        );
        if self.config.qk_norm {
            q = self.norm(&path("self_attn.q_norm"), &q);
            k = self.norm(&path("self_attn.k_norm"), &k);
        }
        let angles = self.angles(batch);
        let (q, k) = (rotate(&q, &angles), rotate(&k, &angles));
        let repeat =
            |x: &Tensor| x.repeat_interleave_self_int(heads / kv_heads, 1, None).transpose(0, 1);
        let (q, k, v) = (q.transpose(0, 1), repeat(&k), repeat(&v));
        let scores = q.matmul(&k.transpose(1, 2)) / (width as f64).sqrt()
            + Self::mask(batch, self.config.sliding_window[layer]);
        let heads_out = scores
            .softmax(-1, Kind::Float)
            .matmul(&v)
            .transpose(0, 1)
            .reshape([tokens, heads * width]);
        let x = x + self.linear(&path("self_attn.o_proj"), &heads_out);
        let normed = self.norm(&path("post_attention_layernorm"), &x);
        let gated = self.linear(&path("mlp.gate_proj"), &normed).silu()
            * self.linear(&path("mlp.up_proj"), &normed);
        &x + self.linear(&path("mlp.down_proj"), &gated)
    }

    fn linear(&self, path: &str, x: &Tensor) -> Tensor {
        let mut y = x.matmul(&self.get(&format!("{path}.weight")).tr());
        if let Some(bias) = self.find(&format!("{path}.bias")) {
            y += bias;
        }
        if let Some((a, b, scaling)) = self.adapter(path) {
            y += x.matmul(&a.tr()).matmul(&b.tr()) * scaling;
        }
        y
    }

    fn norm(&self, path: &str, x: &Tensor) -> Tensor {
        let mean_square = x.square().mean_dim(-1, true, Kind::Float);
        x / (mean_square + self.config.rms_norm_eps).sqrt() * self.get(&format!("{path}.weight"))
    }

    /// Returns the additive mask by which each token attends to its own segment, causally and
    /// inside the window.
    fn mask(batch: &Batch, window: Option<usize>) -> Tensor {
        let segment_of: Vec<usize> = batch
            .segment_lengths
            .iter()
            .enumerate()
            .flat_map(|(segment, &length)| std::iter::repeat_n(segment, length))
            .collect();
        let tokens = segment_of.len();
        let mut mask = vec![f32::NEG_INFINITY; tokens * tokens];
        for query in 0..tokens {
            for key in 0..=query {
                if segment_of[query] == segment_of[key]
                    && window.is_none_or(|window| query - key < window)
                {
                    mask[query * tokens + key] = 0.0;
                }
            }
        }
        Tensor::from_slice(&mask).view([tokens as i64, tokens as i64])
    }

    fn angles(&self, batch: &Batch) -> Tensor {
        let frequencies = frequencies(&self.config.rope, self.config.head_dim).per_pair;
        let positions = batch.segment_lengths.iter().flat_map(|&length| 0..length);
        let angles: Vec<f64> = positions
            .flat_map(|position| {
                frequencies.iter().map(move |frequency| position as f64 * frequency)
            })
            .collect();
        Tensor::from_slice(&angles).view([-1, 1, frequencies.len() as i64])
    }

    fn head_weight(&self) -> &Tensor {
        if self.config.tie_word_embeddings {
            let is_saved = |path: &str| matches!(self.trainable, Trainable::Lora(lora) if lora.modules_to_save.iter().any(|saved| saved == path));
            if is_saved(names::LM_HEAD) {
                return &self.trained["lm_head.weight"];
            }
            if is_saved(names::EMBED_TOKENS) {
                return &self.frozen["model.embed_tokens.weight"];
            }
            return self.get("model.embed_tokens.weight");
        }
        self.get("lm_head.weight")
    }

    fn adapter(&self, path: &str) -> Option<(&Tensor, &Tensor, f64)> {
        let Trainable::Lora(lora) = self.trainable else { return None };
        let [a, b] = adapter_names(path);
        Some((self.trained.get(&a)?, self.trained.get(&b)?, lora.scaling))
    }

    fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap()
    }

    fn find(&self, name: &str) -> Option<&Tensor> {
        self.trained.get(name).or_else(|| self.frozen.get(name))
    }
}

fn rotate(x: &Tensor, angles: &Tensor) -> Tensor {
    let half = x.size()[2] / 2;
    let (x1, x2) = (x.narrow(2, 0, half), x.narrow(2, half, half));
    let (cos, sin) = (angles.cos().to_kind(Kind::Float), angles.sin().to_kind(Kind::Float));
    Tensor::cat(&[&x1 * &cos - &x2 * &sin, &x2 * &cos + &x1 * &sin], 2)
}
