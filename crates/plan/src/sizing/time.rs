//! How long a run takes.

use finetune_contract::{Dtype, MachineFacts, ModelFacts, Recompute};

use super::workload::Workload;

/// The share of a measured matrix-product speed that whole steps reach.
///
/// An assumption, said in the plan; the trainer reports the speed it has.
pub const CPU_EFFICIENCY: f64 = 0.5;

/// The share of an accelerator's stated peak that whole steps reach. An assumption.
pub const ACCELERATOR_EFFICIENCY: f64 = 0.35;

/// Returns the floating-point operations of one trained position.
///
/// # Source
/// 2 per weight forward, 2 for the input's gradient, 2 for the weight's gradient of what is
/// trained, 2 for computing a block again (Kaplan et al., arXiv 2001.08361, appendix B).
pub fn flops_per_token(model: &ModelFacts, workload: &Workload) -> f64 {
    let (n, trained) = (model.parameters as f64, workload.trained as f64);
    let again = if workload.recompute == Recompute::Block { 2.0 * n } else { 0.0 };
    again + if workload.is_full { 6.0 * n } else { 4.0 * n + 6.0 * trained }
}

/// Returns the seconds of a run of `tokens` positions on a machine, if its speed is known.
pub fn seconds(
    machine: Option<&MachineFacts>,
    efficiency: f64,
    model: &ModelFacts,
    workload: &Workload,
    tokens: f64,
) -> Option<f64> {
    let machine = machine?;
    let gflops = match workload.dtype {
        Dtype::Bf16 => machine.bf16_gflops,
        Dtype::Fp32 => machine.fp32_gflops,
    }?;
    let speed = gflops * 1e9 * efficiency;
    (speed > 0.0).then(|| flops_per_token(model, workload) * tokens / speed)
}
