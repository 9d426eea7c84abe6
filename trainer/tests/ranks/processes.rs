//! Ranks as processes: published results, exit codes, and resuming.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use finetune_contract::{
    DatasetFormat, DatasetSource, Document, ExpectedData, FailureReason, ModelSource, OnOverflow,
    Outcome, OutputTarget, Parallelism, PreflightConfig, PreflightReport, Progress, Recompute,
    RunConfig, RunId, RunReport, StoppedEarly, Strategy, TrainerArgs, TrainerCommand,
    TrainingSettings, parse, render,
    testing::{file_uri, run_config, training_settings},
};
use serde_json::json;
use tch::{Kind, Tensor};
use tempfile::TempDir;

use crate::{equality::free_port, fixture::lora};

/// How long a rank may take to notice that another is gone; the default grace is 3 s.
const LOST_RANK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long anything else may take on a machine that is busy with other tests.
const TIMEOUT: Duration = Duration::from_mins(2);

/// A directory with training rows, and a run of the golden tests' tiny model on them.
struct Case {
    directory: TempDir,
    config: RunConfig,
}

/// The process of one rank.
struct Rank {
    child: Child,
    report: PathBuf,
}

/// The exit of a rank.
struct RankExit {
    code: Option<i32>,
    log: String,
    report: Option<RunReport>,
}

impl Case {
    fn new(is_lora: bool, total_steps: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let uri = |name: &str| file_uri(&directory.path().join(name));
        // Rows of different lengths, so that no two ranks have the same number of tokens.
        for (name, rows) in [("train", 0..13), ("validation", 20..25)] {
            let rows = rows.map(|row: usize| {
                let words: Vec<String> = (0..3 + row * 7 % 40)
                    .map(|i| format!("t{}", 3 + (row * 31 + i * i) % 120))
                    .collect();
                format!("{}\n", json!({ "text": words.join(" ") }))
            });
            fs::write(
                directory.path().join(name).with_extension("jsonl"),
                rows.collect::<String>(),
            )
            .unwrap();
        }
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/llama");
        let dataset = DatasetSource {
            validation: Some(uri("validation.jsonl")),
            format: DatasetFormat::Text,
            on_overflow: OnOverflow::Error,
            ..DatasetSource::of(uri("train.jsonl"))
        };
        let model = ModelSource::of(file_uri(&model));
        let output = OutputTarget { overwrite: true, ..OutputTarget::of(uri("output")) };
        let config = RunConfig {
            run_id: RunId("tiny".to_owned()),
            lora: is_lora.then(|| lora(&["all-linear"], &[])),
            training: training(total_steps),
            checkpoints_uri: uri("checkpoints"),
            expected: ExpectedData {
                train_sha256: String::new(),
                validation_sha256: None,
                sequences: 13,
            },
            ..run_config(model, dataset, output)
        };
        let mut case = Self { directory, config };
        case.expect();
        case
    }

    /// Runs the preflight and takes the expected data from its report.
    fn expect(&mut self) {
        let config = &self.config;
        let preflight = PreflightConfig {
            lora: config.lora.clone(),
            initial_adapter: config.initial_adapter.clone(),
            initial_checkpoint: config.initial_checkpoint.clone(),
            context_length: Some(config.training.context_length),
            ..PreflightConfig::of(
                config.run_id.clone(),
                config.model.clone(),
                config.dataset.clone(),
                config.output.clone(),
            )
        };
        let rank = self.spawn(TrainerCommand::Preflight, "preflight", &preflight, &[]);
        let report = rank.report.clone();
        let exit = rank.end(TIMEOUT);
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        let report: PreflightReport = parse(&fs::read_to_string(report).unwrap()).unwrap();
        self.config.expected.train_sha256 = report.train.unwrap().sha256;
        self.config.expected.validation_sha256 = Some(report.validation.unwrap().sha256);
    }

    /// Returns the same run over so many ranks, with the same four sequences per step.
    fn over(&self, world_size: u32, strategy: Strategy) -> RunConfig {
        let mut config = self.config.clone();
        config.parallelism = Parallelism { world_size, strategy, ..Parallelism::SINGLE };
        config.training.gradient_accumulation_steps = 4 / world_size;
        config.predicted_sent_bytes = (world_size > 1).then_some(0);
        config
    }

