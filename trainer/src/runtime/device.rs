//! The device of a run, chosen once before anything is loaded.

use std::ffi::c_int;

use finetune_contract::FailureReason;
use tch::{Cuda, Device};

use crate::{
    failure::Failure,
    runtime::shim::{ErrorBuffer, call},
};

/// Returns the torch device: a GPU is the first one that this process sees.
pub const fn of(requested: finetune_contract::Device) -> Device {
    match requested {
        finetune_contract::Device::Cpu => Device::Cpu,
        finetune_contract::Device::Cuda => Device::Cuda(0),
    }
}

/// Returns the torch device if it is available.
///
/// # Errors
/// A [`Failure`] of reason `DeviceUnavailable` with the most likely cause.
pub fn open(requested: finetune_contract::Device) -> Result<Device, Failure> {
    if requested == finetune_contract::Device::Cuda && Cuda::device_count() <= 0 {
        return Err(Failure::new(FailureReason::DeviceUnavailable, unavailable_reason()));
    }
    Ok(of(requested))
}

fn unavailable_reason() -> String {
    let why = if !cfg!(feature = "cuda") {
        "this trainer was built without CUDA: use one built with it (in a cluster, the accelerator's `image` in the operator's settings)"
    } else if !std::path::Path::new("/dev/nvidiactl").exists() {
        "no NVIDIA driver is visible: the node's driver or container toolkit is missing, or the pod asked for no GPU"
    } else {
        "CUDA finds no usable GPU: check `nvidia-smi` on that machine, and CUDA_VISIBLE_DEVICES if it is set"
    };
    format!("the run is planned for a GPU, but {why}")
}

/// Returns the peak GPU memory that torch has reserved so far, in bytes; `None` for the CPU, or if
/// torch does not know.
pub fn peak_memory(device: Device) -> Option<u64> {
    let Device::Cuda(index) = device else { return None };
    #[expect(unsafe_code, reason = "calls a shim for what tch does not bind")]
    // SAFETY: the call returns a number, or writes an error that fits the buffer.
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
    use finetune_contract::FailureReason;
    use tch::{Cuda, Device};

    use super::{open, peak_memory};

    #[test]
    fn a_missing_gpu_is_reported() {
        assert_eq!(open(finetune_contract::Device::Cpu), Ok(Device::Cpu));
        assert_eq!(peak_memory(Device::Cpu), None);
        if Cuda::device_count() == 0 {
            let failure = open(finetune_contract::Device::Cuda).unwrap_err();
            assert_eq!(failure.reason, FailureReason::DeviceUnavailable);
            assert!(failure.message.contains("planned for a GPU, but "), "{failure}");
            assert_eq!(peak_memory(Device::Cuda(0)), None);
        }
    }
}
