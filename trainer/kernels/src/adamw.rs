//! One step of AdamW over a run of parameters, in one pass over memory.

use crate::versions::versions;

/// The numbers of one step.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// What gradients are multiplied with first: the mean's divisor and clipping.
    pub grad_scale: f32,
    /// Decay rate of the first moment.
    pub beta1: f32,
    /// Decay rate of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// `1 − learning rate · weight decay`.
    pub shrink: f32,
    /// Learning rate over the first moment's bias correction.
    pub step_size: f32,
    /// Root of the second moment's bias correction.
    pub second_root: f32,
}

versions! {
    /// Updates masters and moments, and rounds the masters to what is computed with.
    ///
    /// `compute` is empty where masters are computed with themselves.
    ///
    /// # Source
    /// arXiv 1711.05101, algorithm 2; the order of operations is `torch.optim.AdamW`'s, 2.13.
    pub fn step<E>(
        step: Step,
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
#[expect(clippy::inline_always, reason = "called in every version of a kernel")]
#[inline(always)]
pub(crate) fn update(
    step: Step,
    grad: &[f32],
    master: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) {
    let places = master.iter_mut().zip(exp_avg).zip(exp_avg_sq);
    for (((master, exp_avg), exp_avg_sq), &grad) in places.zip(grad) {
        let grad = grad * step.grad_scale;
        *exp_avg += (grad - *exp_avg) * (1.0 - step.beta1);
        *exp_avg_sq = *exp_avg_sq * step.beta2 + grad * grad * (1.0 - step.beta2);
        let denominator = exp_avg_sq.sqrt() / step.second_root + step.epsilon;
        *master = *master * step.shrink - step.step_size * (*exp_avg / denominator);
    }
}