    fn spawn<D: Document>(
        &self,
        command: TrainerCommand,
        name: &str,
        config: &D,
        environment: &[(&str, String)],
    ) -> Rank {
        let path = |suffix: &str| self.directory.path().join(format!("{name}.{suffix}"));
        fs::write(path("json"), render(config)).unwrap();
        let _ = fs::remove_file(path("report.json"));
        let child = Command::new(env!("CARGO_BIN_EXE_finetune-trainer"))
            .env("OMP_NUM_THREADS", "1")
            .envs(environment.iter().map(|(key, value)| (key, value)))
            .args(
                TrainerArgs::new(command, path("json"), path("report.json"), path("work"))
                    .to_args(),
            )
            .stdout(Stdio::piped())
            .stderr(fs::File::create(path("log")).unwrap())
            .spawn()
            .unwrap();
        Rank { child, report: path("report.json") }
    }

    /// Starts all ranks of a run; `change` may change the config of each.
    fn start(&self, config: &RunConfig, change: impl Fn(u32, &mut RunConfig)) -> Vec<Rank> {
        let Parallelism { world_size, .. } = config.parallelism;
        let port = free_port();
        (0..world_size)
            .map(|rank| {
                let mut config = config.clone();
                change(rank, &mut config);
                let environment = [
                    ("RANK", rank.to_string()),
                    ("WORLD_SIZE", world_size.to_string()),
                    ("MASTER_ADDR", "127.0.0.1".to_owned()),
                    ("MASTER_PORT", port.to_string()),
                ];
                self.spawn(TrainerCommand::Train, &format!("rank-{rank}"), &config, &environment)
            })
            .collect()
    }

    /// Runs to completion; returns rank 0's report and the published weights.
    fn finish(&self, config: &RunConfig) -> (RunReport, Vec<(String, Tensor)>) {
        let mut report = None;
        for rank in self.start(config, |_, _| {}) {
            let exit = rank.end(TIMEOUT);
            assert_eq!(exit.code, Some(0), "{}", exit.log);
            report = report.or(exit.report);
        }
        let name = if config.lora.is_some() { "adapter_model" } else { "model" };
        let file = self.directory.path().join("output").join(format!("{name}.safetensors"));
        let mut weights = Tensor::read_safetensors(file).unwrap();
        weights.sort_by(|left, right| left.0.cmp(&right.0));
        (report.unwrap(), weights)
    }

    fn remove_output(&self) {
        for name in ["output", "checkpoints"] {
            let _ = fs::remove_dir_all(self.directory.path().join(name));
        }
    }
}

impl Rank {
    /// Waits until the rank reports a step as done.
    fn wait_for_step(&mut self, step: u64) {
        let stdout = self.child.stdout.take().unwrap();
        let mut lines = BufReader::new(stdout).lines();
        let reached = lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| parse::<Progress>(&line).is_ok_and(|progress| progress.step >= step));
        assert!(reached, "the rank exited before step {step}");
        // The remaining lines must be read, or the rank blocks on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    fn end(mut self, timeout: Duration) -> RankExit {
        if let Some(stdout) = self.child.stdout.take() {
            std::thread::spawn(move || BufReader::new(stdout).lines().for_each(drop));
        }
        let started = Instant::now();
        let log_path = self.report.with_extension("").with_extension("log");
        let log = || fs::read_to_string(&log_path).unwrap_or_default();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() > timeout {
                self.child.kill().unwrap();
                panic!("still running after {timeout:?}: {}", log());
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let report = fs::read_to_string(&self.report).ok();
        RankExit {
            code: status.code(),
            log: log(),
            report: report.and_then(|report| parse(&report).ok()),
        }
    }
}

fn training(total_steps: u64) -> TrainingSettings {
    TrainingSettings {
        total_steps,
        gradient_accumulation_steps: 4,
        evaluation_steps: 2,
        checkpoint_steps: Some(2),
        num_checkpoints_to_keep: 2,
        ..training_settings()
    }
}

#[track_caller]
fn assert_same(left: &[(String, Tensor)], right: &[(String, Tensor)], what: &str) {
    assert_eq!(left.len(), right.len());
    for ((name, left), (other, right)) in left.iter().zip(right) {
        assert_eq!(name, other);
        let difference = (left - right).abs().max().to_kind(Kind::Double).double_value(&[]);
        assert!(difference < 1e-6, "{what}: {name} differs by {difference:e}");
    }
}

