//! Decides a run: from the manifest and the preflight's facts to a complete `RunConfig`.
//!
//! Pure: no I/O, no clock. Every choice carries its reason; every fault is a
//! [`finetune_contract::Problem`], and all of them come back at once.
//!
//! In reading order: [`plan`] is one straight list of choices for a [`target`]; `resolve` turns the
//! spec into the words of the contract, `hyperparameters`, `context`, `batch`, `length`, `lora` and
//! `rows` choose what it leaves open, and [`sizing`] predicts what that costs. [`placement`] finds the
//! accelerator of a run in a cluster, [`pod`] the size of its pods, and [`fallbacks`] what follows if
//! memory is short all the same. [`render`] prints a plan.
#![forbid(unsafe_code)]

pub mod accelerators;
mod batch;
pub mod choices;
mod context;
pub mod fallbacks;
mod hyperparameters;
mod length;
mod lora;
pub mod placement;
pub mod pod;
mod problems;
pub mod render;
pub mod resolve;
mod rows;
pub mod run_plan;
pub mod sizing;
pub mod target;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod units;

use finetune_api::FineTuneJob;
use finetune_contract::{
    CONTRACT_VERSION, DatasetSource, ExpectedData, Optimizer, Parallelism, PreflightReport,
    Problem, Recompute, RenderingSettings, RunConfig, Strategy,
    cost::CHECKPOINT_BYTES_PER_PARAMETER,
};

use choices::Choices;
use hyperparameters::{TrainingFacts, dtype, optimizer, training_settings};
use problems::{
    check_patience, foreign_result, invalid, published_before, too_little_memory, warnings,
};
use resolve::Sources;
use run_plan::RunPlan;
use sizing::Workload;
use target::Target;

