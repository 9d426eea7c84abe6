//! Where a run is planned for.

use finetune_api::FineTuneJob;
use finetune_contract::{Device, MachineFacts, ModelFacts, PreflightReport};

use super::{accelerators::Accelerator, pod, sizing};

/// Where a run is planned for.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// The machine the preflight ran on; how it would do elsewhere is information.
    Local(&'a [Accelerator]),
    /// One accelerator of a cluster.
    Accelerator {
        /// The accelerator.
        accelerator: &'a Accelerator,
        /// The bytes a pod may have, if the user limits them; of the CPU only.
        limit: Option<u64>,
    },
}

impl<'a> Target<'a> {
    /// Returns one of an accelerator for a job.
    pub(super) fn on(accelerator: &'a Accelerator, job: &FineTuneJob) -> Self {
        let limit = job.spec.memory_limit().filter(|_| !accelerator.is_device());
        Self::Accelerator { accelerator, limit }
    }

    pub(super) fn accelerator(self) -> Option<&'a Accelerator> {
        match self {
            Self::Local(_) => None,
            Self::Accelerator { accelerator, .. } => Some(accelerator),
        }
    }

    /// Returns the bytes a pod may have, if the user gives it less than there is.
    pub(super) fn users_limit(self) -> Option<u64> {
        let Self::Accelerator { accelerator, limit } = self else { return None };
        limit.filter(|limit| *limit < accelerator.memory_bytes())
    }

    pub(super) fn machine(self, report: &PreflightReport) -> Option<MachineFacts> {
        match self {
            Self::Local(_) => report.machine.clone(),
            Self::Accelerator { accelerator, .. } => {
                let machine = accelerator.as_machine();
                let memory_bytes = self.users_limit().unwrap_or(machine.memory_bytes);
                Some(MachineFacts { memory_bytes, ..machine })
            }
        }
    }

    pub(super) fn efficiency(self) -> f64 {
        if self.is_device() { sizing::ACCELERATOR_EFFICIENCY } else { sizing::CPU_EFFICIENCY }
    }

    /// Returns how many of `limit` bytes tensors may take. The largest pod holds the mapped weights and
    /// all else too; what is free of this machine does not, and what a user asked for need not.
    pub(super) fn budget(self, limit: u64, model: &ModelFacts) -> u64 {
        match self {
            Self::Accelerator { accelerator, .. } if !accelerator.is_device() => {
                let largest = pod::tensor_bytes(accelerator.memory_bytes(), model.weight_bytes);
                self.users_limit().map_or(largest, |limit| largest.min(sizing::budget(limit)))
            }
            Self::Local(_) | Self::Accelerator { .. } => sizing::budget(limit),
        }
    }

    pub(super) fn is_device(self) -> bool {
        self.accelerator().is_some_and(Accelerator::is_device)
    }

    /// Returns whether another rank brings memory of its own.
    pub(super) fn has_more(self) -> bool {
        self.accelerator().is_some_and(|accelerator| !accelerator.is_device())
    }

    /// Describes how ranks share the place.
    pub(super) fn sharing(self, ranks: u32) -> String {
        match self {
            Self::Local(_) => format!("as asked; each has 1/{ranks} of this machine"),
            Self::Accelerator { accelerator, .. } => {
                let name = &accelerator.name;
                let pods = match accelerator.ranks_per_pod(ranks) {
                    1 => String::new(),
                    all if all == ranks => ", all in one pod".to_owned(),
                    some => format!(", {some} in each of {} pods", ranks / some),
                };
                format!("the fewest that hold it, each on one {name}{pods}")
            }
        }
    }

    /// Returns how many of `ranks` ranks share a pod or machine.
    pub(super) fn ranks_together(self, ranks: u32) -> u32 {
        match self {
            Self::Local(_) => ranks,
            Self::Accelerator { accelerator, .. } => accelerator.ranks_per_pod(ranks),
        }
    }

    /// Returns what the trainer computes on.
    pub(super) fn device(self) -> Device {
        if self.is_device() { Device::Cuda } else { Device::Cpu }
    }

    pub(super) fn name(self) -> String {
        match self {
            Self::Local(_) => "here".to_owned(),
            Self::Accelerator { accelerator, .. } => {
                let within = self.users_limit().map_or("", |_| " within resources.limits.memory");
                format!("on one {}{within}", accelerator.name)
            }
        }
    }
}