#[track_caller]
fn assert_same_losses(many: &RunReport, one: &RunReport) {
    let losses = |report: &RunReport| {
        let [first, last] = report.train_loss.unwrap();
        let [before, after] = report.eval_loss.unwrap();
        [first, last, before, after]
    };
    for (many, one) in losses(many).iter().zip(losses(one)) {
        assert!((many - one).abs() < 1e-6, "{many} {one}");
    }
}

/// Compares runs over several ranks with a run of one rank, from the preflight to the published
/// weights.
fn check(is_lora: bool) {
    let case = Case::new(is_lora, 6);
    let (one, weights) = case.finish(&case.over(1, Strategy::None));
    assert_eq!(one.measured_sent_bytes, None);
    let strategies: &[_] = if is_lora {
        &[(2, Strategy::Ddp), (2, Strategy::Zero3), (4, Strategy::Ddp), (4, Strategy::Zero3)]
    } else {
        &[(2, Strategy::Ddp), (2, Strategy::Zero1), (4, Strategy::Zero2), (4, Strategy::Zero3)]
    };
    for &(world_size, strategy) in strategies {
        case.remove_output();
        let (many, many_weights) = case.finish(&case.over(world_size, strategy));
        assert_same_losses(&many, &one);
        assert_eq!(many.tokens_seen, one.tokens_seen);
        assert!(many.measured_sent_bytes.unwrap() > 0);
        assert_same(&many_weights, &weights, &format!("{world_size} {strategy:?}"));
    }
}

#[test]
fn several_ranks_publish_the_model_that_one_does() {
    check(false);
}

#[test]
fn several_ranks_publish_the_adapter_that_one_does() {
    check(true);
}

#[test]
fn a_run_resumes_with_smaller_micro_batches_to_the_same_result() {
    let mut case = Case::new(true, 60);
    // With dropout: a smaller micro-batch draws the masks its rows would have in a larger one.
    case.config.lora.as_mut().unwrap().lora_dropout = 0.2;
    let with_micro_batches = |micro_batch_size: u32, recompute: Recompute| {
        let mut config = case.over(1, Strategy::None);
        config.training.micro_batch_size = micro_batch_size;
        config.training.gradient_accumulation_steps = 4 / micro_batch_size;
        config.training.recompute = recompute;
        config
    };
    let whole = with_micro_batches(4, Recompute::None);
    let (expected_report, expected) = case.finish(&whole);
    for smaller in [
        with_micro_batches(2, Recompute::None),
        with_micro_batches(1, Recompute::Block),
        RunConfig { attempt: 1, ..case.over(2, Strategy::Zero3) },
    ] {
        case.remove_output();
        let mut rank = case.start(&whole, |_, _| {}).swap_remove(0);
        rank.wait_for_step(5);
        rank.signal("KILL");
        rank.end(TIMEOUT);
        let (report, weights) = case.finish(&smaller);
        assert!(report.resumed_from_step.is_some_and(|step| step >= 2), "{report:?}");
        assert_same_losses(&report, &expected_report);
        assert_eq!(report.tokens_seen, expected_report.tokens_seen);
        let what = format!("{:?} {:?}", smaller.training, smaller.parallelism);
        assert_same(&weights, &expected, &what);
    }
}

#[test]
fn a_published_adapter_is_a_starting_point() {
    let mut case = Case::new(true, 6);
    let (before, published) = case.finish(&case.over(1, Strategy::None));
    let [_, published_loss] = before.eval_loss.unwrap();
    let (output, adapter) =
        (case.directory.path().join("output"), case.directory.path().join("before"));
    fs::rename(output, &adapter).unwrap();
    case.config.run_id = RunId("continued".to_owned());
    case.config.initial_adapter = Some(file_uri(&adapter));
    for (world_size, strategy) in [(1, Strategy::None), (2, Strategy::Zero3)] {
        case.remove_output();
        let (report, weights) = case.finish(&case.over(world_size, strategy));
        let [loss, better] = report.eval_loss.unwrap();
        assert!((loss - published_loss).abs() < 1e-6, "{loss} {published_loss}");
        assert!(better < loss, "{loss} → {better}");
        assert!(weights.iter().zip(&published).any(|((_, now), (_, then))| !now.equal(then)));
    }
    // The error for another shape names both values.
    case.remove_output();
    case.config.lora.as_mut().unwrap().r = 2;
    let exit = case.start(&case.over(1, Strategy::None), |_, _| {}).swap_remove(0).end(TIMEOUT);
    assert_eq!(exit.code, Some(78), "{}", exit.log);
    let Outcome::Failed { message, .. } = exit.report.unwrap().outcome else {
        panic!("no failure")
    };
    insta::assert_snapshot!(message, @"spec.loraConfig.r: is 2, but the initial weights have 4: set it to 4");
}

