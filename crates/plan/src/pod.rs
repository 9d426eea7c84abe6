//! The size of a run's pods.

use finetune_contract::{PreflightReport, RunConfig, Strategy};

use super::{accelerators::Accelerator, run_plan::RunPlan, sizing, units};

/// What a pod needs over what its tensors do, as a factor: the allocator's slack and the error of
/// the prediction.
const MEMORY_SLACK: f64 = 1.25;
/// What the container runtime and small files take of a pod's memory.
const POD_BYTES: u64 = 192 << 20;
/// Host memory of a pod whose tensors are on a device: runtime, staging buffers, the tokenizer.
const DEVICE_HOST_BYTES: u64 = 4 << 30;
/// Shared memory of a pod with a device.
const DEVICE_SHARED_BYTES: u64 = 1 << 30;
/// Scratch space for tokens, documents and small files.
const SCRATCH_BYTES: u64 = 1 << 30;
/// CPU cores of a pod for which the accelerator says none.
const DEFAULT_CPU: f64 = 2.0;

/// What one training pod asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodSize {
    /// CPU, in thousandths of a core.
    pub cpu_millis: i64,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Shared memory, in bytes, part of the memory.
    pub shared_memory_bytes: u64,
    /// Ephemeral storage, in bytes.
    pub storage_bytes: u64,
}

impl PodSize {
    /// Returns the size of the pods of a plan on an accelerator.
    pub(super) fn new(
        plan: &RunPlan,
        accelerator: &Accelerator,
        report: &PreflightReport,
    ) -> PodSize {
        let model = report.model.as_ref();
        let on_disk = model.map_or(0, |model| model.weight_bytes);
        let ranks = u64::from(plan.run_config.parallelism.local_world_size);
        let shared_memory_bytes =
            if accelerator.is_device() { DEVICE_SHARED_BYTES * ranks } else { 0 };
        let memory_bytes = if accelerator.is_device() {
            DEVICE_HOST_BYTES * ranks
                + shared_memory_bytes
                + on_disk
                + verification_bytes(plan, report)
        } else {
            pod_bytes(plan.memory.total(), plan.memory.mapped_weights)
        };
        // The model as fetched, once for all ranks of the pod, and as exported; the checkpoint resumed
        // from, which each rank may have fetched whole and has open, and the one on its way out.
        let checkpoints = (ranks + 1) * plan.checkpoint_bytes;
        let storage_bytes = SCRATCH_BYTES * ranks + 2 * on_disk + checkpoints;
        PodSize {
            cpu_millis: (accelerator.cpu.unwrap_or(DEFAULT_CPU) * 1000.0).round() as i64
                * ranks.cast_signed(),
            memory_bytes,
            shared_memory_bytes,
            storage_bytes,
        }
    }
}

/// Returns the memory of a pod without a device whose tensors take `tensors`. The mapped weights
/// count, though they can be given back: without them they would be read again at every step.
fn pod_bytes(tensors: u64, mapped_weights: u64) -> u64 {
    (tensors as f64 * MEMORY_SLACK) as u64 + mapped_weights + POD_BYTES
}

/// Returns what tensors may take of a pod without a device: the inverse of its size.
pub(super) fn tensor_bytes(pod: u64, mapped_weights: u64) -> u64 {
    (pod.saturating_sub(mapped_weights + POD_BYTES) as f64 / MEMORY_SLACK) as u64
}

/// Returns what verifying a divided run takes of a device's host, where it is computed: the
/// weights, if those in the file are not of the computation's type and must be converted.
fn verification_bytes(plan: &RunPlan, report: &PreflightReport) -> u64 {
    let RunConfig { parallelism, training, .. } = &plan.run_config;
    let Some(model) = report.model.as_ref() else { return 0 };
    let is_on_host = parallelism.strategy == Strategy::Zero3;
    if is_on_host && !sizing::is_computed_as_stored(model, training.dtype) {
        model.parameters * training.dtype.bytes()
    } else {
        0
    }
}

/// Describes what a pod requests, in one line.
pub fn describe(pod: &PodSize) -> String {
    format!(
        "{} CPU, {} memory, {} storage",
        pod.cpu_millis as f64 / 1000.0,
        units::bytes(pod.memory_bytes),
        units::bytes(pod.storage_bytes)
    )
}
