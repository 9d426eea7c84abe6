//! The conditions of a FineTuneJob's status.

use finetune_api::FineTuneJobStatus;
use finetune_contract::Reason;
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

/// The longest message kept; the CRD allows as much.
const MESSAGE_LIMIT: usize = 4096;

/// The types of condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The summary: the run has succeeded, has failed, or is in progress.
    Succeeded,
    /// The preflight found nothing that makes the run impossible.
    Accepted,
    /// The run has a plan and an accelerator.
    Planned,
    /// The result is in the bucket.
    Published,
    /// The run is stopped by `spec.suspend`.
    Suspended,
}

impl Kind {
    /// All of them, in the order they are shown.
    pub const ALL: [Self; 5] =
        [Self::Succeeded, Self::Accepted, Self::Planned, Self::Published, Self::Suspended];

    /// Returns the condition's type.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "Succeeded",
            Self::Accepted => "Accepted",
            Self::Planned => "Planned",
            Self::Published => "Published",
            Self::Suspended => "Suspended",
        }
    }
}

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "Kubernetes' words")]
pub enum Truth {
    True,
    False,
    Unknown,
}

impl Truth {
    /// Returns the condition's status.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// Finds a condition.
pub fn find(status: &FineTuneJobStatus, kind: Kind) -> Option<&Condition> {
    status.conditions.iter().find(|condition| condition.type_ == kind.as_str())
}

/// Returns whether the run has succeeded or failed for good.
pub fn is_finished(status: &FineTuneJobStatus) -> bool {
    find(status, Kind::Succeeded)
        .is_some_and(|condition| condition.status != Truth::Unknown.as_str())
}

/// Sets a condition; the time of its last transition is kept while its truth stays.
pub fn set(
    status: &mut FineTuneJobStatus,
    now: Timestamp,
    kind: Kind,
    truth: Truth,
    reason: Reason,
    message: &str,
) {
    let truth = truth.as_str();
    let same = find(status, kind).filter(|condition| condition.status == truth);
    let since = same.map_or(Time(now), |condition| condition.last_transition_time.clone());
    let condition = Condition {
        type_: kind.as_str().to_owned(),
        status: truth.to_owned(),
        reason: reason.as_str().to_owned(),
        message: shorten(message),
        last_transition_time: since,
        observed_generation: status.observed_generation,
    };
    match status.conditions.iter_mut().find(|other| other.type_ == condition.type_) {
        Some(other) => *other = condition,
        None => status.conditions.push(condition),
    }
}

/// Sets every condition that is not there to Unknown.
pub fn complete(status: &mut FineTuneJobStatus, now: Timestamp) {
    for kind in Kind::ALL {
        if find(status, kind).is_none() {
            let truth = if kind == Kind::Suspended { Truth::False } else { Truth::Unknown };
            set(status, now, kind, truth, Reason::Pending, "nothing is known yet");
        }
    }
}

fn shorten(message: &str) -> String {
    if message.len() <= MESSAGE_LIMIT {
        return message.to_owned();
    }
    format!("{}…", &message[..message.floor_char_boundary(MESSAGE_LIMIT - 4)])
}