/// Runs over two ranks until there are checkpoints; returns one that was evaluated, and its loss.
fn stopped_at_a_step(case: &Case, strategy: Strategy) -> (PathBuf, f64) {
    let mut ranks = case.start(&case.over(2, strategy), |_, _| {});
    ranks[0].wait_for_step(7);
    ranks[0].signal("TERM");
    for rank in ranks {
        rank.end(TIMEOUT);
    }
    let before = case.directory.path().join("before");
    let _ = fs::remove_dir_all(&before);
    fs::rename(case.directory.path().join("checkpoints"), &before).unwrap();
    let evaluated = fs::read_dir(&before).unwrap().find_map(|entry| {
        let step = entry.unwrap().path();
        let text = fs::read_to_string(step.join("checkpoint-manifest.json")).ok()?;
        let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
        let state = &manifest["state"];
        let is_evaluated = state["lastEval"]["step"] == state["step"];
        is_evaluated.then(|| (step, state["lastEval"]["loss"].as_f64().unwrap()))
    });
    evaluated.expect("every second step is evaluated and saved")
}

#[test]
fn a_run_starts_from_a_checkpoint_of_another_run_over_any_number_of_ranks() {
    for (is_lora, strategy) in [(true, Strategy::Ddp), (false, Strategy::Zero2)] {
        let mut case = Case::new(is_lora, 1_000_000);
        let (step, loss) = stopped_at_a_step(&case, strategy);
        case.config.run_id = RunId("another".to_owned());
        case.config.training.total_steps = 4;
        case.config.initial_checkpoint = Some(file_uri(&step));
        for (world_size, strategy) in [(1, Strategy::None), (2, Strategy::Zero3)] {
            case.remove_output();
            let (report, _) = case.finish(&case.over(world_size, strategy));
            let [start, end] = report.eval_loss.unwrap();
            assert!((start - loss).abs() < 1e-6, "{start} {loss}");
            assert!(end < start, "{start} → {end}");
            assert_eq!((report.steps, report.resumed_from_step), (4, None));
        }
        // Mismatches are reported by the preflight and by the trainer itself.
        let refusal = |case: &Case| {
            case.remove_output();
            let mut ranks = case.start(&case.over(1, Strategy::None), |_, _| {});
            let exit = ranks.swap_remove(0).end(TIMEOUT);
            assert_eq!(exit.code, Some(78), "{}", exit.log);
            let Outcome::Failed { message, .. } = exit.report.unwrap().outcome else {
                panic!("no failure")
            };
            message
        };
        if let Some(lora) = case.config.lora.as_mut() {
            lora.r = 2;
            insta::assert_snapshot!(refusal(&case), @"spec.loraConfig.r: is 2, but the initial weights have 4: set it to 4");
            case.config.lora = None;
            insta::assert_snapshot!(refusal(&case), @"spec.initialCheckpoint.uri: belongs to an adapter: set loraConfig to {r: 4, loraAlpha: 6, targetModules: all-linear, modulesToSave: [], useRslora: false}");
        } else {
            case.config.lora = Some(lora(&["all-linear"], &[]));
            insta::assert_snapshot!(refusal(&case), @"spec.initialCheckpoint.uri: belongs to a full-parameter run: remove loraConfig to continue it");
            case.config.lora = None;
            let part = step.join("state-00002-of-00002.safetensors");
            fs::write(&part, "not that").unwrap();
            let message = refusal(&case).replace(&step.display().to_string(), "STEP");
            insta::assert_snapshot!(message, @"spec.initialCheckpoint.uri: file://STEP cannot be used: state-00002-of-00002.safetensors is missing or truncated; name another step");
        }
    }
}

