//! Causal language modelling: the output head and the cross-entropy loss, fused and in chunks, so
//! that the logits of all targets never exist at once.

use finetune_contract::cost::HEAD_ROWS;
use tch::Tensor;

use crate::{
    layers::{
        dropout::Dropout,
        linear::{Input, Projections},
    },
    objective::{LossSums, Objective},
    ops,
};

/// Rows of logits that exist at once, `C`. Matrix products reach their full speed from about this
/// size on.
pub const CHUNK_ROWS: i64 = HEAD_ROWS as i64;

/// The dropout site of the head's input; no block uses this number.
const DROPOUT_SITE: u64 = 1 << 32;

/// The cross-entropy of each target token, given the tokens before it.
#[derive(Debug, Clone, Copy)]
pub struct CausalLm;

impl Objective for CausalLm {
    fn loss_and_gradient(
        &self,
        lm_head: &Projections<1>,
        hidden: &Tensor,
        labels: &Tensor,
        dropout: Option<&Dropout>,
    ) -> (LossSums, Tensor) {
        let d_hidden = hidden.empty_like(); // [N, D]
        let mut loss = 0.0;
        let width = hidden.size()[1] as usize;
        for_each_chunk(hidden, labels, |start, x, labels| {
            let mask =
                dropout.map(|dropout| dropout.head_mask(DROPOUT_SITE, start as usize, width));
            let input = Input::new(x, mask); // [C, D]
            let ([logits], lora_hidden) = lm_head.forward(&input); // [C, V], [C, ΣR]
            let (chunk_loss, d_logits) = ops::cross_entropy_backward(logits, &labels); // [C, V]
            loss += chunk_loss;
            let mut input_grads = lm_head.backward_input([&d_logits], mask, true);
            lm_head.backward_weight(&input, &lora_hidden, [&d_logits], &input_grads);
            if let Some(dx) = input_grads.take_dx() {
                d_hidden.narrow(0, start, labels.size()[0]).copy_(&dx);
            }
        });
        (LossSums { loss, targets: labels.size()[0] as u64 }, d_hidden)
    }

    fn loss(&self, lm_head: &Projections<1>, hidden: &Tensor, labels: &Tensor) -> LossSums {
        let mut loss = 0.0;
        for_each_chunk(hidden, labels, |_, x, labels| {
            let [logits] = lm_head.forward_only(&Input::without_dropout(x)); // [C, V]
            loss += ops::cross_entropy(&logits, &labels);
        });
        LossSums { loss, targets: labels.size()[0] as u64 }
    }
}

/// Calls `task` with each chunk of [`CHUNK_ROWS`] rows: its first row, `[C, D]` and `[C]`.
fn for_each_chunk(x: &Tensor, labels: &Tensor, mut task: impl FnMut(i64, Tensor, Tensor)) {
    let count = x.size()[0];
    for start in (0..count).step_by(CHUNK_ROWS as usize) {
        let size = CHUNK_ROWS.min(count - start);
        task(start, x.narrow(0, start, size), labels.narrow(0, start, size));
    }
}
