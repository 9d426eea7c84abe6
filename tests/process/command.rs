//! The command as a process, against a test double of the trainer that speaks the contract.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use finetune_contract::{RunConfig, decisive_settings, settings_text};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const MINIMAL: &str = include_str!("../../examples/minimal.yaml");

/// A complete preflight report of a small model.
const PREFLIGHT: &str = r#"{"version":1,"runId":"r","problems":[],"problemsTotal":0,"warnings":[],
"model":{"modelType":"llama","parameters":9000000,"weightBytes":18000000,"weightDtype":"BF16","hiddenSize":64,"intermediateSize":128,
"numHiddenLayers":2,"numAttentionHeads":4,"numKeyValueHeads":2,"headDim":16,"vocabSize":1000,"maxPositionEmbeddings":2048,
"tieWordEmbeddings":true,"hasChatTemplate":true,"modules":[]},
"train":{"format":"text","files":1,"rows":100,"badRows":0,"tokens":10000,"targetTokens":10000,"duplicateRows":0,"maxTokens":200,
"p50Tokens":100,"p95Tokens":180,"sha256":"ab","lengths":[{"context":256,"over":0,"cut":0,"empty":0,"packed":40}]},
"overlappingRows":0,"output":"vacant"}"#;

const SUCCEEDED: &str = r#"{"version":1,"runId":"r","attempt":0,"outcome":{"result":"succeeded","kind":"FullModel","uri":"file:///data/minimal",
"manifestSha256":"cd","proof":{"files":3,"bytes":18000000,"maxLogitChange":0.5,"lossTrainedAndReloaded":[1.25,1.25]}},
"steps":40,"tokensSeen":100000,"trainLoss":[3.0,1.5],"tokensPerSecond":1234.0,"durationSeconds":80.0,
"predictedPeakBytes":500000000,"measuredPeakBytes":480000000}"#;

const PROGRESS: &str = r#"{"version":1,"runId":"r","stage":"Training","step":1,"totalSteps":40,"epoch":0.1,"loss":2.5,"tokensSeen":100,"peakMemoryBytes":1}"#;

