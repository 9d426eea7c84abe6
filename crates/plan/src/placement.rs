//! Chooses the accelerator of a run in a cluster, and the size of its pod.

use finetune_api::FineTuneJob;
use finetune_contract::{Parallelism, PreflightReport, Problem, ProblemReason};

use super::{
    accelerators::Accelerator, choices::Choice, plan, pod::PodSize, problems::invalid,
    run_plan::RunPlan, target::Target, units,
};

/// A run with its accelerator.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The run.
    pub plan: RunPlan,
    /// The accelerator's name.
    pub accelerator: String,
    /// What its pod asks for.
    pub pod: PodSize,
}

/// Why no accelerator was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unplaced {
    /// The run is impossible wherever it runs; every reason.
    Problems(Vec<Problem>),
    /// No accelerator is large enough; what each lacks.
    TooLarge(Vec<Problem>),
    /// Only a device would hold it for which the settings set no image.
    NoTrainer {
        /// The accelerator.
        accelerator: String,
        /// How many would hold it.
        ranks: u32,
    },
}

/// Plans `job` for the first of `accelerators` that it fits; if it fits none alone, over the fewest
/// of a kind that hold it. One without a trainer is taken only to say what it lacks.
///
/// A user's limit of a pod's memory is planned within. If nothing fits it though the user chose the
/// micro-batch too, both are tried as they are: a prediction does not overrule them.
///
/// # Errors
/// [`Unplaced`] if it fits none.
pub fn place(
    job: &FineTuneJob,
    report: &PreflightReport,
    accelerators: &[Accelerator],
) -> Result<Placement, Unplaced> {
    let training = job.spec.training.as_ref();
    let is_chosen = training.is_some_and(|training| training.train_batch_size_per_device.is_some());
    let within = place_each(job, report, accelerators, |kind| Target::on(kind, job));
    let Err(Unplaced::TooLarge(_) | Unplaced::NoTrainer { .. }) = within else { return within };
    if !is_chosen || job.spec.memory_limit().is_none() {
        return within;
    }
    let anywhere = |accelerator| Target::Accelerator { accelerator, limit: None };
    let mut placement = place_each(job, report, accelerators, anywhere)?;
    placement.plan.warnings.push(invalid(
        "spec.resources.limits.memory",
        "is less than this plan is predicted to need with the trainBatchSizePerDevice that is set: the run starts all the same, with a smaller micro-batch if it runs out of memory",
    ));
    Ok(placement)
}

fn place_each<'a>(
    job: &FineTuneJob,
    report: &PreflightReport,
    accelerators: &'a [Accelerator],
    on: impl Fn(&'a Accelerator) -> Target<'a>,
) -> Result<Placement, Unplaced> {
    let mut lacking = Vec::new();
    let mut without_trainer = None;
    for accelerator in accelerators {
        match plan(job, report, on(accelerator), 1) {
            Ok(plan) if accelerator.has_trainer() => {
                match placed(plan, accelerator, job, report, &lacking) {
                    Ok(placement) => return Ok(placement),
                    Err(problem) => lacking.push(problem),
                }
            }
            Ok(_) => {
                without_trainer.get_or_insert((accelerator, 1));
            }
            Err(problems) if problems.iter().all(|problem| problem.location == "memory") => {
                lacking.extend(
                    problems
                        .into_iter()
                        .map(|problem| Problem { location: accelerator.name.clone(), ..problem }),
                );
            }
            Err(mut problems) => {
                // What this place lacks says nothing about the next.
                problems.retain(|problem| problem.location != "memory");
                return Err(Unplaced::Problems(problems));
            }
        }
    }
    let over = |accelerator: &'a Accelerator| {
        let plan = over_ranks(job, report, on(accelerator))?;
        Some((accelerator, plan))
    };
    let mut over_several: Vec<_> = accelerators.iter().filter_map(over).collect();
    // Sorted stably: of equally many the preferred kind.
    over_several.sort_by_key(|(_, plan)| plan.run_config.parallelism.world_size);
    for (accelerator, plan) in over_several {
        let ranks = plan.run_config.parallelism.world_size;
        if accelerator.has_trainer() {
            match placed(plan, accelerator, job, report, &lacking) {
                Ok(placement) => return Ok(placement),
                Err(problem) => lacking.push(problem),
            }
        } else {
            without_trainer.get_or_insert((accelerator, ranks));
        }
    }
    // A run that a memory limit kept from the CPU does not lack a device's trainer.
    let is_limited = accelerators.iter().any(|kind| on(kind).users_limit().is_some());
    if let Some((accelerator, ranks)) = without_trainer.filter(|_| !is_limited) {
        return Err(Unplaced::NoTrainer { accelerator: accelerator.name.clone(), ranks });
    }
    if lacking.is_empty() {
        lacking.push(invalid(
            "accelerators",
            "the operator's settings list none: an administrator must add one",
        ));
    }
    Err(Unplaced::TooLarge(lacking))
}

