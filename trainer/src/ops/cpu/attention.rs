//! Attention tile by tile, on our kernels.

use finetune_kernels::attention::{Attended, Shape, backward, forward, is_supported};
use tch::{Device, Kind, Tensor};

use crate::ops::{
    Attention, Run,
    cpu::{
        pool::Threads,
        view::{by_kind, elements, elements_mut},
    },
};

/// Tells whether queries `[T, H, E]` can be attended with here.
pub(in crate::ops) fn can(q: &Tensor) -> bool {
    let width = usize::try_from(q.size()[2]).unwrap_or(0);
    q.device() == Device::Cpu && by_kind!(q.kind(), E => is_supported::<E>(width))
}

pub(in crate::ops) fn attention(inputs: [&Tensor; 3], how: Attention<'_>) -> (Tensor, Vec<Tensor>) {
    let [q, k, _] = inputs;
    let size = q.size();
    let mut out = q.empty_like();
    let mut logsumexp = Tensor::zeros([size[1], size[0]], (Kind::Float, Device::Cpu));
    by_kind!(q.kind(), E => forward(
        &Threads,
        shape(q, k, how),
        &lengths(how.runs),
        inputs.map(elements::<E>),
        elements_mut(&mut out),
        elements_mut(&mut logsumexp),
    ));
    (out, vec![logsumexp])
}

pub(in crate::ops) fn attention_backward(
    inputs: [&Tensor; 3],
    out: &Tensor,
    logsumexp: &[Tensor],
    d_out: &Tensor,
    how: Attention<'_>,
) -> [Tensor; 3] {
    let mut grads = inputs.map(Tensor::empty_like);
    let [dq, dk, dv] = &mut grads;
    let logsumexp = elements(&logsumexp[0]);
    by_kind!(out.kind(), E => backward(
        &Threads,
        shape(inputs[0], inputs[1], how),
        &lengths(how.runs),
        inputs.map(elements::<E>),
        Attended { out: elements(out), logsumexp, d_out: elements(d_out) },
        [elements_mut(dq), elements_mut(dk), elements_mut(dv)],
    ));
    grads
}

fn shape(q: &Tensor, k: &Tensor, how: Attention<'_>) -> Shape {
    Shape {
        heads: q.size()[1] as usize,
        kv_heads: k.size()[1] as usize,
        width: q.size()[2] as usize,
        window: how.window.unwrap_or(usize::MAX),
    }
}

fn lengths(runs: &[Run]) -> Vec<usize> {
    runs.iter()
        .flat_map(|run| std::iter::repeat_n(run.length as usize, run.count as usize))
        .collect()
}