/// Plans a run of `ranks` ranks: locally they share the machine, elsewhere each has an accelerator of
/// its own.
///
/// # Errors
/// Every reason why it cannot run: the preflight's problems, and what the plan itself finds.
#[expect(clippy::too_many_lines, reason = "one straight list of decisions")]
pub fn plan(
    job: &FineTuneJob,
    report: &PreflightReport,
    target: Target<'_>,
    ranks: u32,
) -> Result<RunPlan, Vec<Problem>> {
    let Sources {
        model: mut model_source,
        dataset: source,
        initial_adapter,
        initial_checkpoint,
        output,
    } = Sources::of(&job.spec)?;
    let machine = target.machine(report);
    let mut problems = report.problems.clone();
    problems.extend(foreign_result(job, report));
    let (Some(model), Some(census)) = (&report.model, &report.train) else {
        if problems.is_empty() {
            problems.push(invalid(
                "preflight",
                "reported neither a problem nor the facts of the model and the training rows",
            ));
        }
        return Err(problems);
    };
    let training = job.spec.training.clone().unwrap_or_default();
    let mut decisions = Choices::default();
    let mut rejected = Choices::default();

    let lora = resolve::lora(&job.spec);
    let found_before = problems.len();
    let trained = lora::trained_parameters(
        model,
        lora.as_ref(),
        report.lora.as_ref(),
        &mut decisions,
        &mut problems,
    );
    if report.problems.iter().any(|problem| problem.location.starts_with("spec.loraConfig")) {
        // The preflight saw the model itself and said it better.
        problems.truncate(found_before);
    }
    if model.added_tokens > 0 {
        decisions.add(
            "addedTokens",
            model.added_tokens,
            format!(
                "new to the tokenizer: their rows start as the mean of all; the vocabulary has {} rows with them",
                model.vocab_size
            ),
        );
    }
    let dtype = dtype(training.dtype, target, machine.as_ref(), &mut decisions);
    let optimizer = optimizer(training.optimizer, &mut decisions);
    let packing = decisions.pick(
        "packing",
        training.packing,
        true,
        "rows share sequences, so no position is padding",
    );
    rows::explain(&source, report, &mut decisions);
    let data =
        context::decide(&training, &source, model, census, packing, &mut decisions, &mut problems);
    check_patience(&training, source.has_validation(), &mut problems);
    let Some(data) = data else { return Err(problems) };
    let limit = machine.as_ref().map(|machine| machine.memory_bytes);
    let sharing = if matches!(target, Target::Local(_)) { u64::from(ranks) } else { 1 };
    let budget = limit.map_or(u64::MAX, |limit| target.budget(limit, model) / sharing);
    if ranks > 1 {
        decisions.add("ranks", ranks, target.sharing(ranks));
    }
    let workload = Workload {
        trained,
        is_full: lora.is_none(),
        dtype,
        optimizer,
        recompute: Recompute::None,
        micro_batch: 1,
        context: u64::from(data.context),
        targets: u64::from(data.targets),
        is_device: target.is_device(),
        ranks: u64::from(ranks),
        strategy: Strategy::None,
    };
    let batch = batch::decide(
        &training,
        model,
        workload,
        data.sequences,
        budget,
        &mut decisions,
        &mut rejected,
    );
    let workload = batch.workload;
    let memory = sizing::memory(model, &workload);
    if let Some(limit) = limit.filter(|_| memory.total() > budget) {
        let small = Workload { optimizer: Optimizer::Adamw8bit, ..workload };
        let small = Some(sizing::memory(model, &small).total()).filter(|small| *small <= budget);
        problems.push(too_little_memory(&memory, &workload, limit, budget, small, target));
    }
    if !problems.is_empty() {
        return Err(problems);
    }

    let global = workload.ranks * workload.micro_batch * u64::from(batch.accumulation);
    let length = length::decide(&training, data.sequences, global, &mut decisions);
    let settings = training_settings(
        &training,
        &batch,
        &TrainingFacts {
            context_length: data.context,
            length,
            packing,
            is_lora: lora.is_some(),
            has_validation: source.has_validation(),
        },
        &mut decisions,
    );
    if let Some(uri) = &initial_adapter {
        decisions.add("initialAdapter", "given", format!("training starts from {uri}"));
    }
    if let Some(uri) = &initial_checkpoint {
        decisions.add("initialCheckpoint", "given", format!("training starts from {uri}"));
    }
    let run_id = resolve::run_id(job);
    if let Some(revision) = &model.resolved_revision {
        decisions.add("revision", revision, "what the hub's revision stands for now, pinned");
        model_source.revision = Some(revision.clone());
    }
    let run_config = RunConfig {
        version: CONTRACT_VERSION,
        checkpoints_uri: output.uri.with_suffix(&format!(".checkpoints/{run_id}")),
        run_id,
        attempt: 0,
        model: model_source,
        dataset: DatasetSource { rendering: rendering(report, &source), ..source },
        lora,
        initial_adapter,
        initial_checkpoint,
        training: settings,
        device: target.device(),
        parallelism: Parallelism {
            world_size: ranks,
            strategy: workload.strategy,
            local_world_size: target.ranks_together(ranks),
        },
        output,
        expected: ExpectedData {
            train_sha256: census.sha256.clone(),
            validation_sha256: report.validation.as_ref().map(|census| census.sha256.clone()),
            sequences: data.sequences,
        },
        predicted_peak_bytes: memory.total(),
        predicted_sent_bytes: (ranks > 1)
            .then(|| sizing::sent_bytes(model, &workload, u64::from(batch.accumulation))),
    };
    let all_sequences = length.total_sequences.unwrap_or(length.total_steps * global);
    let tokens = all_sequences as f64 * data.positions_per_sequence;
    let already_published = published_before(report, &run_config).map_err(|other| vec![other])?;
    Ok(RunPlan {
        already_published,
        checkpoint_bytes: trained * CHECKPOINT_BYTES_PER_PARAMETER,
        fallbacks: fallbacks::list(model, workload, batch.accumulation, target.has_more()),
        seconds: sizing::seconds(machine.as_ref(), target.efficiency(), model, &workload, tokens)
            .map(|seconds| seconds * sharing as f64 / f64::from(ranks)),
        accelerators: match target {
            Target::Local(kinds) => kinds
                .iter()
                .map(|kind| accelerators::estimate(kind, model, &workload, tokens))
                .collect(),
            Target::Accelerator { .. } => Vec::new(),
        },
        efficiency: target.efficiency(),
        place: target.name(),
        run_config,
        decisions: decisions.0,
        rejected: rejected.0,
        warnings: warnings(report, &memory, limit, &workload),
        memory,
        memory_limit: limit,
    })
}

/// The rows of training are rendered on the day those of the preflight were, if it matters.
fn rendering(report: &PreflightReport, source: &DatasetSource) -> RenderingSettings {
    RenderingSettings { template_date: report.template_date.clone(), ..source.rendering.clone() }
}
