//! `finetune run --ranks`: several trainers on this machine do what one does, and end together.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use finetune_contract::Strategy;
use serde_json::{Value, json};

use crate::sandbox::{Ran, Sandbox};

/// Returns a job at a rate so low that rounding stays small.
fn smooth_job(sandbox: &Sandbox, output: &str, accumulation: u32, is_lora: bool) -> Value {
    let mut job = sandbox.job(output);
    let spec = job["spec"].as_object_mut().unwrap();
    spec["training"]["gradientAccumulationSteps"] = json!(accumulation);
    spec["training"]["learningRate"] = json!(1e-3);
    if !is_lora {
        spec.remove("loraConfig");
    }
    job
}

#[test]
fn two_ranks_train_what_one_does() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.write_rows("validation.jsonl", 20..25);
    for is_lora in [true, false] {
        let job = |output: &str, accumulation: u32| {
            let mut job = smooth_job(&sandbox, output, accumulation, is_lora);
            job["spec"]["dataset"]["validation"] = json!(sandbox.uri("validation.jsonl"));
            // A step after an evaluation finds weights gathered.
            job["spec"]["training"]["evaluationSteps"] = json!(1000);
            job
        };
        let (one, two) = (format!("one-{is_lora}"), format!("two-{is_lora}"));
        let (one_job, two_job) = (job(&one, 4), job(&two, 2));
        sandbox.run(&one_job).ok();
        let ran = Ran::of(&sandbox.ranks_command(&two_job, 2).output().unwrap()).ok();
        assert!(ran.stderr.contains("ranks                      2"), "{}", ran.stderr);
        let (one_report, report) = (sandbox.report(&one_job), sandbox.report(&two_job));
        let losses = |report: &finetune_contract::RunReport| {
            [report.train_loss.unwrap(), report.eval_loss.unwrap()].concat()
        };
        for (one, two) in losses(&one_report).iter().zip(losses(&report)) {
            assert!((one - two).abs() < 1e-6, "{one} {two}");
        }
        assert_eq!(report.tokens_seen, one_report.tokens_seen);
        // As planned, and some numbers in eight bytes each; what is divided is filled up, too.
        let predicted = report.predicted_sent_bytes.unwrap();
        let more = report.measured_sent_bytes.unwrap() - predicted;
        assert!(if is_lora { more == 3 * 8 } else { more < predicted / 50 }, "{more} {predicted}");
        assert_eq!(sandbox.published(&one).files.len(), sandbox.published(&two).files.len());
        sandbox.finetune(&["verify", &sandbox.uri(&two)]).ok();
    }
}

/// 19 rows in steps of 8: the last has 3, which two ranks cannot halve.
#[test]
fn two_ranks_share_a_short_last_step() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.write_rows("train.jsonl", 0..19);
    for is_lora in [true, false] {
        let job = |output: &str, accumulation: u32| {
            let mut job = smooth_job(&sandbox, output, accumulation, is_lora);
            let training = job["spec"]["training"].as_object_mut().unwrap();
            training.remove("maxSteps");
            training.insert("numEpochs".to_owned(), json!(1));
            // A sequence for each row.
            training.insert("packing".to_owned(), json!(false));
            job
        };
        let (one_job, two_job) =
            (job(&format!("one-{is_lora}"), 4), job(&format!("two-{is_lora}"), 2));
        sandbox.run(&one_job).ok();
        Ran::of(&sandbox.ranks_command(&two_job, 2).output().unwrap()).ok();
        let [one, two] = [sandbox.report(&one_job), sandbox.report(&two_job)];
        assert_eq!((one.steps, two.steps), (3, 3));
        assert_eq!(two.tokens_seen, one.tokens_seen);
        let losses = one.train_loss.unwrap().into_iter().zip(two.train_loss.unwrap());
        for (one, two) in losses {
            assert!((one - two).abs() < 1e-6, "{one} {two}");
        }
    }
}

#[test]
fn the_plan_says_how_ranks_divide_the_run() {
    let Some(sandbox) = Sandbox::new() else { return };
    let job = sandbox.job("output");
    fs::write(sandbox.path("job.json"), job.to_string()).unwrap();
    let ran = sandbox.finetune(&["plan", "-f", "job.json", "--ranks", "4", "-o", "json"]).ok();
    let plan: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let parallelism = &plan["runConfig"]["parallelism"];
    assert_eq!(
        parallelism,
        &json!({"worldSize": 4, "strategy": Strategy::Ddp, "localWorldSize": 4})
    );
}

#[test]
fn the_death_of_a_rank_ends_the_command_which_goes_on_when_run_again() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    job["spec"]["training"]["maxSteps"] = json!(400);
    let mut started = sandbox.start_with(&mut sandbox.ranks_command(&job, 2), &job);
    started.wait_for_checkpoint(3);
    let victim = trainer_in(&sandbox.work_dir(&job).join("rank-1"));
    let killed = Instant::now();
    assert!(Command::new("kill").args(["-9", &victim]).status().unwrap().success());
    let ran = started.end();
    assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
    insta::assert_snapshot!(sandbox.shown(&ran), @r"
    exit 76
    error: rank 1 was killed (signal 9), perhaps because it ran out of memory; the other ranks ended with it. Start the run again to resume it from its last checkpoint
    ");
    Ran::of(&sandbox.ranks_command(&job, 2).output().unwrap()).ok();
    assert!(sandbox.report(&job).resumed_from_step.is_some());
}

/// Finds the process that works in a directory.
fn trainer_in(work_dir: &std::path::Path) -> String {
    let named = format!("--work-dir={}", work_dir.display());
    let processes = fs::read_dir("/proc").unwrap();
    let found = processes.filter_map(|entry| {
        let entry = entry.unwrap();
        let arguments = fs::read(entry.path().join("cmdline")).ok()?;
        let is_it = arguments.split(|&byte| byte == 0).any(|word| word == named.as_bytes());
        is_it.then(|| entry.file_name().to_string_lossy().into_owned())
    });
    let found: Vec<String> = found.collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}
