//! What a run computes on: chosen once, before anything is loaded.

use std::ffi::{c_char, c_int};

use finetune_contract::{Device as Wanted, FailureReason};
use tch::{Cuda, Device};

use crate::failure::Failure;

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
    let why = if !has_cuda() {
        "this trainer was built without CUDA: run one that was (in a cluster `image` of the accelerator in the operator's settings)"
    } else if !std::path::Path::new("/dev/nvidiactl").exists() {
        "no NVIDIA driver is visible: the node's driver or container toolkit is missing, or the pod asked for no GPU"
    } else {
        "CUDA finds no GPU that it can use: see `nvidia-smi` there, and CUDA_VISIBLE_DEVICES if it is set"
    };
    format!("the run is planned for a GPU, but {why}")
}

/// Tells whether this program was built with what GPUs need.
pub const fn has_cuda() -> bool {
    cfg!(feature = "cuda")
}

/// What a GPU's memory is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// The most this process has held of it, as torch counts.
    pub peak: u64,
    /// What nobody holds now.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// Returns the memory of a GPU; `None` for the processor, or if torch cannot tell.
pub fn memory(device: Device) -> Option<DeviceMemory> {
    let Device::Cuda(index) = device else { return None };
    let mut numbers = [0_u64; 3];
    let mut text = [0_u8; 256];
    let error = ErrorBuffer { text: text.as_mut_ptr().cast(), size: text.len() };
    #[expect(unsafe_code, reason = "calls a shim for what tch does not bind")]
    // SAFETY: the call writes three numbers or a text that fits.
    let is_known = unsafe { finetune_device_memory(index as c_int, numbers.as_mut_ptr(), error) };
    let [peak, free, total] = numbers;
    is_known.then_some(DeviceMemory { peak, free, total })
}

#[repr(C)]
struct ErrorBuffer {
    text: *mut c_char,
    size: usize,
}

#[expect(unsafe_code, reason = "calls a shim for what tch does not bind")]
unsafe extern "C" {
    fn finetune_device_memory(device: c_int, numbers: *mut u64, error: ErrorBuffer) -> bool;
}

#[cfg(test)]
mod tests {
    use finetune_contract::{Device as Wanted, FailureReason};
    use tch::{Cuda, Device};

    use super::{memory, open};

    #[test]
    fn a_gpu_that_is_not_there_is_said_to_be_missing() {
        assert_eq!(open(Wanted::Cpu), Ok(Device::Cpu));
        assert_eq!(memory(Device::Cpu), None);
        if Cuda::device_count() == 0 {
            let failure = open(Wanted::Cuda).unwrap_err();
            assert_eq!(failure.reason, FailureReason::DeviceUnavailable);
            assert!(failure.message.contains("planned for a GPU, but "), "{failure}");
            assert_eq!(memory(Device::Cuda(0)), None);
        }
    }
}
