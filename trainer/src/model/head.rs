//! The output head and the loss, fused and in chunks: no tensor of all logits ever exists.

use tch::{Kind, Tensor};

use super::{
    dropout::Dropout,
    linear::{Input, InputGrad, Linear},
};

/// Rows of logits that exist at once. GEMMs reach their full speed from about this size on.
pub const CHUNK_ROWS: i64 = 512;

/// A dropout site no block uses, plus the chunk's number.
const FIRST_SITE: u64 = 1 << 32;

/// Computes the summed cross-entropy of rows `[N, D]` (after the last norm) against labels `[N]`.
///
/// Adds the gradients of trained parameters and returns the gradient of the rows, `[N, D]`, both
/// of the *sum*: the caller divides once by the count of the whole window.
pub fn loss_and_gradient(
    lm_head: &Linear,
    rows: &Tensor,
    labels: &Tensor,
    dropout: Option<&Dropout>,
) -> (f64, Tensor) {
    let d_rows = rows.empty_like();
    let mut loss = 0.0;
    for_each_chunk(rows, labels, |chunk, start, rows, labels| {
        let input = Input::new(rows, dropout, FIRST_SITE + chunk);
        let mut probabilities = lm_head.forward(&input).to_kind(Kind::Float); // [C, V]
        let kind = d_rows.kind();
        loss += sum_of_losses(&mut probabilities, &labels);
        // d(sum of −log p[label]) / d logits = p − 1[label].
        let ones = Tensor::full([labels.size()[0], 1], -1.0, (Kind::Float, labels.device()));
        let _ = probabilities.scatter_add_(1, &labels.unsqueeze(1), &ones);
        let d_logits = probabilities.to_kind(kind);
        let mut d_input = InputGrad::default();
        lm_head.backward(&input, &d_logits, Some(&mut d_input));
        let size = labels.size()[0];
        d_rows.narrow(0, start, size).copy_(&d_input.finish(&input));
    });
    (loss, d_rows)
}

/// Computes the summed cross-entropy of rows `[N, D]` against labels `[N]`, without gradients.
pub fn loss(lm_head: &Linear, rows: &Tensor, labels: &Tensor) -> f64 {
    let mut loss = 0.0;
    for_each_chunk(rows, labels, |_, _, rows, labels| {
        let mut logits = lm_head.forward(&Input::new(rows, None, 0)).to_kind(Kind::Float);
        loss += sum_of_losses(&mut logits, &labels);
    });
    loss
}

fn for_each_chunk(rows: &Tensor, labels: &Tensor, mut visit: impl FnMut(u64, i64, Tensor, Tensor)) {
    let count = rows.size()[0];
    for (chunk, start) in (0..count).step_by(CHUNK_ROWS as usize).enumerate() {
        let size = CHUNK_ROWS.min(count - start);
        visit(chunk as u64, start, rows.narrow(0, start, size), labels.narrow(0, start, size));
    }
}

/// Turns fp32 logits `[C, V]` into probabilities, in place, and returns the sum of `−log p[label]`.
fn sum_of_losses(logits: &mut Tensor, labels: &Tensor) -> f64 {
    let _ = logits.g_sub_(&logits.amax([1], true));
    let picked = logits.gather(1, &labels.unsqueeze(1), false); // [C, 1]
    let _ = logits.exp_();
    let denominator = logits.sum_dim_intlist(1, true, Kind::Float); // [C, 1]
    let _ = logits.g_div_(&denominator);
    (denominator.log() - picked).sum(Kind::Double).double_value(&[])
}
