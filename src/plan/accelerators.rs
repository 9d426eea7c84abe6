//! What a run would need on accelerators described in a file.

use finetune_contract::{Dtype, ModelFacts};
use serde::{Deserialize, Serialize};

use super::sizing::{self, Load, Memory};

/// One kind of accelerator, as the user describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Accelerator {
    /// Its name, such as `A100-80GB`.
    pub name: String,
    /// The resource a pod asks for, such as `nvidia.com/gpu`; only a cluster reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_name: Option<String>,
    /// How many a node has; only a cluster reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpus_per_node: Option<u32>,
    /// Its memory, in GiB.
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
    /// Returns the first figure that cannot be one of an accelerator, with its name.
    pub fn fault(&self) -> Option<(&'static str, f64)> {
        let used = if self.has_bf16 {
            ("bf16Tflops", self.bf16_tflops)
        } else {
            ("fp32Tflops", self.fp32_tflops)
        };
        let is_positive = |figure: f64| figure.is_finite() && figure > 0.0;
        [("memoryGiB", self.memory_gi_b), used]
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
pub struct Offer {
    /// The accelerator's name.
    pub name: String,
    /// Predicted memory, the weights included, in bytes.
    pub needed_bytes: u64,
    /// Bytes it lacks; 0 if the run fits.
    pub shortfall_bytes: u64,
    /// How many would hold the sharded state; information only, several ranks are not runnable yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<u64>,
    /// Estimated seconds on one.
    pub seconds: f64,
    /// Estimated cost on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
}

/// Sizes a run of `tokens` positions on `accelerator`.
pub fn offer(accelerator: &Accelerator, model: &ModelFacts, load: &Load, tokens: f64) -> Offer {
    let (dtype, tflops) = if accelerator.has_bf16 {
        (Dtype::Bf16, accelerator.bf16_tflops)
    } else {
        (Dtype::Fp32, accelerator.fp32_tflops)
    };
    let load = Load { dtype, ..*load };
    let memory: Memory = sizing::memory(model, &load);
    // There is nothing to map on a device: frozen weights are copied to it.
    let weights = if load.is_full { 0 } else { model.parameters * dtype.bytes() };
    let needed = memory.total() - memory.weights + weights;
    let available = (accelerator.memory_gi_b * GIB * sizing::USABLE_MEMORY) as u64;
    let shortfall = needed.saturating_sub(available);
    let sharded = weights + memory.trained_state;
    let room = available.saturating_sub(needed - sharded);
    let ranks = (shortfall > 0 && load.is_full && room > 0).then(|| sharded.div_ceil(room));
    let speed = tflops * 1e12 * sizing::ACCELERATOR_EFFICIENCY;
    let seconds = sizing::flops_per_token(model, &load) * tokens / speed;
    Offer {
        name: accelerator.name.clone(),
        needed_bytes: needed,
        shortfall_bytes: shortfall,
        ranks,
        seconds,
        cost: accelerator.price_per_hour.map(|price| price * seconds / 3600.0),
    }
}

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
