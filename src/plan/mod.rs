//! Decides a run: from the manifest and the preflight's facts to a complete `RunConfig`.
//!
//! Pure: no I/O, no clock. Every decision carries its reason; every fault is a [`Problem`], and
//! all of them come back at once.

pub mod accelerators;
mod batch;
mod context;
pub mod fallbacks;
#[cfg(test)]
pub(crate) mod fixture;
mod length;
mod lora;
pub mod placement;
pub mod render;
mod rows;
pub mod settings;
pub mod sizing;

use finetune_contract::{
    CONTRACT_VERSION, DatasetSource, Device, Dtype, ExpectedData, LrScheduler, MachineFacts,
    ModelFacts, Optimizer, OutputState, Parallelism, PreflightReport, Problem, ProblemReason,
    PublishedResult, Recompute, RenderingSettings, RunConfig, RunId, Strategy, TrainingSettings,
    artifact::MANIFEST_NAME, cost::CHECKPOINT_BYTES_PER_PARAMETER, decisive_settings,
    settings_text,
};
use serde::Serialize;

use crate::api::{
    Fallback, FineTuneJob, OUTPUT, OptimizerName, Precision, Recomputation, Scheduler,
};
use accelerators::{Accelerator, Offer};
use sizing::{Load, Memory};

/// A run with nothing left open, and why.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RunPlan {
    /// What the trainer is told.
    pub run_config: RunConfig,
    /// Each value with its reason, in reading order.
    pub decisions: Vec<Decision>,
    /// What was considered and not taken.
    pub rejected: Vec<Decision>,
    /// Memory by term.
    pub memory: Memory,
    /// Bytes of a checkpoint.
    #[serde(skip)]
    pub checkpoint_bytes: u64,
    /// What follows if that is too little, in this order.
    pub fallbacks: Vec<Fallback>,
    /// Where it runs, for people: `here`, or `on one A100-80GB`.
    pub place: String,
    /// Bytes of memory there, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<u64>,
    /// Estimated seconds of training there, if its speed is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The share of the place's matrix speed that is assumed, from 0 to 1.
    pub efficiency: f64,
    /// How the run would do elsewhere.
    pub accelerators: Vec<Offer>,
    /// What the preflight found worth saying.
    pub warnings: Vec<Problem>,
    /// The result at the output, if it was made from this run's very inputs: there is nothing to train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub already_published: Option<PublishedResult>,
}

impl RunPlan {
    /// Says that there is nothing to train, if so.
    pub fn nothing_to_train(&self) -> Option<String> {
        let PublishedResult { run_id, .. } = self.already_published.as_ref()?;
        Some(nothing_trained(&self.run_config.output.uri, run_id))
    }
}

/// Says that a run of the same inputs published their result before.
pub fn nothing_trained(uri: &str, by: &RunId) -> String {
    format!("the same inputs are already published at {uri} (by run {by}); nothing was trained")
}

/// One value and its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// The manifest's word, such as `contextLength`.
    pub field: &'static str,
    /// The value, for people.
    pub value: String,
    /// Why.
    pub reason: String,
}

/// Where a run is planned for.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// The machine the preflight ran on; how it would do elsewhere is information.
    Here(&'a [Accelerator]),
    /// One accelerator of a cluster.
    On {
        /// It.
        accelerator: &'a Accelerator,
        /// The bytes a pod may have, if the user limits them; of the processor only.
        limit: Option<u64>,
    },
}

impl<'a> Place<'a> {
    /// Returns one of an accelerator for a job.
    fn on(accelerator: &'a Accelerator, job: &FineTuneJob) -> Self {
        let limit = job.spec.memory_limit().filter(|_| !accelerator.is_device());
        Self::On { accelerator, limit }
    }

