//! One step of AdamW over some parameters, in one pass over memory.

use crate::versions::versions;

/// The factors of one step.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// The factor on gradients: the mean over target tokens, and clipping.
    pub grad_scale: f32,
    /// Decay rate of the first moment.
    pub beta1: f32,
    /// Decay rate of the second moment.
    pub beta2: f32,
    /// Added to the square root of the second moment.
    pub epsilon: f32,
    /// `1 − learning rate · weight decay`.
    pub weight_decay_factor: f32,
    /// Learning rate over the first moment's bias correction.
    pub step_size: f32,
    /// The square root of the second moment's bias correction.
    pub bias_correction2_sqrt: f32,
}

versions! {
    /// Updates masters and moments, and rounds the masters to `compute`, which is empty if the
    /// model computes with the masters themselves.
    ///
    /// # Source
    /// arXiv 1711.05101, algorithm 2; the order of operations is `torch.optim.AdamW`'s, 2.13.
    pub fn step<E>(
        step: AdamWStep,
        grad: &[f32],
        master: &mut [f32],
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
        compute: &mut [E],
    ) {
        update(step, grad, master, exp_avg, exp_avg_sq);
        for (compute, &master) in compute.iter_mut().zip(master.iter()) {
            *compute = E::from_f32(master);
        }
    }
}

/// Updates masters and moments.
#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
pub(crate) fn update(
    step: AdamWStep,
    grad: &[f32],
    master: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    let elements = master.iter_mut().zip(exp_avg).zip(exp_avg_sq);
    for (((master, exp_avg), exp_avg_sq), &grad) in elements.zip(grad) {
        let grad = grad * step.grad_scale;
        *exp_avg += (grad - *exp_avg) * (1.0 - step.beta1);
        *exp_avg_sq = *exp_avg_sq * step.beta2 + grad * grad * (1.0 - step.beta2);
        let denominator = exp_avg_sq.sqrt() / step.bias_correction2_sqrt + step.epsilon;
        *master = *master * step.weight_decay_factor - step.step_size * (*exp_avg / denominator);
    }
}