/// Puts a plan on an accelerator.
///
/// # Errors
/// Why not: the pod of a device needs more of the host's memory than the user's limit.
fn placed(
    mut plan: RunPlan,
    accelerator: &Accelerator,
    job: &FineTuneJob,
    report: &PreflightReport,
    lacking: &[Problem],
) -> Result<Placement, Problem> {
    let mut pod = PodSize::new(&plan, accelerator, report);
    if let Some(limit) = job.spec.memory_limit() {
        if accelerator.is_device() && limit < pod.memory_bytes {
            let message = format!(
                "a pod with it needs {} of the host's memory, but resources.limits.memory is {}: raise it",
                units::bytes(pod.memory_bytes),
                units::bytes(limit)
            );
            return Err(invalid(&accelerator.name, message));
        }
        pod.memory_bytes = limit;
    }
    plan.rejected.extend(lacking.iter().map(|problem| Choice {
        field: "accelerator",
        value: problem.location.clone(),
        reason: problem.message.clone(),
    }));
    Ok(Placement { plan, accelerator: accelerator.name.clone(), pod })
}

/// Plans `job` over the fewest of an accelerator that hold it, if some number does.
fn over_ranks(job: &FineTuneJob, report: &PreflightReport, place: Target<'_>) -> Option<RunPlan> {
    let numbers = std::iter::successors(Some(2), |ranks| Some(ranks * 2));
    numbers
        .take_while(|ranks| *ranks <= Parallelism::MAX_RANKS)
        .find_map(|ranks| plan(job, report, place, ranks).ok())
}

impl std::fmt::Display for Unplaced {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Problems(problems) | Self::TooLarge(problems) => {
                let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
                formatter.write_str(&lines.join("\n"))
            }
            Self::NoTrainer { accelerator, ranks } => write!(
                formatter,
                "the run needs {ranks} {accelerator}, for which the operator's settings set no image: an administrator must set `image` of that accelerator to a trainer built with CUDA; or lower what the run needs with loraConfig: {{}} or training.contextLength"
            ),
        }
    }
}