    fn accelerator(self) -> Option<&'a Accelerator> {
        match self {
            Self::Here(_) => None,
            Self::On { accelerator, .. } => Some(accelerator),
        }
    }

    /// Returns the bytes a pod may have, if the user gives it less than there is.
    fn users_limit(self) -> Option<u64> {
        let Self::On { accelerator, limit } = self else { return None };
        limit.filter(|limit| *limit < accelerator.memory_bytes())
    }

    fn machine(self, report: &PreflightReport) -> Option<MachineFacts> {
        match self {
            Self::Here(_) => report.machine.clone(),
            Self::On { accelerator, .. } => {
                let machine = accelerator.as_machine();
                let memory_bytes = self.users_limit().unwrap_or(machine.memory_bytes);
                Some(MachineFacts { memory_bytes, ..machine })
            }
        }
    }

    fn efficiency(self) -> f64 {
        if self.is_device() { sizing::ACCELERATOR_EFFICIENCY } else { sizing::CPU_EFFICIENCY }
    }

    /// Returns how many of `limit` bytes tensors may take. The largest pod holds the mapped weights and
    /// all else too; what is free of this machine does not, and what a user asked for need not.
    fn usable(self, limit: u64, model: &ModelFacts) -> u64 {
        match self {
            Self::On { accelerator, .. } if !accelerator.is_device() => {
                let largest =
                    placement::tensor_bytes(accelerator.memory_bytes(), model.weight_bytes);
                self.users_limit().map_or(largest, |limit| largest.min(sizing::usable(limit)))
            }
            Self::Here(_) | Self::On { .. } => sizing::usable(limit),
        }
    }

    fn is_device(self) -> bool {
        self.accelerator().is_some_and(Accelerator::is_device)
    }

    /// Tells whether another rank brings memory of its own.
    fn has_more(self) -> bool {
        self.accelerator().is_some_and(|accelerator| !accelerator.is_device())
    }

    /// Says how ranks share the place.
    fn sharing(self, ranks: u32) -> String {
        match self {
            Self::Here(_) => format!("as asked; each has 1/{ranks} of this machine"),
            Self::On { accelerator, .. } => {
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
    fn ranks_together(self, ranks: u32) -> u32 {
        match self {
            Self::Here(_) => ranks,
            Self::On { accelerator, .. } => accelerator.ranks_per_pod(ranks),
        }
    }

    /// Returns what the trainer computes on.
    fn device(self) -> Device {
        if self.is_device() { Device::Cuda } else { Device::Cpu }
    }

    fn name(self) -> String {
        match self {
            Self::Here(_) => "here".to_owned(),
            Self::On { accelerator, .. } => {
                let within = self.users_limit().map_or("", |_| " within resources.limits.memory");
                format!("on one {}{within}", accelerator.name)
            }
        }
    }
}

/// The decisions so far.
#[derive(Debug, Default)]
struct Decisions(Vec<Decision>);

impl Decisions {
    fn add(
        &mut self,
        field: &'static str,
        value: impl std::fmt::Display,
        reason: impl Into<String>,
    ) {
        self.0.push(Decision { field, value: value.to_string(), reason: reason.into() });
    }

    /// Takes the user's value or the default, and notes which.
    fn pick<T: ToString>(
        &mut self,
        field: &'static str,
        set: Option<T>,
        default: T,
        why: &str,
    ) -> T {
        let reason = if set.is_some() { "set in the manifest" } else { why };
        let value = set.unwrap_or(default);
        self.add(field, value.to_string(), reason);
        value
    }
}

fn invalid(location: &str, message: impl Into<String>) -> Problem {
    Problem {
        reason: ProblemReason::InvalidSpec,
        location: location.to_owned(),
        message: message.into(),
    }
}

/// Plans a run of one rank.
///
/// # Errors
/// As [`plan_over`].
pub fn plan(
    job: &FineTuneJob,
    report: &PreflightReport,
    place: Place<'_>,
) -> Result<RunPlan, Vec<Problem>> {
    plan_over(1, job, report, place)
}

/// Plans a run of `ranks` ranks: on [`Place::Here`] they share the machine, elsewhere each has a
/// place of its own.
///
/// # Errors
/// Every reason why it cannot run: the preflight's problems, and what the plan itself finds.
#[expect(clippy::too_many_lines, reason = "one straight list of decisions")]
pub fn plan_over(
    ranks: u32,
    job: &FineTuneJob,
    report: &PreflightReport,
    place: Place<'_>,
) -> Result<RunPlan, Vec<Problem>> {
    let machine = place.machine(report);
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
    let mut decisions = Decisions::default();
    let mut rejected = Decisions::default();

    let lora = settings::lora(&job.spec);
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
    let dtype = dtype(training.dtype, place, machine.as_ref(), &mut decisions);
    let optimizer = optimizer(training.optimizer, &mut decisions);
    let packing = decisions.pick(
        "packing",
        training.packing,
        true,
        "rows share sequences, so no position is padding",
    );
    let source = settings::dataset(&job.spec);
    rows::explain(&source, report, &mut decisions);
    let data =
        context::decide(&training, &source, model, census, packing, &mut decisions, &mut problems);
    check_patience(&training, source.has_validation(), &mut problems);
    let Some(data) = data else { return Err(problems) };
    let limit = machine.as_ref().map(|machine| machine.memory_bytes);
    let sharing = if matches!(place, Place::Here(_)) { u64::from(ranks) } else { 1 };
    let usable = limit.map_or(u64::MAX, |limit| place.usable(limit, model) / sharing);
    if ranks > 1 {
        decisions.add("ranks", ranks, place.sharing(ranks));
    }
    let load = Load {
        trained,
        is_full: lora.is_none(),
        dtype,
        optimizer,
        recompute: Recompute::None,
        micro_batch: 1,
        context: u64::from(data.context),
        targets: u64::from(data.targets),
        is_device: place.is_device(),
        ranks: u64::from(ranks),
        strategy: Strategy::None,
    };
    let batch = batch::decide(
        &training,
        model,
        load,
        data.sequences,
        usable,
        &mut decisions,
        &mut rejected,
    );
    let load = batch.load;
    let memory = sizing::memory(model, &load);
    if let Some(limit) = limit.filter(|_| memory.total() > usable) {
        let small = Load { optimizer: Optimizer::Adamw8bit, ..load };
        let small = Some(sizing::memory(model, &small).total()).filter(|small| *small <= usable);
        problems.push(too_little_memory(&memory, &load, limit, usable, small, place));
    }
    if !problems.is_empty() {
        return Err(problems);
    }

    let global = load.ranks * load.micro_batch * u64::from(batch.accumulation);
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
    let initial_adapter = settings::initial_adapter(&job.spec);
    if let Some(uri) = &initial_adapter {
        decisions.add("initialAdapter", "given", format!("training starts from {uri}"));
    }
    let initial_checkpoint = settings::initial_checkpoint(&job.spec);
    if let Some(uri) = &initial_checkpoint {
        decisions.add("initialCheckpoint", "given", format!("training starts from {uri}"));
    }
    let run_id = settings::run_id(job);
    let mut model_source = settings::model(&job.spec);
    if let Some(revision) = &model.resolved_revision {
        decisions.add("revision", revision, "what the hub's revision stands for now, pinned");
        model_source.revision = Some(revision.clone());
    }
    let output = settings::output(&job.spec);
    let run_config = RunConfig {
        version: CONTRACT_VERSION,
        checkpoints_uri: format!("{}.checkpoints/{run_id}", output.uri.trim_end_matches('/')),
        run_id,
        attempt: 0,
        model: model_source,
        dataset: DatasetSource { rendering: rendering(report, &source), ..source },
        lora,
        initial_adapter,
        initial_checkpoint,
        training: settings,
        device: place.device(),
        parallelism: Parallelism {
            world_size: ranks,
            strategy: load.strategy,
            local_world_size: place.ranks_together(ranks),
        },
        output,
        expected: ExpectedData {
            train_sha256: census.sha256.clone(),
            validation_sha256: report.validation.as_ref().map(|census| census.sha256.clone()),
            sequences: data.sequences,
        },
        predicted_peak_bytes: memory.total(),
        predicted_sent_bytes: (ranks > 1)
            .then(|| sizing::sent_bytes(model, &load, u64::from(batch.accumulation))),
    };
    let all_sequences = length.total_sequences.unwrap_or(length.total_steps * global);
    let tokens = all_sequences as f64 * data.positions_per_sequence;
    let already_published = published_before(report, &run_config).map_err(|other| vec![other])?;
    Ok(RunPlan {
        already_published,
        checkpoint_bytes: trained * CHECKPOINT_BYTES_PER_PARAMETER,
        fallbacks: fallbacks::ladder(model, load, batch.accumulation, place.has_more()),
        seconds: seconds(machine.as_ref(), place.efficiency(), model, &load, tokens)
            .map(|seconds| seconds * sharing as f64 / f64::from(ranks)),
        accelerators: match place {
            Place::Here(kinds) => {
                kinds.iter().map(|kind| accelerators::offer(kind, model, &load, tokens)).collect()
            }
            Place::On { .. } => Vec::new(),
        },
        efficiency: place.efficiency(),
        place: place.name(),
        run_config,
        decisions: decisions.0,
        rejected: rejected.0,
        warnings: warnings(report, &memory, limit, &load),
        memory,
        memory_limit: limit,
    })
}

fn check_patience(
    training: &crate::api::Training,
    has_validation: bool,
    problems: &mut Vec<Problem>,
) {
    if training.early_stopping_patience.is_some_and(|patience| patience > 0) && !has_validation {
        problems.push(invalid(
            "spec.training.earlyStoppingPatience",
            "needs dataset.validation, which is not set: there is no loss to watch; set it or remove the patience",
        ));
    }
}

/// Takes the optimizer asked for: its noise is not ours to choose.
fn optimizer(set: Option<OptimizerName>, decisions: &mut Decisions) -> Optimizer {
    match set {
        Some(OptimizerName::Adamw8bit) => {
            let reason = "set in the manifest; moments of a byte each";
            let optimizer = Optimizer::Adamw8bit;
            decisions.add("optimizer", word(&optimizer), reason);
            optimizer
        }
        Some(OptimizerName::Adamw) | None => Optimizer::Adamw,
    }
}

/// What the hyper-parameters' defaults depend on.
struct TrainingFacts {
    context_length: u32,
    length: length::Length,
    packing: bool,
    is_lora: bool,
    has_validation: bool,
}

fn training_settings(
    training: &crate::api::Training,
    batch: &batch::Batch,
    facts: &TrainingFacts,
    decisions: &mut Decisions,
) -> TrainingSettings {
    let TrainingFacts { context_length, length, packing, is_lora, has_validation } = facts;
    let length::Length { total_steps, total_sequences } = length;
    let load = batch.load;
    let tenth = (total_steps / 10).max(1);
    let learning_rate = decisions.pick(
        "learningRate",
        training.learning_rate,
        if *is_lora { 1e-4 } else { 1e-5 },
        if *is_lora { "usual for LoRA" } else { "usual when every parameter moves" },
    );
    let whole = |value: Option<i64>| value.map(i64::unsigned_abs);
    let scheduler = match training.lr_scheduler_type {
        Some(Scheduler::Linear) => LrScheduler::Linear,
        Some(Scheduler::Constant) => LrScheduler::Constant,
        Some(Scheduler::Cosine) | None => LrScheduler::Cosine,
    };
    decisions.add(
        "lrSchedulerType",
        word(&scheduler),
        if training.lr_scheduler_type.is_some() {
            "set in the manifest"
        } else {
            "falls smoothly to zero"
        },
    );
    TrainingSettings {
        context_length: *context_length,
        total_steps: *total_steps,
        total_sequences: *total_sequences,
        learning_rate,
        lr_scheduler_type: scheduler,
        num_warmup_steps: decisions.pick(
            "numWarmupSteps",
            whole(training.num_warmup_steps),
            (total_steps / 10).min(10),
            "10 % of the steps, at most 10",
        ),
        weight_decay: decisions.pick(
            "weightDecay",
            training.weight_decay,
            0.0,
            "fine-tuning is short",
        ),
        max_grad_norm: decisions.pick(
            "maxGradNorm",
            training.max_grad_norm,
            1.0,
            "keeps a rare row from throwing the weights",
        ),
        micro_batch_size: load.micro_batch as u32,
        gradient_accumulation_steps: batch.accumulation,
        packing: *packing,
        optimizer: load.optimizer,
        dtype: load.dtype,
        recompute: load.recompute,
        seed: decisions.pick(
            "seed",
            whole(training.seed),
            settings::DEFAULT_SEED,
            "fixed, so that a run can be repeated",
        ),
        evaluation_steps: if *has_validation {
            decisions.pick(
                "evaluationSteps",
                whole(training.evaluation_steps),
                tenth,
                "a tenth of the steps",
            )
        } else {
            whole(training.evaluation_steps).unwrap_or(0)
        },
        early_stopping_patience: training.early_stopping_patience.unwrap_or(0).unsigned_abs(),
        checkpoint_steps: checkpoint_steps(whole(training.checkpoint_steps), decisions),
        num_checkpoints_to_keep: training.num_checkpoints_to_keep.unwrap_or(2).unsigned_abs(),
        max_time_seconds: whole(training.max_time_seconds).inspect(|seconds| {
            let reason = "set in the manifest; then the best so far is published";
            decisions.add("maxTimeSeconds", seconds, reason);
        }),
    }
}

/// Leaves the moments of checkpoints to the trainer, which knows what they cost, unless told.
fn checkpoint_steps(set: Option<u64>, decisions: &mut Decisions) -> Option<u64> {
    match set {
        Some(steps) => decisions.add("checkpointSteps", steps, "set in the manifest"),
        None => decisions.add(
            "checkpointSteps",
            "by time",
            "before 30 s of work would be lost, while that takes at most 1 % of the time",
        ),
    }
    set
}

fn dtype(
    set: Option<Precision>,
    place: Place<'_>,
    machine: Option<&MachineFacts>,
    decisions: &mut Decisions,
) -> Dtype {
    let native = machine.is_some_and(|machine| machine.native_bf16);
    let who = match place {
        Place::On { accelerator, .. } if accelerator.is_device() => accelerator.name.as_str(),
        Place::Here(_) | Place::On { .. } => "this processor",
    };
    let (dtype, reason) = match (set, native) {
        (Some(Precision::Bf16), true) => (Dtype::Bf16, "set in the manifest".to_owned()),
        (Some(Precision::Bf16), false) => (
            Dtype::Bf16,
            format!("set in the manifest; slow, {who} does not multiply bf16 natively"),
        ),
        (Some(Precision::Fp32), _) => (Dtype::Fp32, "set in the manifest".to_owned()),
        (Some(Precision::Auto) | None, true) => {
            let kernel = machine.and_then(|machine| machine.bf16_kernel.as_deref());
            let by = kernel.map_or(String::new(), |kernel| format!(", here by {kernel}"));
            (Dtype::Bf16, format!("{who} multiplies bf16 natively{by}"))
        }
        (Some(Precision::Auto) | None, false) => {
            (Dtype::Fp32, format!("{who} does not multiply bf16 natively"))
        }
    };
    decisions.add("dtype", word(&dtype), reason);
    dtype
}

fn seconds(
    machine: Option<&MachineFacts>,
    efficiency: f64,
    model: &ModelFacts,
    load: &Load,
    tokens: f64,
) -> Option<f64> {
    let machine = machine?;
    let gflops = match load.dtype {
        Dtype::Bf16 => machine.bf16_gflops,
        Dtype::Fp32 => machine.fp32_gflops,
    }?;
    let speed = gflops * 1e9 * efficiency;
    (speed > 0.0).then(|| sizing::flops_per_token(model, load) * tokens / speed)
}

fn too_little_memory(
    memory: &Memory,
    load: &Load,
    limit: u64,
    usable: u64,
    with_adamw_8bit: Option<u64>,
    place: Place<'_>,
) -> Problem {
    let who = if load.ranks > 1 {
        format!("each of {} ranks needs", load.ranks)
    } else {
        "the run needs".to_owned()
    };
    let where_ = place.name();
    let mut advice = Vec::new();
    if place.users_limit().is_some() {
        advice.push("raise resources.limits.memory".to_owned());
    }
    if load.micro_batch > 1 {
        advice.push("lower training.trainBatchSizePerDevice".to_owned());
    }
    if load.recompute == Recompute::None {
        advice.push("set training.recompute: block".to_owned());
    }
    if load.ranks > 1 && matches!(place, Place::Here(_)) {
        advice.push("use fewer ranks, which share this machine's memory".to_owned());
    }
    if load.is_full {
        advice.extend(with_adamw_8bit.map(|bytes| {
            format!("set training.optimizer: adamw8bit, with which it is {}", render::bytes(bytes))
        }));
        advice.push("set loraConfig: {}".to_owned());
    }
    advice.push(format!("lower training.contextLength below {}", load.context));
    if place.users_limit().is_none() {
        advice.push("use a machine with more memory".to_owned());
    }
    invalid(
        "memory",
        format!(
            "{who} {}, but only {} of the {} {where_} may be used, {} too little: {}",
            render::bytes(memory.total()),
            render::bytes(usable),
            render::bytes(limit),
            render::bytes(memory.total() - usable),
            advice.join(", or "),
        ),
    )
}

/// Returns the problem of an output that holds a result of other inputs, unless the preflight said it.
fn foreign_result(job: &FineTuneJob, report: &PreflightReport) -> Option<Problem> {
    let output = &job.spec.output;
    let is_foreign = report.output == Some(OutputState::OtherInputs)
        && output.overwrite != Some(true)
        && report.problems.iter().all(|problem| problem.reason != ProblemReason::OutputExists);
    is_foreign.then(|| Problem {
        reason: ProblemReason::OutputExists,
        location: OUTPUT.to_owned(),
        message: format!(
            "{} holds a result of other inputs: choose another uri, or set output.overwrite: true to replace it",
            output.uri
        ),
    })
}

/// Returns the result at the output if its settings are those of the run, too.
fn published_before(
    report: &PreflightReport,
    config: &RunConfig,
) -> Result<Option<PublishedResult>, Problem> {
    let Some(published) = &report.published else { return Ok(None) };
    let settings = settings_text(&decisive_settings(config));
    let is_same = published.settings_sha256 == settings::sha256_hex(settings.as_bytes());
    match (is_same, config.output.overwrite) {
        (true, _) => Ok(Some(published.clone())),
        (false, true) => Ok(None),
        (false, false) => Err(Problem {
            reason: ProblemReason::OutputExists,
            location: OUTPUT.to_owned(),
            message: format!(
                "{} holds a result of the same rows and model, made with other settings (by run {}; they are in its {MANIFEST_NAME}): choose another uri, or set output.overwrite: true to replace it",
                config.output.uri, published.run_id
            ),
        }),
    }
}

/// The rows of training are rendered on the day those of the preflight were, if it matters.
fn rendering(report: &PreflightReport, source: &DatasetSource) -> RenderingSettings {
    RenderingSettings { template_date: report.template_date.clone(), ..source.rendering.clone() }
}

/// Adds what only the plan can know: weights that will not stay in memory while training.
fn warnings(
    report: &PreflightReport,
    memory: &Memory,
    limit: Option<u64>,
    load: &Load,
) -> Vec<Problem> {
    let mut warnings = report.warnings.clone();
    let room = limit.filter(|_| !load.is_device).map(|limit| limit.saturating_sub(memory.total()));
    if let Some(room) = room.filter(|room| *room < memory.mapped_weights) {
        warnings.push(invalid(
            "memory",
            format!(
                "{} of weights are read in place, but only {} of memory stay free for them: they will be read from disk again and again, and the run will be slow",
                render::bytes(memory.mapped_weights),
                render::bytes(room),
            ),
        ));
    }
    warnings
}

/// Returns a word of the contract as it is written in a manifest.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

fn recompute(set: Option<Recomputation>) -> Option<Recompute> {
    match set {
        Some(Recomputation::None) => Some(Recompute::None),
        Some(Recomputation::Block) => Some(Recompute::Block),
        Some(Recomputation::Auto) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use finetune_contract::ModelFacts;

    use super::{Place, accelerators::Accelerator, fixture, plan, plan_over, render};
    use crate::manifest;

    const GB: u64 = 1_000_000_000;

    fn check(model: ModelFacts, memory_bytes: u64, lines: &str) -> String {
        let text = format!("{}{lines}", include_str!("../../examples/minimal.yaml"));
        let job = manifest::parse(&text).unwrap();
        let accelerator = Accelerator {
            name: "Test 80GB".to_owned(),
            memory_gi_b: 80.0,
            bf16_tflops: 300.0,
            fp32_tflops: 20.0,
            has_bf16: true,
            price_per_hour: Some(2.0),
            ..Accelerator::default()
        };
        match plan(&job, &fixture::report(model, memory_bytes), Place::Here(&[accelerator])) {
            Ok(plan) => render::text(&plan),
            Err(problems) => {
                problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
            }
        }
    }

    #[test]
    fn plans_lora_on_a_small_model() {
        insta::assert_snapshot!(check(fixture::smollm2(), 8 * GB, "  loraConfig: {}\n"), @r"
        Plan of minimal-2598f87e
          method                     LoRA            loraConfig is given: 2442240 trained parameters, 1.82 % of the model
          r                          8               updates are scaled by 2
          targetModules              all-linear      q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
          dtype                      bf16            this processor multiplies bf16 natively
          packing                    true            rows share sequences, so no position is padding
          contextLength              256             holds 95 % of the rows; 40 of 1000 rows are longer (4000 of 150000 tokens)
          recompute                  none            fits the memory, and computes nothing twice
          trainBatchSizePerDevice    8               as many as fit the memory, at most 8
          gradientAccumulationSteps  2               16 sequences a step
          numEpochs                  3               as many as give about 100 steps, from 1 to 10
          steps                      111             590 sequences × 3 epochs / 16 a step; the last has the 10 that are left
          learningRate               0.0001          usual for LoRA
          lrSchedulerType            cosine          falls smoothly to zero
          numWarmupSteps             10              10 % of the steps, at most 10
          weightDecay                0               fine-tuning is short
          maxGradNorm                1               keeps a rare row from throwing the weights
          seed                       42              fixed, so that a run can be repeated
          checkpointSteps            by time         before 30 s of work would be lost, while that takes at most 1 % of the time

        Memory
          trained state                   44 MB
          activations                    710 MB
          output head                     50 MB
          temporaries                     58 MB
          checkpoint                      29 MB
          runtime                         75 MB
          peak                           967 MB  of 8.00 GB here
          if that is too little      trainBatchSizePerDevice 4, 2, 1; then recompute block
          weights, mapped                269 MB  read in place, given back under pressure

        Time  about 20 min here, at 50 % of its matrix speed

        Elsewhere (assuming 35 % of the stated speed)
          Test 80GB                     2.89 GB  fits, about 2 s, costs 0.00
        ");
    }

    #[test]
    fn computes_blocks_again_when_memory_is_short() {
        insta::assert_snapshot!(check(fixture::smollm2(), GB / 2, "  loraConfig: {}\n  training: {contextLength: 1024}\n"), @r"
        Plan of minimal-70ff94e5
          method                     LoRA            loraConfig is given: 2442240 trained parameters, 1.82 % of the model
          r                          8               updates are scaled by 2
          targetModules              all-linear      q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
          dtype                      bf16            this processor multiplies bf16 natively
          packing                    true            rows share sequences, so no position is padding
          contextLength              1024            set in the manifest; cuts nothing, the longest row has 700 tokens
          recompute                  block           the only way to fit the memory; about a third slower
          trainBatchSizePerDevice    2               as many as fit the memory, at most 8
          gradientAccumulationSteps  8               16 sequences a step
          numEpochs                  10              as many as give about 100 steps, from 1 to 10
          steps                      94              150 sequences × 10 epochs / 16 a step; the last has the 12 that are left
          learningRate               0.0001          usual for LoRA
          lrSchedulerType            cosine          falls smoothly to zero
          numWarmupSteps             9               10 % of the steps, at most 10
          weightDecay                0               fine-tuning is short
          maxGradNorm                1               keeps a rare row from throwing the weights
          seed                       42              fixed, so that a run can be repeated
          checkpointSteps            by time         before 30 s of work would be lost, while that takes at most 1 % of the time

        Not taken
          recompute                  none            583 MB do not fit 450 MB
          trainBatchSizePerDevice    8               714 MB do not fit 450 MB
          trainBatchSizePerDevice    4               457 MB do not fit 450 MB

        Memory
          trained state                   44 MB
          activations                     71 MB
          output head                     50 MB
          temporaries                     58 MB
          checkpoint                      29 MB
          runtime                         75 MB
          peak                           328 MB  of 500 MB here
          if that is too little      trainBatchSizePerDevice 1
          weights, mapped                269 MB  read in place, given back under pressure

        Time  about 1.7 h here, at 50 % of its matrix speed

        Elsewhere (assuming 35 % of the stated speed)
          Test 80GB                     2.25 GB  fits, about 12 s, costs 0.01

        Warnings
          memory: 269 MB of weights are read in place, but only 172 MB of memory stay free for them: they will be read from disk again and again, and the run will be slow
        ");
    }

    #[test]
    fn says_by_how_much_a_large_model_does_not_fit() {
        insta::assert_snapshot!(check(fixture::llama_8b(), 64 * GB, ""), @"memory: the run needs 145.90 GB, but only 57.60 GB of the 64.00 GB here may be used, 88.30 GB too little: set loraConfig: {}, or lower training.contextLength below 256, or use a machine with more memory");
        insta::assert_snapshot!(check(fixture::smollm2(), 2400 << 20, ""), @"memory: the run needs 2.63 GB, but only 2.26 GB of the 2.52 GB here may be used, 363 MB too little: set training.optimizer: adamw8bit, with which it is 1.82 GB, or set loraConfig: {}, or lower training.contextLength below 256, or use a machine with more memory");
        let small = check(fixture::smollm2(), 2400 << 20, "  training: {optimizer: adamw8bit}\n");
        let lines: Vec<_> = small.lines().filter(|line| line.contains("optimizer")).collect();
        assert_eq!(lines.len(), 1, "{small}");
        assert!(lines[0].contains("adamw8bit       set in the manifest; moments of a byte each"));
    }

    #[test]
    fn plans_lora_on_a_large_model() {
        insta::assert_snapshot!(check(fixture::llama_8b(), 64 * GB, "  loraConfig: {r: 16}\n"), @r"
        Plan of minimal-813dde86
          method                     LoRA            loraConfig is given: 41943040 trained parameters, 0.52 % of the model
          r                          16              updates are scaled by 1
          targetModules              all-linear      q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
          dtype                      bf16            this processor multiplies bf16 natively
          packing                    true            rows share sequences, so no position is padding
          contextLength              256             holds 95 % of the rows; 40 of 1000 rows are longer (4000 of 150000 tokens)
          recompute                  none            fits the memory, and computes nothing twice
          trainBatchSizePerDevice    8               as many as fit the memory, at most 8
          gradientAccumulationSteps  2               16 sequences a step
          numEpochs                  3               as many as give about 100 steps, from 1 to 10
          steps                      111             590 sequences × 3 epochs / 16 a step; the last has the 10 that are left
          learningRate               0.0001          usual for LoRA
          lrSchedulerType            cosine          falls smoothly to zero
          numWarmupSteps             10              10 % of the steps, at most 10
          weightDecay                0               fine-tuning is short
          maxGradNorm                1               keeps a rare row from throwing the weights
          seed                       42              fixed, so that a run can be repeated
          checkpointSteps            by time         before 30 s of work would be lost, while that takes at most 1 % of the time

        Memory
          trained state                  755 MB
          activations                   6.18 GB
          output head                    131 MB
          temporaries                    512 MB
          checkpoint                     503 MB
          runtime                         75 MB
          peak                          8.16 GB  of 64.00 GB here
          if that is too little      trainBatchSizePerDevice 4, 2, 1; then recompute block
          weights, mapped              16.06 GB  read in place, given back under pressure

        Time  about 19.7 h here, at 50 % of its matrix speed

        Elsewhere (assuming 35 % of the stated speed)
          Test 80GB                    26.50 GB  fits, about 2 min, costs 0.08
        ");
    }

    fn check_ranks(ranks: u32, memory_bytes: u64, lines: &str) -> String {
        let text = format!("{}{lines}", include_str!("../../examples/minimal.yaml"));
        let job = manifest::parse(&text).unwrap();
        let report = fixture::report(fixture::smollm2(), memory_bytes);
        match plan_over(ranks, &job, &report, Place::Here(&[])) {
            Ok(plan) => render::text(&plan)
                .lines()
                .filter(|line| {
                    let told = ["ranks", "strategy", "recompute", "trainBatch", "gradientAcc"];
                    let told = told.iter().any(|field| line.trim_start().starts_with(field));
                    told || ["trained state", "gathered", "peak", "sent"]
                        .iter()
                        .any(|term| line.contains(term))
                })
                .collect::<Vec<_>>()
                .join("\n"),
            Err(problems) => problems.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn ranks_hold_everything_while_it_fits_each() {
        insta::assert_snapshot!(check_ranks(2, 8 * GB, "  loraConfig: {}\n"), @r"
        ranks                      2               as asked; each has 1/2 of this machine
        strategy                   ddp             each rank holds everything and sends gradients; of what fits, what sends least
        recompute                  none            fits the memory, and computes nothing twice
        trainBatchSizePerDevice    8               as many as fit the memory, at most 8
        gradientAccumulationSteps  1               16 sequences a step over 2 ranks
        strategy                   zero3           sends 208 MB in a step where 10 MB are enough
        trained state                   44 MB
        peak of each rank              967 MB  of 8.00 GB here
        sent in a step                  10 MB  by each rank
        ");
    }

    #[test]
    fn ranks_divide_what_does_not_fit_each() {
        insta::assert_snapshot!(check_ranks(2, 5 * GB, ""), @r"
        ranks                      2               as asked; each has 1/2 of this machine
        strategy                   zero3           divides moments, gradients and weights; of what fits, what sends least
        recompute                  none            fits the memory, and computes nothing twice
        trainBatchSizePerDevice    4               as many as fit the memory, at most 8
        gradientAccumulationSteps  2               16 sequences a step over 2 ranks
        strategy                   zero1           2.42 GB do not fit 2.25 GB
        strategy                   zero2           sends 1.04 GB in a step where 913 MB are enough
        trainBatchSizePerDevice    8               2.52 GB do not fit 2.25 GB
        trained state                 1.21 GB
        gathered units                 326 MB
        peak of each rank             2.14 GB  of 5.00 GB here
        sent in a step                 913 MB  by each rank
        ");
    }

    #[test]
    fn says_when_no_division_fits() {
        insta::assert_snapshot!(check_ranks(4, 4 * GB, ""), @"memory: each of 4 ranks needs 1.14 GB, but only 900 MB of the 4.00 GB here may be used, 237 MB too little: use fewer ranks, which share this machine's memory, or set loraConfig: {}, or lower training.contextLength below 256, or use a machine with more memory");
    }

    #[test]
    fn a_step_has_the_same_sequences_over_any_power_of_two_of_ranks() {
        let job = manifest::parse(include_str!("../../examples/minimal.yaml")).unwrap();
        let report = fixture::report(fixture::smollm2(), 64 * GB);
        for ranks in [1, 2, 4, 8, 16] {
            let plan = plan_over(ranks, &job, &report, Place::Here(&[])).unwrap();
            assert_eq!(plan.run_config.global_batch_size(), 16, "{ranks} ranks");
        }
    }

    #[test]
    fn returns_every_reason_at_once() {
        let lines =
            "  loraConfig: {}\n  training: {contextLength: 9000, earlyStoppingPatience: 2}\n";
        insta::assert_snapshot!(check(fixture::smollm2(), 8 * GB, lines), @r#"
spec.training.contextLength: is 9000, but llama was made for at most 8192 positions: lower it
spec.training.earlyStoppingPatience: needs dataset.validation, which is not set: there is no loss to watch; set it or remove the patience
    "#);
    }

    proptest::proptest! {
        #[test]
        fn never_plans_over_the_memory(
            megabytes in 100_u64..8000, is_lora in proptest::bool::ANY, context in 0_usize..4,
        ) {
            let context = [128, 256, 512, 1024][context];
            let lora = if is_lora { "  loraConfig: {}\n" } else { "" };
            let minimal = include_str!("../../examples/minimal.yaml");
            let text = format!("{minimal}{lora}  training: {{contextLength: {context}}}\n");
            let job = manifest::parse(&text).unwrap();
            let bytes = megabytes * 1_000_000;
            match plan(&job, &fixture::report(fixture::smollm2(), bytes), Place::Here(&[])) {
                Ok(plan) => {
                    let usable = (bytes as f64 * super::sizing::USABLE_MEMORY) as u64;
                    proptest::prop_assert!(plan.memory.total() <= usable);
                    proptest::prop_assert_eq!(plan.memory.total(), plan.run_config.predicted_peak_bytes);
                }
                Err(problems) => {
                    proptest::prop_assert!(problems.iter().all(|problem| problem.location == "memory"));
                }
            }
        }
    }
}
