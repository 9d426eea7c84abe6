//! Attention on GPUs: PyTorch's FlashAttention over segments of any lengths, in one call for all of
//! them; it takes grouped heads and windows as they are.
//!
//! Never run by our tests, which have no GPU.
#![expect(unsafe_code, reason = "calls a shim for what tch does not bind")]

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::{
    ops::Attention,
    runtime::shim::{ErrorBuffer, call},
};

/// The widest head the kernel knows.
const WIDEST_HEAD: i64 = 256;

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

/// Tells whether queries `[T, H, E]` can be attended with here.
pub(in crate::ops) fn can(q: &Tensor) -> bool {
    let width = q.size()[2];
    matches!(q.device(), Device::Cuda(_))
        && q.kind() == Kind::BFloat16
        && width % 8 == 0
        && width <= WIDEST_HEAD
}

/// As [`crate::ops::attention`]; what it keeps beside the logarithms is what the backward pass asks for.
pub(in crate::ops) fn attention(
    [q, k, v]: [&Tensor; 3],
    how: Attention<'_>,
) -> (Tensor, Vec<Tensor>) {
    let (starts, longest) = starts(how, q.device());
    let mut results = [std::ptr::null_mut(); 4];
    let into = results.as_mut_ptr();
    let [q, k, v, at] = [q, k, v, &starts].map(Tensor::as_ptr);
    // SAFETY: the tensors outlive the call, which writes four new ones or a text that fits.
    let called = call(
        |is_done| *is_done,
        |error| unsafe { finetune_flash_attention(q, k, v, at, longest, window(how), into, error) },
    );
    assert!(called.is_ok(), "attention: {called:?}");
    // SAFETY: each is new and owned by nobody else.
    let [out, logsumexp, one, other] = results.map(|result| unsafe { Tensor::from_ptr(result) });
    (out, vec![logsumexp, one, other])
}

/// As [`crate::ops::attention_backward`].
pub(in crate::ops) fn attention_backward(
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    kept: &[Tensor],
    d_out: &Tensor,
    how: Attention<'_>,
) -> [Tensor; 3] {
    let (starts, longest) = starts(how, q.device());
    let window = window(how);
    let (dq, dk, dv) = Tensor::internal_flash_attention_backward(
        d_out,
        q,
        k,
        v,
        out,
        &kept[0],
        &starts,
        &starts,
        longest,
        longest,
        0.0,
        true,
        &kept[1],
        &kept[2],
        None,
        window,
        if window < 0 { -1 } else { 0 },
    );
    [dq, dk, dv]
}

/// Returns where segments start and the last ends, `[S + 1]`, and the longest one's length.
fn starts(how: Attention<'_>, device: Device) -> (Tensor, i64) {
    let (mut starts, mut longest) = (vec![0_i32], 0);
    for run in how.runs {
        longest = longest.max(run.length);
        for segment in 1..=run.count {
            starts.push((run.start + segment * run.length) as i32);
        }
    }
    (Tensor::from_slice(&starts).to_device(device), longest)
}

/// Returns how many earlier positions a query sees, or −1 for all.
fn window(how: Attention<'_>) -> i64 {
    how.window.map_or(-1, |window| window as i64 - 1)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::{attention, starts, window};
    use crate::ops::{Attention, Run};

    const RUNS: [Run; 2] =
        [Run { start: 0, count: 2, length: 3 }, Run { start: 6, count: 1, length: 5 }];

    #[test]
    fn says_where_segments_are() {
        let how = Attention { runs: &RUNS, window: Some(4) };
        let (starts, longest) = starts(how, Device::Cpu);
        assert_eq!(Vec::<i32>::try_from(starts).unwrap(), [0, 3, 6, 11]);
        assert_eq!((longest, window(how)), (5, 3));
    }

    /// The way to the operator and back; what it computes only a GPU can show.
    #[test]
    #[should_panic(expected = "_flash_attention_forward")]
    fn fails_in_words_without_a_gpu() {
        let x = Tensor::zeros([11, 2, 8], (Kind::BFloat16, Device::Cpu));
        let _ = attention([&x, &x, &x], Attention { runs: &RUNS, window: None });
    }
}