impl Unplaced {
    /// Returns the kind of the first problem.
    pub fn reason(&self) -> Option<ProblemReason> {
        match self {
            Self::Problems(problems) => problems.first().map(|problem| problem.reason),
            Self::TooLarge(_) | Self::NoTrainer { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use finetune_api::{FineTuneJob, manifest};
    use finetune_contract::{Device, ModelFacts, Strategy};

    use super::{Unplaced, place};
    use crate::{accelerators::Accelerator, pod::describe, testing};

    fn job(lines: &str) -> FineTuneJob {
        let text = format!("{}{lines}", include_str!("../../../examples/minimal.yaml"));
        manifest::parse(&text).unwrap()
    }

    fn accelerators() -> Vec<Accelerator> {
        let cpu = Accelerator {
            name: "cpu".to_owned(),
            cpu: Some(2.0),
            memory_gi_b: 4.0,
            bf16_tflops: 0.5,
            fp32_tflops: 0.15,
            has_bf16: true,
            ..Accelerator::default()
        };
        let gpu = Accelerator {
            name: "A100-80GB".to_owned(),
            resource_name: Some("nvidia.com/gpu".to_owned()),
            image: Some("trainer-cuda:1".to_owned()),
            gpus_per_node: Some(8),
            cpu: Some(8.0),
            memory_gi_b: 80.0,
            bf16_tflops: 312.0,
            fp32_tflops: 19.5,
            ..cpu.clone()
        };
        vec![cpu, gpu]
    }

    fn check(model: ModelFacts, lines: &str) -> String {
        let report = testing::report(model, 1_000_000_000);
        match place(&job(lines), &report, &accelerators()) {
            Ok(placement) => format!("{}: {}", placement.accelerator, describe(&placement.pod)),
            Err(unplaced) => unplaced.to_string(),
        }
    }

    #[test]
    fn takes_the_first_that_fits() {
        insta::assert_snapshot!(check(testing::smollm2(), "  loraConfig: {}\n"), @"cpu: 2 CPU, 1.68 GB memory, 1.67 GB storage");
        insta::assert_snapshot!(check(testing::llama_8b(), "  loraConfig: {}\n"), @"A100-80GB: 8 CPU, 21.43 GB memory, 33.70 GB storage");
    }

    #[test]
    fn divides_a_large_run_over_devices_of_one_pod() {
        let report = testing::report(testing::llama_8b(), 1_000_000_000);
        let placement = place(&job(""), &report, &accelerators()).unwrap();
        let asked = &placement.plan.run_config;
        assert_eq!(asked.device, Device::Cuda);
        assert_eq!((asked.parallelism.world_size, asked.parallelism.local_world_size), (4, 4));
        let said = placement.plan.decisions.iter().find(|decision| decision.field == "ranks");
        insta::assert_snapshot!(said.unwrap().reason, @"the fewest that hold it, each on one A100-80GB, all in one pod");
        insta::assert_snapshot!(describe(&placement.pod), @"32 CPU, 37.54 GB memory, 518.23 GB storage");
    }

    #[test]
    fn says_which_accelerator_lacks_a_trainer() {
        let mut accelerators = accelerators();
        accelerators[1].image = None;
        let report = testing::report(testing::llama_8b(), 1_000_000_000);
        let unplaced = place(&job(""), &report, &accelerators).unwrap_err();
        insta::assert_snapshot!(unplaced.to_string(), @"the run needs 4 A100-80GB, for which the operator's settings set no image: an administrator must set `image` of that accelerator to a trainer built with CUDA; or lower what the run needs with loraConfig: {} or training.contextLength");
    }

    #[test]
    fn plans_within_a_users_limit() {
        let accelerators = &accelerators()[..1];
        let report = testing::report(testing::smollm2(), 8_000_000_000);
        let plan = |lines: &str| {
            let limit = "  resources: {limits: {memory: LIMIT}}\n  loraConfig: {}\n";
            let job = job(&format!("{limit}{lines}").replace("LIMIT", "700Mi"));
            place(&job, &report, accelerators)
        };
        let within = plan("").unwrap();
        assert_eq!(within.accelerator, "cpu");
        assert_eq!(within.plan.run_config.training.micro_batch_size, 4);
        assert!(within.plan.memory.total() < 700 << 20);
        // What was chosen beside it is tried.
        let both = plan("  training: {trainBatchSizePerDevice: 8, recompute: none}\n").unwrap();
        assert_eq!(both.plan.run_config.training.micro_batch_size, 8);
        let said = both.plan.warnings.iter().map(ToString::to_string).collect::<Vec<_>>();
        insta::assert_snapshot!(said.join("\n"), @"spec.resources.limits.memory: is less than this plan is predicted to need with the trainBatchSizePerDevice that is set: the run starts all the same, with a smaller micro-batch if it runs out of memory");
        assert_eq!(within.pod.memory_bytes, 700 << 20, "what the pod gets");
        let little = job("  resources: {limits: {memory: 24Mi}}\n  loraConfig: {}\n");
        let lacking = place(&little, &report, accelerators).unwrap_err().to_string();
        insta::assert_snapshot!(lacking, @"cpu: the run needs 190 MB, but only 23 MB of the 25 MB on one cpu within resources.limits.memory is available, 167 MB short: raise resources.limits.memory, or lower training.contextLength below 256");
        // Nor is a device taken whose pod the limit would end, with a trainer or without.
        let devices = &super::tests::accelerators();
        let lacking = place(&little, &report, devices).unwrap_err().to_string();
        insta::assert_snapshot!(lacking, @r#"
        cpu: the run needs 190 MB, but only 23 MB of the 25 MB on one cpu within resources.limits.memory is available, 167 MB short: raise resources.limits.memory, or lower training.contextLength below 256
        A100-80GB: a pod with it needs 5.64 GB of the host's memory, but resources.limits.memory is 25 MB: raise it
        A100-80GB: a pod with it needs 11.01 GB of the host's memory, but resources.limits.memory is 25 MB: raise it
        "#);
        let mut devices = devices.clone();
        devices[1].image = None;
        let lacking = place(&little, &report, &devices).unwrap_err().to_string();
        insta::assert_snapshot!(lacking, @"cpu: the run needs 190 MB, but only 23 MB of the 25 MB on one cpu within resources.limits.memory is available, 167 MB short: raise resources.limits.memory, or lower training.contextLength below 256");
    }

    #[test]
    fn divides_over_the_fewest_pods_that_hold_it() {
        let report = testing::report(testing::smollm2(), 1_000_000_000);
        let mut accelerators = accelerators();
        accelerators.truncate(1);
        accelerators[0].memory_gi_b = 2.5;
        let full = job("  training: {contextLength: 256}\n");
        let placement = place(&full, &report, &accelerators).unwrap();
        let said: Vec<String> = placement
            .plan
            .decisions
            .iter()
            .chain(&placement.plan.rejected)
            .filter(|decision| ["ranks", "strategy", "accelerator"].contains(&decision.field))
            .map(|decision| format!("{} {}: {}", decision.field, decision.value, decision.reason))
            .collect();
        insta::assert_snapshot!(said.join("\n"), @r#"
        ranks 2: the fewest that hold it, each on one cpu
        strategy zero3: divides moments, gradients and weights; of what fits, what sends least
        strategy zero1: 2.34 GB does not fit in 1.77 GB
        strategy zero2: 1.94 GB does not fit in 1.77 GB
        accelerator cpu: the run needs 2.63 GB, but only 1.77 GB of the 2.68 GB on one cpu is available, 857 MB short: set loraConfig: {}, or lower training.contextLength below 256, or use a machine with more memory
        "#);
        let asked = placement.plan.run_config.parallelism;
        assert_eq!((asked.world_size, asked.strategy), (2, Strategy::Zero3));
        assert!(placement.pod.memory_bytes <= accelerators[0].memory_bytes());
    }

    #[test]
    fn says_a_wrong_manifest_once_and_not_for_each_place() {
        let report = testing::report(testing::smollm2(), 1_000_000_000);
        let wrong = job("  training: {contextLength: 9000}\n");
        let Err(Unplaced::Problems(problems)) = place(&wrong, &report, &accelerators()) else {
            panic!("a context above the model's was planned");
        };
        assert_eq!(problems.len(), 1, "{problems:?}");
    }

    #[test]
    fn a_pod_is_never_larger_than_its_accelerator_allows() {
        for gib in [0.7, 1.0, 1.5, 4.0, 16.0] {
            let mut accelerators = accelerators();
            accelerators.truncate(1);
            accelerators[0].memory_gi_b = gib;
            let report = testing::report(testing::smollm2(), 1_000_000_000);
            match place(&job("  loraConfig: {}\n"), &report, &accelerators) {
                Ok(placement) => {
                    assert!(placement.pod.memory_bytes <= accelerators[0].memory_bytes());
                }
                Err(unplaced) => assert!(gib < 1.0, "{gib} GiB: {unplaced}"),
            }
        }
    }

    #[test]
    fn needs_an_accelerator() {
        let report = testing::report(testing::smollm2(), 1_000_000_000);
        let unplaced = place(&job(""), &report, &[]).unwrap_err();
        assert!(unplaced.to_string().contains("administrator"), "{unplaced}");
    }
}