#[test]
fn a_run_that_reaches_its_time_limit_publishes_its_weights() {
    let mut case = Case::new(true, 1_000_000);
    case.config.training.max_time_seconds = Some(1);
    for (world_size, strategy) in [(1, Strategy::None), (2, Strategy::Ddp)] {
        case.remove_output();
        let (report, _) = case.finish(&case.over(world_size, strategy));
        assert_eq!(report.stopped_early, Some(StoppedEarly::Time));
        assert!((1..1_000_000).contains(&report.steps), "{}", report.steps);
        let [before, after] = report.eval_loss.unwrap();
        assert!(after < before, "{before} → {after}");
    }
}

#[test]
fn stopping_one_rank_stops_all_after_the_same_step_and_any_number_resumes() {
    let case = Case::new(false, 200);
    let whole = case.over(1, Strategy::None);
    let (_, expected) = case.finish(&whole);
    case.remove_output();

    let mut ranks = case.start(&case.over(2, Strategy::Zero3), |_, _| {});
    ranks[0].wait_for_step(3);
    ranks[1].signal("TERM");
    let stopped: Vec<RankExit> = ranks.into_iter().map(|rank| rank.end(TIMEOUT)).collect();
    let steps: Vec<u64> = stopped
        .iter()
        .map(|exit| {
            assert_eq!(exit.code, Some(75), "{}", exit.log);
            match exit.report.as_ref().unwrap().outcome {
                Outcome::Interrupted { checkpoint_step } => checkpoint_step,
                _ => panic!("{}", exit.log),
            }
        })
        .collect();
    assert_eq!(steps[0], steps[1]);
    assert!(steps[0] < 200, "it was stopped too late to show anything");

    // Four ranks resume without sharding and are stopped again; one rank finishes.
    let mut ranks = case.start(&case.over(4, Strategy::Ddp), |_, _| {});
    ranks[0].wait_for_step(steps[0] + 3);
    ranks[2].signal("TERM");
    for rank in ranks {
        let exit = rank.end(TIMEOUT);
        assert_eq!(exit.code, Some(75), "{}", exit.log);
        assert_eq!(exit.report.unwrap().resumed_from_step, Some(steps[0]));
    }
    let (report, weights) = case.finish(&whole);
    assert!(report.resumed_from_step.unwrap() > steps[0]);
    let largest = weights.iter().zip(&expected).map(|((_, left), (_, right))| {
        (left - right).abs().max().to_kind(Kind::Double).double_value(&[])
    });
    // Two hundred steps add up more rounding than six.
    let largest = largest.fold(0.0, f64::max);
    assert!(largest < 1e-4, "{largest:e}");
}

fn kill_one(victim: usize, strategy: Strategy) {
    let case = Case::new(false, 1_000_000);
    let mut config = case.over(4, strategy);
    config.training.evaluation_steps = 0;
    let mut ranks = case.start(&config, |_, _| {});
    ranks[0].wait_for_step(3);
    ranks[victim].signal("KILL");
    ranks.remove(victim).child.wait().unwrap();
    for rank in ranks {
        let exit = rank.end(LOST_RANK_TIMEOUT);
        assert_eq!(exit.code, Some(76), "{}", exit.log);
        let Outcome::Failed { reason, message } = exit.report.unwrap().outcome else {
            panic!("{}", exit.log)
        };
        assert_eq!(reason, FailureReason::PeerLost);
        assert!(message.contains(&format!("rank {victim} is gone")), "{message}");
    }
}

#[test]
fn the_death_of_one_rank_ends_all_in_seconds() {
    kill_one(2, Strategy::Ddp);
    kill_one(3, Strategy::Zero3);
}

#[test]
fn the_death_of_rank_0_ends_all_in_seconds() {
    kill_one(0, Strategy::Ddp);
}

#[test]
fn all_ranks_report_why_one_failed() {
    let case = Case::new(true, 6);
    let config = case.over(2, Strategy::Ddp);
    let ranks = case.start(&config, |rank, config| {
        if rank == 1 {
            config.expected.train_sha256 = "of other rows".to_owned();
        }
    });
    let [first, second]: [RankExit; 2] = ranks
        .into_iter()
        .map(|rank| rank.end(TIMEOUT))
        .collect::<Vec<_>>()
        .try_into()
        .ok()
        .unwrap();
    assert_eq!((first.code, second.code), (Some(76), Some(65)), "{}{}", first.log, second.log);
    let Outcome::Failed { message, .. } = first.report.unwrap().outcome else { panic!() };
    assert!(message.contains("rank 1 failed: ") && message.contains("changed since"), "{message}");
}
