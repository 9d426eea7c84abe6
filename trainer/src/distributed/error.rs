//! What can go wrong between the ranks of a run.

use finetune_contract::FailureReason;

use crate::failure::Failure;

/// Why the ranks of a run cannot work together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Rank 0 cannot be reached, or cannot open its port.
    #[error("the rendezvous of the ranks at {address}:{port} failed: {reason}")]
    Rendezvous {
        /// The host name or address of rank 0.
        address: String,
        /// The port of rank 0.
        port: u16,
        /// The error of the system or of torch.
        reason: String,
    },
    /// Some ranks did not reach the rendezvous.
    #[error(
        "{} of {world_size} did not connect to {address} within {seconds} s: see why in {} log", ranks(missing),
        if missing.len() == 1 { "its" } else { "their" }
    )]
    Missing {
        /// The missing ranks.
        missing: Vec<u32>,
        /// The number of ranks.
        world_size: u32,
        /// The address of the rendezvous.
        address: String,
        /// How long they were waited for.
        seconds: u64,
    },
    /// Another rank ended or stopped responding.
    #[error(
        "{why}; rank {rank} cannot continue without it: restart all ranks to resume the run from its last checkpoint"
    )]
    Lost {
        /// The rank that reports the error.
        rank: u32,
        /// Which rank was lost, and why if that is known.
        why: String,
    },
    /// A collective failed although no rank was lost.
    #[error("rank {rank} could not complete {collective}: {reason}{}", not_joined(stragglers))]
    Collective {
        /// The rank that reports the error.
        rank: u32,
        /// The collective.
        collective: &'static str,
        /// The error of torch.
        reason: String,
        /// The ranks that did not join it.
        stragglers: Vec<u32>,
    },
}

fn ranks(ranks: &[u32]) -> String {
    let numbers: Vec<String> = ranks.iter().map(u32::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, numbers.join(", "))
}

fn not_joined(stragglers: &[u32]) -> String {
    if stragglers.is_empty() {
        String::new()
    } else {
        format!("; {} did not join it", ranks(stragglers))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from_chain(FailureReason::PeerLost, &error)
    }
}
