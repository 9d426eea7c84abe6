//! What a run would need on accelerators described in a file or in the operator's settings.

use std::collections::BTreeMap;

use finetune_api::{GIB, Toleration};
use finetune_contract::{Dtype, MachineFacts, ModelFacts, Strategy};
use serde::{Deserialize, Serialize};

use super::sizing::{self, Memory, Workload};

/// One kind of accelerator, as the user or the administrator describes it; the CPU is one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Accelerator {
    /// Its name, such as `A100-80GB`.
    pub name: String,
    /// The resource a pod asks for, such as `nvidia.com/gpu`; absent for the CPU. Only a
    /// cluster reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_name: Option<String>,
    /// The image of the trainer that computes on it; needed for a device. Only a cluster reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// How many a node has, and so a pod may have; one if absent. Only a cluster reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpus_per_node: Option<u32>,
    /// CPU cores beside each; only a cluster reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<f64>,
    /// Labels its nodes have; only a cluster reads it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of its nodes that a pod tolerates; only a cluster reads it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Its memory, in GiB; of the CPU, what the largest pod may have.
    pub memory_gi_b: f64,
    /// Its stated bf16 speed, in TFLOP/s.
    pub bf16_tflops: f64,
    /// Its stated fp32 speed, in TFLOP/s.
    pub fp32_tflops: f64,
    /// Whether it multiplies bf16.
    pub has_bf16: bool,
    /// What one costs per hour, in any currency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f64>,
}

impl Accelerator {
    /// Returns whether it is a device with memory of its own, not the CPU.
    pub fn is_device(&self) -> bool {
        self.resource_name.is_some()
    }

    /// Returns the image of the trainer of its own, if it has one.
    pub fn own_trainer(&self) -> Option<&str> {
        self.image.as_deref().filter(|image| !image.trim().is_empty())
    }

    /// Returns whether a trainer for it is known: the CPU's is the operator's own.
    pub fn has_trainer(&self) -> bool {
        !self.is_device() || self.own_trainer().is_some()
    }

    /// Returns how many of `ranks` ranks share a pod: all that a node has devices for, in equal
    /// parts; on CPUs each has a pod of its own.
    pub fn ranks_per_pod(&self, ranks: u32) -> u32 {
        let most = if self.is_device() { self.gpus_per_node.unwrap_or(1) } else { 1 };
        (1..=most.clamp(1, ranks)).rev().find(|count| ranks.is_multiple_of(*count)).unwrap_or(1)
    }

    /// Returns its memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        (self.memory_gi_b * GIB) as u64
    }

    /// Describes it as if a preflight had measured it.
    pub fn as_machine(&self) -> MachineFacts {
        MachineFacts {
            cpu: self.name.clone(),
            cores: self.cpu.map_or(1, |cores| cores.ceil() as u32),
            memory_bytes: self.memory_bytes(),
            native_bf16: self.has_bf16,
            bf16_kernel: None,
            fp32_gflops: Some(self.fp32_tflops * 1e3),
            bf16_gflops: Some(self.bf16_tflops * 1e3),
        }
    }

    /// Returns the first figure that cannot be one of an accelerator, with its name.
    pub fn fault(&self) -> Option<(&'static str, f64)> {
        let used = if self.has_bf16 {
            ("bf16Tflops", self.bf16_tflops)
        } else {
            ("fp32Tflops", self.fp32_tflops)
        };
        let is_positive = |figure: f64| figure.is_finite() && figure > 0.0;
        [("memoryGiB", self.memory_gi_b), used, ("cpu", self.cpu.unwrap_or(1.0))]
            .into_iter()
            .find(|(_, figure)| !is_positive(*figure))
            .or_else(|| {
                let price =
                    self.price_per_hour.filter(|price| !(price.is_finite() && *price >= 0.0));
                price.map(|price| ("pricePerHour", price))
            })
    }
}

/// How a run would do on one accelerator.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Estimate {
    /// The accelerator's name.
    pub name: String,
    /// Predicted memory, the weights included, in bytes.
    pub needed_bytes: u64,
    /// Bytes it lacks; 0 if the run fits.
    pub shortfall_bytes: u64,
    /// How many would hold the sharded state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<u64>,
    /// Estimated seconds on one.
    pub seconds: f64,
    /// Estimated cost on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
}

/// Sizes a run of `tokens` positions on `accelerator`.
pub fn estimate(
    accelerator: &Accelerator,
    model: &ModelFacts,
    workload: &Workload,
    tokens: f64,
) -> Estimate {
    let (dtype, tflops) = if accelerator.has_bf16 {
        (Dtype::Bf16, accelerator.bf16_tflops)
    } else {
        (Dtype::Fp32, accelerator.fp32_tflops)
    };
    let workload =
        Workload { dtype, is_device: true, ranks: 1, strategy: Strategy::None, ..*workload };
    let memory: Memory = sizing::memory(model, &workload);
    let needed = memory.total();
    let available = sizing::budget(accelerator.memory_bytes());
    let shortfall = needed.saturating_sub(available);
    let ranks = if workload.is_full && shortfall > 0 { ranks(&memory, available) } else { None };
    let speed = tflops * 1e12 * sizing::ACCELERATOR_EFFICIENCY;
    let seconds = sizing::flops_per_token(model, &workload) * tokens / speed;
    Estimate {
        name: accelerator.name.clone(),
        needed_bytes: needed,
        shortfall_bytes: shortfall,
        ranks,
        seconds,
        cost: accelerator.price_per_hour.map(|price| price * seconds / 3600.0),
    }
}

/// Returns how many devices would hold a full-parameter run, its state sharded over them; `None` if
/// no number of them would, for what cannot be sharded is too large.
fn ranks(memory: &Memory, available: u64) -> Option<u64> {
    let sharded = memory.weights + memory.trained_state;
    let room = available.saturating_sub(memory.total() - sharded);
    (room > 0).then(|| sharded.div_ceil(room))
}