/// Returns the run report with another outcome.
fn ended_by(outcome: &str) -> String {
    let start = SUCCEEDED.find(r#""outcome""#).unwrap();
    let end = SUCCEEDED.find(r#""steps""#).unwrap();
    format!("{}\"outcome\":{outcome},{}", &SUCCEEDED[..start], &SUCCEEDED[end..])
}

/// How a test double of the trainer begins: it reads its arguments as the trainer does.
const ARGUMENTS: &str = "#!/bin/sh\nfor argument; do case \"$argument\" in\n--config=*) config=\"${argument#*=}\";;\n--report=*) report=\"${argument#*=}\";;\nesac; done\n";

/// What the test double does.
struct Trainer<'a> {
    preflight: (&'a str, i32),
    train: (&'a str, i32),
}

/// Puts a test double of the trainer into a directory.
fn put_trainer(directory: &Path, script: &str) {
    let program = directory.join("trainer");
    fs::write(&program, script).unwrap();
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs a command on a directory's manifest, with its trainer.
fn run_in(directory: &Path, command: &[&str]) -> Output {
    command_in(directory, command, "work").output().unwrap()
}

fn command_in(directory: &Path, arguments: &[&str], work_dir: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_finetune"));
    command.args(arguments).args(["-f", "job.yaml", "--work-dir", work_dir, "--trainer"]);
    command.arg(directory.join("trainer")).current_dir(directory);
    command.env("XDG_STATE_HOME", directory.join("state"));
    command
}

fn finetune(command: &str, manifest: &str, trainer: Option<&Trainer>) -> (Output, TempDir) {
    finetune_with(&[command], manifest, trainer)
}

fn finetune_with(command: &[&str], manifest: &str, trainer: Option<&Trainer>) -> (Output, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("job.yaml"), manifest).unwrap();
    if let Some(Trainer { preflight, train }) = trainer {
        fs::write(path("preflight.json"), preflight.0).unwrap();
        fs::write(path("train.json"), train.0).unwrap();
        let script = format!(
            "{ARGUMENTS}set -e\n[ -s \"$config\" ]\ncp {here}/$1.json \"$report\"\nif [ $1 = preflight ]; then exit {}; fi\necho '{PROGRESS}'\nexit {}\n",
            preflight.1,
            train.1,
            here = directory.path().display(),
        );
        put_trainer(directory.path(), &script);
    }
    (run_in(directory.path(), command), directory)
}

/// Returns the exit status and what was printed, the plan and paths of this machine left out.
fn check(command: &str, manifest: &str, trainer: Option<&Trainer>) -> String {
    let (output, directory) = finetune(command, manifest, trainer);
    shown(&output, directory.path())
}

fn shown(output: &Output, directory: &Path) -> String {
    let text = |bytes: &[u8]| {
        String::from_utf8_lossy(bytes).replace(&directory.display().to_string(), "DIR")
    };
    let errors = text(&output.stderr);
    let errors = errors.lines().skip_while(|line| line.starts_with("Plan")).collect::<Vec<_>>();
    let errors = match errors.iter().position(|line| line.starts_with("step ")) {
        Some(progress) => errors[progress..].join("\n"),
        None => errors.join("\n"),
    };
    format!("exit {:?}\n{}{errors}", output.status.code().unwrap_or(-1), text(&output.stdout))
}

#[test]
fn runs_a_job_and_sums_it_up() {
    let trainer = Trainer { preflight: (PREFLIGHT, 0), train: (SUCCEEDED, 0) };
    insta::assert_snapshot!(check("run", MINIMAL, Some(&trainer)), @r#"
exit 0
published   file:///data/minimal
verified    3 files, 18 MB; loss 1.2500 after training, 1.2500 reloaded
train loss  3.000 → 1.500 in 40 steps
time        80 s, 1234 tok/s
memory      480 MB peak, 500 MB predicted
step 1/40  training  loss 2.500
    "#);
}

#[test]
fn plans_without_training() {
    let trainer = Trainer { preflight: (PREFLIGHT, 0), train: ("", 70) };
    insta::assert_snapshot!(check("plan", MINIMAL, Some(&trainer)), @r#"
exit 0
Plan of minimal-c475808c
  method                     full-parameter  no loraConfig: all 9000000 parameters are trained
  dtype                      fp32            this CPU does not multiply bf16 natively
  packing                    true            rows share sequences, so no position is padding
  contextLength              256             holds 95 % of the rows; cuts nothing, the longest row has 200 tokens
  recompute                  none            fits the memory, and computes nothing twice
  trainBatchSizePerDevice    8               as many as fit in memory, at most 8
  gradientAccumulationSteps  1               8 of only 40 sequences per step, so that there are several steps
  numEpochs                  10              as many as give about 100 steps, from 1 to 10
  steps                      50              40 sequences × 10 epochs / 8 a step
  learningRate               0.00001         usual for full-parameter training
  lrSchedulerType            cosine          decays smoothly to zero
  numWarmupSteps             5               10 % of the steps, at most 10
  weightDecay                0               fine-tuning is short
  maxGradNorm                1               limits the effect of outlier batches
  seed                       42              fixed, so that a run can be repeated
  checkpointSteps            by time         about every 30 s, less often if it would take more than 1 % of the time

Memory
  trained state                  144 MB
  activations                     10 MB
  output head                      2 MB
  temporaries                     13 MB
  checkpoint                      34 MB
  runtime                         75 MB
  peak                           277 MB
  if memory runs out         trainBatchSizePerDevice 4, 2, 1; then recompute block
  weights, mapped                 18 MB  memory-mapped, reclaimable
    "#);
}

#[test]
fn refuses_a_typo_with_the_likely_word() {
    let manifest = MINIMAL.replace("train:", "trian:");
    let trainer = Trainer { preflight: (PREFLIGHT, 0), train: (SUCCEEDED, 0) };
    insta::assert_snapshot!(check("run", &manifest, Some(&trainer)), @r#"
exit 78
error: job.yaml cannot run:
  spec.dataset.trian: is not a field; did you mean train?
  spec.dataset: needs the training rows: set train, or list several under sources, but not both
    "#);
}

#[test]
fn shows_every_problem_of_the_preflight() {
    let problems = r#""problems":[{"reason":"InvalidDataset","location":"train.jsonl:3","message":"is not JSON"}],"problemsTotal":7"#;
    let report = PREFLIGHT.replace(r#""problems":[],"problemsTotal":0"#, problems);
    let trainer = Trainer { preflight: (&report, 65), train: (SUCCEEDED, 0) };
    insta::assert_snapshot!(check("plan", MINIMAL, Some(&trainer)), @r#"
exit 65
error: the run cannot start:
  train.jsonl:3: is not JSON
  and 6 more
    "#);
}

#[test]
fn says_how_to_go_on_after_an_interruption() {
    let report = ended_by(r#"{"result":"interrupted","checkpointStep":20}"#);
    let trainer = Trainer { preflight: (PREFLIGHT, 0), train: (&report, 75) };
    insta::assert_snapshot!(check("run", MINIMAL, Some(&trainer)), @r#"
exit 75
step 1/40  training  loss 2.500
error: interrupted; step 20 is saved. Run the same command again to resume
    "#);
}

#[test]
fn says_where_the_trainer_was_looked_for() {
    insta::assert_snapshot!(check("run", MINIMAL, None), @r#"
exit 78
error: no trainer at DIR/trainer: build it with `cargo xtask build`, or name it with --trainer FILE
    "#);
}

#[test]
fn refuses_another_version_of_the_contract() {
    let report = PREFLIGHT.replace(r#""version":1"#, r#""version":2"#);
    let trainer = Trainer { preflight: (&report, 0), train: (SUCCEEDED, 0) };
    insta::assert_snapshot!(check("run", MINIMAL, Some(&trainer)), @r#"
exit 78
error: preflight report has contract version 2, but this build reads only version 1: run the operator and the trainer image of the same release
    "#);
}

/// Returns the preflight's report of a job whose rows and model were published with some settings.
fn published_with(settings_sha256: &str) -> String {
    let published = format!(
        r#""output":"publishedByThisRun","published":{{"runId":"earlier-1","kind":"FullModel","manifestSha256":"cd","settingsSha256":"{settings_sha256}","step":40}}}}"#
    );
    PREFLIGHT.replace(r#""output":"vacant"}"#, &published)
}

#[test]
fn trains_nothing_when_the_same_inputs_are_published() {
    // What it would train with, from the plan itself.
    let trainer = Trainer { preflight: (PREFLIGHT, 0), train: ("", 70) };
    let (planned, _) = finetune_with(&["plan", "-o", "json"], MINIMAL, Some(&trainer));
    let plan: serde_json::Value = serde_json::from_slice(&planned.stdout).unwrap();
    let config: RunConfig = serde_json::from_value(plan["runConfig"].clone()).unwrap();
    let settings = settings_text(&decisive_settings(&config));
    let digest = Sha256::digest(settings.as_bytes());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let report = published_with(&digest);
    let trainer = Trainer { preflight: (&report, 0), train: ("", 70) };
    insta::assert_snapshot!(check("run", MINIMAL, Some(&trainer)), @r#"
exit 0
the same inputs are already published at file:///data/minimal (by run earlier-1); nothing was trained
"#);
    // Not with other settings, unless told to replace them.
    let report = published_with("0");
    let trainer = Trainer { preflight: (&report, 0), train: (SUCCEEDED, 0) };
    insta::assert_snapshot!(check("run", MINIMAL, Some(&trainer)), @r#"
exit 78
error: the run cannot start:
  spec.output.uri: file:///data/minimal holds a result of the same rows and model, made with other settings (by run earlier-1; they are in its finetune-manifest.json): choose another uri, or set output.overwrite: true to replace it
"#);
    let overwrite =
        MINIMAL.replace("file:///data/minimal}", "file:///data/minimal, overwrite: true}");
    assert_ne!(overwrite, MINIMAL);
    let shown = check("run", &overwrite, Some(&trainer));
    assert!(shown.starts_with("exit 0\npublished "), "{shown}");
}

#[test]
fn says_what_the_trainer_found_published() {
    let outcome = r#"{"result":"alreadyPublished","kind":"FullModel","uri":"file:///data/minimal","manifestSha256":"cd","by":"earlier-1"}"#;
    let report = ended_by(outcome);
    let trainer = Trainer { preflight: (PREFLIGHT, 0), train: (&report, 0) };
    insta::assert_snapshot!(check("run", MINIMAL, Some(&trainer)), @r#"
exit 0
the same inputs are already published at file:///data/minimal (by run earlier-1); nothing was trained
step 1/40  training  loss 2.500
"#);
}

#[test]
fn refuses_to_replace_another_runs_result() {
    let report = PREFLIGHT.replace("vacant", "publishedByAnotherRun");
    let trainer = Trainer { preflight: (&report, 0), train: (SUCCEEDED, 0) };
    insta::assert_snapshot!(check("run", MINIMAL, Some(&trainer)), @r#"
exit 78
error: the run cannot start:
  spec.output.uri: file:///data/minimal holds a result of different inputs: choose another uri, or set output.overwrite: true to replace it
    "#);
}

#[test]
fn refuses_claims_and_says_what_only_a_cluster_reads() {
    let manifest = MINIMAL.replace("file:///data/train.jsonl", "pvc://data/train.jsonl");
    insta::assert_snapshot!(check("run", &manifest, None), @r#"
exit 78
error: cannot run here:
  spec.dataset.train is "pvc://data/train.jsonl": there are no volume claims without a cluster; write the file:// URI of where the data is here
    "#);
    let manifest = format!("{MINIMAL}  suspend: true\n");
    insta::assert_snapshot!(check("run", &manifest, None), @r#"
exit 78
ignored here, only a cluster reads: suspend
error: no trainer at DIR/trainer: build it with `cargo xtask build`, or name it with --trainer FILE
    "#);
}

/// Runs a job on a trainer in whose memory micro-batches of so many sequences fit.
fn run_in_little_memory(fitting: &[u32]) -> (Output, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("job.yaml"), MINIMAL).unwrap();
    fs::write(path("preflight.json"), PREFLIGHT).unwrap();
    fs::write(path("succeeded.json"), SUCCEEDED).unwrap();
    let failed =
        r#"{"result":"failed","reason":"OutOfMemory","message":"the device ran out of memory"}"#;
    fs::write(path("failed.json"), ended_by(failed)).unwrap();
    let here = directory.path().display();
    let fitting: Vec<String> =
        fitting.iter().map(|size| format!("*'\"microBatchSize\":{size},'*")).collect();
    let script = format!(
        "{ARGUMENTS}if [ $1 = preflight ]; then cp {here}/preflight.json \"$report\"; exit 0; fi\n\
         told=$(tr -d ' \\n' < \"$config\"); echo \"$told\" >> {here}/told\n\
         case \"$told\" in {}) cp {here}/succeeded.json \"$report\"; exit 0;; esac\n\
         cp {here}/failed.json \"$report\"; exit 71\n",
        if fitting.is_empty() { "none".to_owned() } else { fitting.join("|") },
    );
    put_trainer(directory.path(), &script);
    (run_in(directory.path(), &["run"]), directory)
}

/// Returns what was said after the plan.
fn said_after_plan(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    let is_said = |line: &&str| line.starts_with("continuing") || line.starts_with("error");
    let lines: Vec<&str> = errors.lines().filter(is_said).collect();
    format!("exit {:?}\n{}", output.status.code().unwrap_or(-1), lines.join("\n"))
}

#[test]
fn goes_on_in_smaller_pieces_where_memory_is_too_little() {
    let (output, directory) = run_in_little_memory(&[2]);
    insta::assert_snapshot!(said_after_plan(&output), @r"
    exit 0
    continuing with trainBatchSizePerDevice 4 instead of 8, gradientAccumulationSteps 2 instead of 1: 8 sequences per step and the same result, in 266 MB instead of 277 MB, because the device ran out of memory
    continuing with trainBatchSizePerDevice 2 instead of 4, gradientAccumulationSteps 4 instead of 2: 8 sequences per step and the same result, in 260 MB instead of 266 MB, because the device ran out of memory
    ");
    let told = fs::read_to_string(directory.path().join("told")).unwrap();
    let told: Vec<finetune_contract::RunConfig> =
        told.lines().map(|line| finetune_contract::parse(line).unwrap()).collect();
    let attempts: Vec<_> = told
        .iter()
        .map(|config| {
            (config.attempt, config.training.micro_batch_size, config.global_batch_size())
        })
        .collect();
    assert_eq!(attempts, [(0, 8, 8), (1, 4, 8), (2, 2, 8)]);
    assert!(told.iter().all(|config| config.run_id == told[0].run_id));
}

#[test]
fn says_what_is_missing_when_the_smallest_pieces_are_too_large() {
    let (output, directory) = run_in_little_memory(&[]);
    insta::assert_snapshot!(said_after_plan(&output), @r"
    exit 71
    continuing with trainBatchSizePerDevice 4 instead of 8, gradientAccumulationSteps 2 instead of 1: 8 sequences per step and the same result, in 266 MB instead of 277 MB, because the device ran out of memory
    continuing with trainBatchSizePerDevice 2 instead of 4, gradientAccumulationSteps 4 instead of 2: 8 sequences per step and the same result, in 260 MB instead of 266 MB, because the device ran out of memory
    continuing with trainBatchSizePerDevice 1 instead of 2, gradientAccumulationSteps 8 instead of 4: 8 sequences per step and the same result, in 256 MB instead of 260 MB, because the device ran out of memory
    continuing with recompute block instead of none: 8 sequences per step and the same result, in 255 MB instead of 256 MB, because the device ran out of memory
    error: the device ran out of memory, and no smaller configuration is left to try: 255 MB was predicted. Lower training.contextLength, or use a machine with more memory
    ");
    let told = fs::read_to_string(directory.path().join("told")).unwrap();
    assert_eq!(told.lines().count(), 5, "8, 4, 2, 1, and blocks computed again");
}

#[test]
fn survives_the_first_interrupt_and_waits_for_the_trainer() {
    let report = ended_by(r#"{"result":"interrupted","checkpointStep":7}"#);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("job.yaml"), MINIMAL).unwrap();
    fs::write(path("preflight.json"), PREFLIGHT).unwrap();
    fs::write(path("train.json"), report).unwrap();
    // Like the trainer, the test double outlives an interrupt, saves and ends in its own time.
    let script = format!(
        "{ARGUMENTS}if [ $1 = train ]; then trap '' INT; kill -INT $PPID; sleep 0.3; fi\ncp {}/$1.json \"$report\"\n[ $1 = preflight ] || exit 75\n",
        directory.path().display()
    );
    put_trainer(directory.path(), &script);
    let output = run_in(directory.path(), &["run"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{errors}");
    assert!(
        errors.ends_with("step 7 is saved. Run the same command again to resume\n"),
        "{errors}"
    );
}

#[test]
fn passes_an_interrupt_on_that_only_the_command_was_sent() {
    for signal in ["INT", "TERM"] {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("job.yaml"), MINIMAL).unwrap();
        fs::write(path("preflight.json"), PREFLIGHT).unwrap();
        let here = directory.path().display();
        // Unlike a terminal, the test double tells the command alone, and waits to be told.
        let script = format!(
            "{ARGUMENTS}if [ $1 = preflight ]; then cp {here}/preflight.json \"$report\"; exit 0; fi\n\
             trap 'echo told > {here}/told; exit 75' {signal}\nkill -{signal} $PPID\n\
             for i in $(seq 100); do sleep 0.05; done\n"
        );
        put_trainer(directory.path(), &script);
        let output = run_in(directory.path(), &["run"]);
        assert_eq!(output.status.code(), Some(75), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(path("told").exists(), "SIG{signal} did not reach the trainer");
    }
}

#[test]
fn ends_with_the_status_of_what_the_user_must_mend() {
    let status = |reasons: &[&str]| {
        let problems: Vec<String> = reasons
            .iter()
            .map(|reason| format!(r#"{{"reason":"{reason}","location":"x","message":"m"}}"#))
            .collect();
        let found =
            format!(r#""problems":[{}],"problemsTotal":{}"#, problems.join(","), problems.len());
        let report = PREFLIGHT.replace(r#""problems":[],"problemsTotal":0"#, &found);
        let trainer = Trainer { preflight: (&report, 65), train: ("", 70) };
        finetune("plan", MINIMAL, Some(&trainer)).0.status.code()
    };
    assert_eq!(status(&["Unavailable"]), Some(69));
    assert_eq!(status(&["PermissionDenied"]), Some(77));
    assert_eq!(status(&["InvalidSpec"]), Some(78));
    assert_eq!(status(&["Unavailable", "InvalidDataset"]), Some(65));
}

/// Starts a run whose trainer trains until a file `go` appears; returns once it trains.
fn start_slow_run(directory: &Path) -> std::process::Child {
    fs::write(directory.join("job.yaml"), MINIMAL).unwrap();
    fs::write(directory.join("preflight.json"), PREFLIGHT).unwrap();
    fs::write(directory.join("train.json"), SUCCEEDED).unwrap();
    let script = format!(
        "{ARGUMENTS}cp {here}/$1.json \"$report\"\n[ $1 = train ] || exit 0\necho begun >> {here}/begun\nwhile [ ! -e {here}/go ]; do sleep 0.02; done\necho ended >> {here}/begun\n",
        here = directory.display(),
    );
    put_trainer(directory, &script);
    let mut command = command_in(directory, &["run"], "work");
    command.process_group(0).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    wait_until("it trains", || directory.join("begun").exists());
    child
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_second_run_of_a_job_waits_for_the_first_and_says_so() {
    // By the work directory; and, with another one, by the output.
    for work_dir in ["work", "another"] {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path();
        let mut first = start_slow_run(here);
        let mut command = command_in(here, &["run"], work_dir);
        let second = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut second = second.unwrap();
        let mut lines = BufReader::new(second.stderr.take().unwrap()).lines();
        let line = lines.next().unwrap().unwrap();
        let what =
            if work_dir == "work" { "work directory" } else { "output, file:///data/minimal" };
        let expected = format!(
            "waiting for another `finetune run` with the same {what} (process {})",
            first.id()
        );
        assert_eq!(line, expected);
        fs::write(here.join("go"), "").unwrap();
        assert!(first.wait().unwrap().success());
        lines.for_each(drop);
        assert!(second.wait().unwrap().success());
        let begun = fs::read_to_string(here.join("begun")).unwrap();
        assert_eq!(begun, "begun\nended\nbegun\nended\n", "one after the other");
    }
}

#[test]
fn a_killed_run_is_waited_for_no_longer_than_its_trainer_lives() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    // The command alone is killed: its trainer still writes to the output.
    let mut first = start_slow_run(here);
    first.kill().unwrap();
    first.wait().unwrap();
    let mut second = command_in(here, &["run"], "another");
    second.process_group(0).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut second = second.spawn().unwrap();
    let mut lines = BufReader::new(second.stderr.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    assert!(line.starts_with("waiting for another `finetune run`"), "{line}");
    fs::write(here.join("go"), "").unwrap();
    wait_until("the second has run", || second.try_wait().is_ok_and(|status| status.is_some()));

    // With its trainer: what it locked is free at once.
    fs::remove_file(here.join("go")).unwrap();
    fs::remove_file(here.join("begun")).unwrap();
    let mut third = start_slow_run(here);
    let group = format!("-{}", third.id());
    assert!(Command::new("kill").args(["-KILL", "--", &group]).status().unwrap().success());
    third.wait().unwrap();
    fs::write(here.join("go"), "").unwrap();
    let ran = run_in(here, &["run"]);
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && !said.contains("waiting"), "{said}");
}
