//! Attention by our tiled kernels.

use finetune_kernels::attention::{self, BackwardInputs, Shape};
use tch::{Device, Kind, Tensor};

use crate::ops::{
    AttentionMask, SegmentRun,
    cpu::{
        pool::Threads,
        view::{dispatch_dtype, elements, elements_mut},
    },
};

/// Reports whether our kernels support queries `[T, H, E]`.
pub(super) fn is_supported(q: &Tensor) -> bool {
    let width = usize::try_from(q.size()[2]).unwrap_or(0);
    q.device() == Device::Cpu && dispatch_dtype!(q.kind(), E => attention::is_supported::<E>(width))
}

pub(super) fn attention(inputs: [&Tensor; 3], mask: AttentionMask<'_>) -> (Tensor, Vec<Tensor>) {
    let [q, k, _] = inputs;
    let size = q.size();
    let mut out = q.empty_like();
    let mut logsumexp = Tensor::zeros([size[1], size[0]], (Kind::Float, Device::Cpu));
    dispatch_dtype!(q.kind(), E => attention::forward(
        &Threads,
        shape(q, k, mask),
        &lengths(mask.runs),
        inputs.map(elements::<E>),
        elements_mut(&mut out),
        elements_mut(&mut logsumexp),
    ));
    (out, vec![logsumexp])
}

pub(super) fn attention_backward(
    inputs: [&Tensor; 3],
    out: &Tensor,
    logsumexp: &[Tensor],
    d_out: &Tensor,
    mask: AttentionMask<'_>,
) -> [Tensor; 3] {
    let mut grads = inputs.map(Tensor::empty_like);
    let [dq, dk, dv] = &mut grads;
    let logsumexp = elements(&logsumexp[0]);
    dispatch_dtype!(out.kind(), E => attention::backward(
        &Threads,
        shape(inputs[0], inputs[1], mask),
        &lengths(mask.runs),
        inputs.map(elements::<E>),
        BackwardInputs { out: elements(out), logsumexp, d_out: elements(d_out) },
        [elements_mut(dq), elements_mut(dk), elements_mut(dv)],
    ));
    grads
}

fn shape(q: &Tensor, k: &Tensor, mask: AttentionMask<'_>) -> Shape {
    Shape {
        heads: q.size()[1] as usize,
        kv_heads: k.size()[1] as usize,
        width: q.size()[2] as usize,
        window: mask.window.unwrap_or(usize::MAX),
    }
}

fn lengths(runs: &[SegmentRun]) -> Vec<usize> {
    runs.iter()
        .flat_map(|run| std::iter::repeat_n(run.length as usize, run.count as usize))
        .collect()
}
