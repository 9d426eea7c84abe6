//! The output head and the loss, fused and in chunks: no tensor of all logits ever exists.

use finetune_contract::cost::HEAD_ROWS;
use tch::Tensor;

use crate::{
    layers::{
        dropout::Dropout,
        linear::{Input, Projections},
    },
    ops,
};

/// Rows of logits that exist at once. GEMMs reach their full speed from about this size on.
pub const CHUNK_ROWS: i64 = HEAD_ROWS as i64;

/// A dropout site no block uses.
const SITE: u64 = 1 << 32;

/// Computes the summed cross-entropy of rows `[N, D]` (after the last norm) against labels `[N]`.
///
/// Adds the gradients of trained parameters and returns the gradient of the rows, `[N, D]`, both
/// of the *sum*: the caller divides once by the count of the whole window.
pub fn loss_and_gradient(
    lm_head: &Projections<1>,
    rows: &Tensor,
    labels: &Tensor,
    dropout: Option<&Dropout>,
) -> (f64, Tensor) {
    let d_rows = rows.empty_like();
    let mut loss = 0.0;
    let width = rows.size()[1] as usize;
    for_each_chunk(rows, labels, |start, rows, labels| {
        let noise = dropout.map(|dropout| dropout.noise_of_head(SITE, start as usize, width));
        let input = Input::new(rows, noise);
        let ([logits], low) = lm_head.forward(&input); // [C, V]
        let (chunk_loss, d_logits) = ops::cross_entropy_backward(logits, &labels);
        loss += chunk_loss;
        let mut passed = lm_head.pass_back([&d_logits], noise, true);
        lm_head.add_gradients(&input, &low, [&d_logits], &passed);
        if let Some(dx) = passed.take_input_grad() {
            d_rows.narrow(0, start, labels.size()[0]).copy_(&dx);
        }
    });
    (loss, d_rows)
}

/// Computes the summed cross-entropy of rows `[N, D]` against labels `[N]`, without gradients.
pub fn loss(lm_head: &Projections<1>, rows: &Tensor, labels: &Tensor) -> f64 {
    let mut loss = 0.0;
    for_each_chunk(rows, labels, |_, rows, labels| {
        let [logits] = lm_head.apply(&Input::plain(rows));
        loss += ops::cross_entropy(&logits, &labels);
    });
    loss
}

fn for_each_chunk(rows: &Tensor, labels: &Tensor, mut visit: impl FnMut(i64, Tensor, Tensor)) {
    let count = rows.size()[0];
    for start in (0..count).step_by(CHUNK_ROWS as usize) {
        let size = CHUNK_ROWS.min(count - start);
        visit(start, rows.narrow(0, start, size), labels.narrow(0, start, size));
    }
}
