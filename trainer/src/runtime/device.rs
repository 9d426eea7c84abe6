//! What a run computes on: chosen once, before anything is loaded.

use std::ffi::c_int;

use finetune_contract::{Device as Wanted, FailureReason};
use tch::{Cuda, Device};

use crate::{
    failure::Failure,
    runtime::shim::{ErrorBuffer, call},
};

/// Returns the name of a device in this process: of several GPUs the first that it sees.
pub const fn of(wanted: Wanted) -> Device {
    match wanted {
        Wanted::Cpu => Device::Cpu,
        Wanted::Cuda => Device::Cuda(0),
    }
}

/// Returns a device that is there.
///
/// # Errors
/// A [`Failure`] of reason `DeviceUnavailable` if there is none, which says why as far as can be told.
pub fn open(wanted: Wanted) -> Result<Device, Failure> {
    if wanted == Wanted::Cuda && Cuda::device_count() <= 0 {
        return Err(Failure::new(FailureReason::DeviceUnavailable, why_not()));
    }
    Ok(of(wanted))
}

fn why_not() -> String {
    let why = if !cfg!(feature = "cuda") {
        "this trainer was built without CUDA: run one that was (in a cluster `image` of the accelerator in the operator's settings)"
    } else if !std::path::Path::new("/dev/nvidiactl").exists() {
        "no NVIDIA driver is visible: the node's driver or container toolkit is missing, or the pod asked for no GPU"
    } else {
        "CUDA finds no GPU that it can use: see `nvidia-smi` there, and CUDA_VISIBLE_DEVICES if it is set"
    };
    format!("the run is planned for a GPU, but {why}")
}

/// Returns the most memory torch has held of a GPU so far, in bytes; `None` for the processor, or if
/// torch cannot tell.
pub fn peak_memory(device: Device) -> Option<u64> {
    let Device::Cuda(index) = device else { return None };
    #[expect(unsafe_code, reason = "calls a shim for what tch does not bind")]
    // SAFETY: the call reads numbers of torch's, or writes a text that fits.
    let peak = call(
        |peak: &i64| *peak >= 0,
        |error| unsafe { finetune_device_peak_memory(index as c_int, error) },
    );
    peak.ok().and_then(|peak| u64::try_from(peak).ok())
}

#[expect(unsafe_code, reason = "calls a shim for what tch does not bind")]
unsafe extern "C" {
    fn finetune_device_peak_memory(device: c_int, error: ErrorBuffer) -> i64;
}

#[cfg(test)]
mod tests {
    use finetune_contract::{Device as Wanted, FailureReason};
    use tch::{Cuda, Device};

    use super::{open, peak_memory};

    #[test]
    fn a_gpu_that_is_not_there_is_said_to_be_missing() {
        assert_eq!(open(Wanted::Cpu), Ok(Device::Cpu));
        assert_eq!(peak_memory(Device::Cpu), None);
        if Cuda::device_count() == 0 {
            let failure = open(Wanted::Cuda).unwrap_err();
            assert_eq!(failure.reason, FailureReason::DeviceUnavailable);
            assert!(failure.message.contains("planned for a GPU, but "), "{failure}");
            assert_eq!(peak_memory(Device::Cuda(0)), None);
        }
    }
}
