//! The output head and the cross-entropy loss, fused and in chunks: the logits of all targets never
//! exist at once.

use finetune_contract::cost::HEAD_ROWS;
use tch::Tensor;

use crate::{
    layers::{
        dropout::Dropout,
        linear::{Input, Projections},
    },
    ops,
};

/// Rows of logits that exist at once, `C`. Matrix products reach their full speed from about this
/// size on.
pub const CHUNK_ROWS: i64 = HEAD_ROWS as i64;

/// The dropout site of the head's input; no block uses this number.
const DROPOUT_SITE: u64 = 1 << 32;

/// Computes the summed cross-entropy of the head, and the gradient of its input.
///
/// Adds the gradients of trained parameters and returns the gradient of `x`, both of the *sum*: the
/// caller divides once by the number of target tokens of the step.
///
/// # Shapes
/// `x` holds the `N` positions that predict a target, after the last norm: `[N, D]`, as is its
/// gradient. `labels` is `[N]`, int64. Logits are `[C, V]`, a chunk at a time; the loss is fp64.
pub fn loss_and_gradient(
    lm_head: &Projections<1>,
    x: &Tensor,
    labels: &Tensor,
    dropout: Option<&Dropout>,
) -> (f64, Tensor) {
    let dx = x.empty_like(); // [N, D]
    let mut loss = 0.0;
    let width = x.size()[1] as usize;
    for_each_chunk(x, labels, |start, x, labels| {
        let mask = dropout.map(|dropout| dropout.head_mask(DROPOUT_SITE, start as usize, width));
        let input = Input::new(x, mask); // [C, D]
        let ([logits], hidden) = lm_head.forward(&input); // [C, V], [C, ΣR]
        let (chunk_loss, d_logits) = ops::cross_entropy_backward(logits, &labels); // [C, V]
        loss += chunk_loss;
        let mut input_grads = lm_head.backward_input([&d_logits], mask, true);
        lm_head.backward_weight(&input, &hidden, [&d_logits], &input_grads);
        if let Some(chunk_dx) = input_grads.take_dx() {
            dx.narrow(0, start, labels.size()[0]).copy_(&chunk_dx);
        }
    });
    (loss, dx)
}

/// Computes the summed cross-entropy of the head without gradients.
///
/// # Shapes
/// `x` is `[N, D]`, `labels` is `[N]`, as in [`loss_and_gradient`].
pub fn loss(lm_head: &Projections<1>, x: &Tensor, labels: &Tensor) -> f64 {
    let mut loss = 0.0;
    for_each_chunk(x, labels, |_, x, labels| {
        let [logits] = lm_head.forward_only(&Input::without_dropout(x)); // [C, V]
        loss += ops::cross_entropy(&logits, &labels);
    });
    loss
}

/// Calls `task` with each chunk of [`CHUNK_ROWS`] rows: its first row, `[C, D]` and `[C]`.
fn for_each_chunk(x: &Tensor, labels: &Tensor, mut task: impl FnMut(i64, Tensor, Tensor)) {
    let count = x.size()[0];
    for start in (0..count).step_by(CHUNK_ROWS as usize) {
        let size = CHUNK_ROWS.min(count - start);
        task(start, x.narrow(0, start, size), labels.narrow(0, start, size));
    }
}
