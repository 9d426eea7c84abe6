//! How an attempt ended, from its pods.

use finetune_contract::ExitCode;

use crate::operator::job::observe::{ObservedPod, PodState};

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Termination {
    /// The program ended with a status, and perhaps a report.
    Exited { code: i32, message: String },
    /// The trainer, or that of the pod that is named, was OOM-killed.
    OutOfMemory(String),
    /// The cluster ended it, or it is gone without a trace.
    Disrupted(String),
}

/// Returns how an attempt ended: with several ranks, by the cause. That a rank lost another, or was
/// told to stop with it, is a consequence of how the other one ended.
pub(super) fn termination(pods: &[Option<&ObservedPod>], is_success: bool) -> Termination {
    let mut terminations = pods.iter().enumerate().map(|(rank, pod)| {
        let who = if pods.len() > 1 { format!(" {rank}") } else { String::new() };
        termination_of(*pod, &who, is_success)
    });
    // Rank 0 writes the report of a run that succeeded.
    let decisive =
        if is_success { terminations.next() } else { terminations.min_by_key(causality) };
    decisive.unwrap_or_else(|| Termination::Disrupted("its pod is gone".to_owned()))
}

/// Orders terminations from cause to consequence.
fn causality(termination: &Termination) -> u8 {
    match termination {
        Termination::OutOfMemory(_) => 0,
        Termination::Disrupted(_) => 2,
        Termination::Exited { code, .. } => match ExitCode::from_code(*code) {
            Some(ExitCode::Interrupted) => 3,
            Some(ExitCode::PeerLost) => 4,
            Some(ExitCode::Success) => 5,
            _ => 1,
        },
    }
}

/// Returns how one pod ended; `who` is empty or ` 1`.
fn termination_of(pod: Option<&ObservedPod>, who: &str, is_success: bool) -> Termination {
    let Some(pod) = pod else {
        return Termination::Disrupted(format!("its pod{who} is gone"));
    };
    match &pod.state {
        PodState::Ended { code: Some(0), message, .. } if is_success => {
            Termination::Exited { code: 0, message: message.clone() }
        }
        // A trainer that reports a requested stop was disrupted.
        _ if pod.is_disrupted => {
            Termination::Disrupted(format!("its pod{who} was disrupted by the cluster"))
        }
        PodState::Ended { is_out_of_memory: true, .. } => {
            let of = if who.is_empty() { "" } else { " of pod" };
            Termination::OutOfMemory(format!("the trainer{of}{who}"))
        }
        PodState::Ended { .. } if pod.is_deleting => {
            Termination::Disrupted(format!("its pod{who} was deleted"))
        }
        PodState::Ended { code: Some(code), message, .. } => {
            Termination::Exited { code: *code, message: message.clone() }
        }
        PodState::Ended { code: None, message, .. } => Termination::Disrupted(format!(
            "its pod{who} failed before its container started: {message}"
        )),
        PodState::Unschedulable(_) | PodState::Waiting { .. } | PodState::Running => {
            Termination::Disrupted(format!("its pod{who} was lost"))
        }
    }
}
