//! The first stage: a pod checks model, dataset and output, and its report becomes the plan.

use finetune_api::{AttemptStatus, FineTuneJobStatus, Step};
use finetune_contract::{Parallelism, PreflightReport, Problem, Reason};
use finetune_plan::{
    placement::{self, Placement, Unplaced},
    resolve,
};

use super::{
    Input,
    attempt::{self, AttemptState, Work},
    lines, not_accepted, retry,
    state::{ConditionChange, Finished, InProgress, Planned, State},
    status::{plan_message, plan_status, published_before},
    termination::Termination,
};
use crate::operator::job::conditions::{Kind, Truth};

/// Decides about a job that has no plan yet.
pub(super) fn decide(input: &Input<'_>, status: &FineTuneJobStatus) -> State {
    let config = match resolve::preflight_config(input.job, false) {
        Ok(config) => config,
        Err(problems) => return State::Finished(not_accepted(lines(&problems))),
    };
    let work = Work {
        step: Step::Preflight,
        config: &|| finetune_contract::render(&config),
        plan: None,
        parallelism: Parallelism::SINGLE,
    };
    let (attempt, termination) = match attempt::reconcile(input, status, &work) {
        AttemptState::Ended(attempt, termination) => (attempt, termination),
        AttemptState::Other(state) => return state,
    };
    let (code, message) = match termination {
        Termination::Exited { code, message } => (code, message),
        Termination::OutOfMemory(_) => {
            let message = "the preflight pod ran out of memory on this dataset: an administrator must raise preflight.memoryGiB of the operator's settings";
            return State::Finished(Finished::failed(Reason::OutOfMemory, message).of(attempt));
        }
        Termination::Disrupted(why) => return retry::after_disruption(input, attempt, &why),
    };
    match finetune_contract::parse::<PreflightReport>(&message) {
        Ok(report) => take_report(input, attempt, &report),
        Err(error) => retry::without_report(input, attempt, code, &message, &error.to_string()),
    }
}

fn take_report(input: &Input<'_>, attempt: AttemptStatus, report: &PreflightReport) -> State {
    let is_retryable = |problem: &Problem| problem.reason.exit_code().is_retryable();
    if !report.problems.is_empty() && report.problems.iter().all(is_retryable) {
        let why = lines(&report.problems);
        return retry::after_failure(input, attempt, Reason::StoreUnavailable, &why);
    }
    match placement::place(input.job, report, &input.settings.accelerators) {
        Ok(placement) => planned(&placement),
        Err(unplaced) => refused(attempt, &unplaced, report),
    }
}

/// The run can be trained; if its inputs were published before, no pod trains them again.
fn planned(placement: &Placement) -> State {
    let plan = &placement.plan;
    let already_published =
        plan.already_published.as_ref().zip(plan.nothing_to_train()).map(|(found, message)| {
            let result = published_before(&plan.run_config.output.uri.to_string(), found);
            let reason = Reason::AlreadyPublished;
            Finished::succeeded(reason, reason, message, result)
        });
    State::Planned(Planned {
        plan: plan_status(placement),
        message: plan_message(placement),
        already_published,
    })
}

fn refused(attempt: AttemptStatus, unplaced: &Unplaced, report: &PreflightReport) -> State {
    let hidden = report.problems_total.saturating_sub(report.problems.len() as u64);
    let more = if hidden > 0 { format!("\nand {hidden} more") } else { String::new() };
    let message = format!("{unplaced}{more}");
    let not_planned = |reason| ConditionChange::new(Kind::Planned, Truth::False, reason, &message);
    match unplaced {
        Unplaced::Problems(_) => {
            let reason = unplaced.reason().map_or(Reason::InvalidSpec, Reason::from);
            let accepted = ConditionChange::new(Kind::Accepted, Truth::False, reason, &message);
            State::Finished(Finished::failed(reason, message).with(accepted).of(attempt))
        }
        Unplaced::TooLarge(_) => {
            let reason = Reason::NoAcceleratorFits;
            let end = Finished::failed(reason, &message)
                .with(ConditionChange::accepted())
                .with(not_planned(reason));
            State::Finished(end.of(attempt))
        }
        Unplaced::NoTrainer { .. } => {
            // It waits, and can be planned once the settings have changed.
            let reason = Reason::TrainerImageMissing;
            let waiting = InProgress::new(attempt, reason, &message)
                .with(ConditionChange::accepted())
                .with(not_planned(reason));
            State::InProgress(waiting)
        }
    }
}
