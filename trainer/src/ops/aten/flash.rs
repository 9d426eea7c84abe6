//! Attention on GPUs: PyTorch's variable-length FlashAttention, one call for all segments, with
//! grouped-query heads and sliding windows.
//!
//! Our tests never run it, as they have no GPU.
#![expect(unsafe_code, reason = "calls a shim for what tch does not bind")]

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::{
    ops::AttentionMask,
    runtime::shim::{ErrorBuffer, call},
};

/// The largest head width that the kernel supports.
const MAX_HEAD_DIM: i64 = 256;

unsafe extern "C" {
    fn finetune_flash_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        starts: *const C_tensor,
        longest: i64,
        window: i64,
        results: *mut *mut C_tensor,
        error: ErrorBuffer,
    ) -> bool;
}

/// Reports whether FlashAttention supports queries `[T, H, E]`.
pub(in crate::ops) fn is_supported(q: &Tensor) -> bool {
    let width = q.size()[2];
    matches!(q.device(), Device::Cuda(_))
        && q.kind() == Kind::BFloat16
        && width % 8 == 0
        && width <= MAX_HEAD_DIM
}

/// As [`crate::ops::attention`]; beside the logarithms it returns the RNG state that the backward
/// operator takes.
pub(in crate::ops) fn attention(
    [q, k, v]: [&Tensor; 3],
    mask: AttentionMask<'_>,
) -> (Tensor, Vec<Tensor>) {
    let (starts, longest) = cumulative_lengths(mask, q.device());
    let mut results = [std::ptr::null_mut(); 4];
    let into = results.as_mut_ptr();
    let [q, k, v, starts] = [q, k, v, &starts].map(Tensor::as_ptr);
    // SAFETY: the tensors outlive the call, which writes four new ones or a text that fits.
    let outcome = call(
        |succeeded| *succeeded,
        |error| unsafe {
            finetune_flash_attention(q, k, v, starts, longest, window(mask), into, error)
        },
    );
    assert!(outcome.is_ok(), "attention: {outcome:?}");
    // SAFETY: each is new and owned by nobody else.
    let [out, logsumexp, rng_state, unused] =
        results.map(|result| unsafe { Tensor::from_ptr(result) });
    (out, vec![logsumexp, rng_state, unused])
}

/// As [`crate::ops::attention_backward`].
pub(in crate::ops) fn attention_backward(
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    saved: &[Tensor],
    d_out: &Tensor,
    mask: AttentionMask<'_>,
) -> [Tensor; 3] {
    let (starts, longest) = cumulative_lengths(mask, q.device());
    let window = window(mask);
    let (dq, dk, dv) = Tensor::internal_flash_attention_backward(
        d_out,
        q,
        k,
        v,
        out,
        &saved[0],
        &starts,
        &starts,
        longest,
        longest,
        0.0,
        true,
        &saved[1],
        &saved[2],
        None,
        window,
        if window < 0 { -1 } else { 0 },
    );
    [dq, dk, dv]
}

/// Returns the cumulative segment lengths from 0 on, `[S + 1]`, int32, and the largest length.
fn cumulative_lengths(mask: AttentionMask<'_>, device: Device) -> (Tensor, i64) {
    let (mut starts, mut longest) = (vec![0_i32], 0);
    for run in mask.runs {
        longest = longest.max(run.length);
        for segment in 1..=run.count {
            starts.push((run.start + segment * run.length) as i32);
        }
    }
    (Tensor::from_slice(&starts).to_device(device), longest)
}

/// Returns how many earlier positions a query attends to, or −1 for all.
fn window(mask: AttentionMask<'_>) -> i64 {
    mask.window.map_or(-1, |window| window as i64 - 1)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::{attention, cumulative_lengths, window};
    use crate::ops::{AttentionMask, SegmentRun};

    const RUNS: [SegmentRun; 2] = [
        SegmentRun { start: 0, count: 2, length: 3 },
        SegmentRun { start: 6, count: 1, length: 5 },
    ];

    #[test]
    fn segment_lengths_are_cumulative() {
        let mask = AttentionMask { runs: &RUNS, window: Some(4) };
        let (starts, longest) = cumulative_lengths(mask, Device::Cpu);
        assert_eq!(Vec::<i32>::try_from(starts).unwrap(), [0, 3, 6, 11]);
        assert_eq!((longest, window(mask)), (5, 3));
    }

    /// Tests the call and its error path; the results can be tested only on a GPU.
    #[test]
    #[should_panic(expected = "_flash_attention_forward")]
    fn fails_with_a_message_without_a_gpu() {
        let x = Tensor::zeros([11, 2, 8], (Kind::BFloat16, Device::Cpu));
        let _ = attention([&x, &x, &x], AttentionMask { runs: &RUNS, window: None });
    }
}
