//! Runs that are interrupted, killed and damaged, and still end as if nothing had been.

use std::{fs, time::Duration};

use serde_json::{Value, json};

use crate::{
    bench::{Bench, sha256},
    model::Random,
};

const STEPS: u64 = 40;

/// Returns a job long enough to be killed in, with dropout and held-out rows, so that all state
/// counts.
fn long_job(bench: &Bench, output: &str) -> Value {
    bench.write_rows("validation.jsonl", 20..24);
    let mut job = bench.job(output);
    job["spec"]["dataset"]["validation"] = json!(bench.uri("validation.jsonl"));
    job["spec"]["training"]["maxSteps"] = json!(STEPS);
    job["spec"]["training"]["evaluationSteps"] = json!(4);
    job
}

/// Kills a run at random moments of its training and of its end, and lets it end at last.
fn kill_often(bench: &Bench, job: &Value, seed: u64) {
    let mut random = Random::new(seed);
    let report = bench.work_dir(job).join("train-report.json");
    let mut step = 0;
    while step < STEPS {
        step = (step + 1 + random.number() % (STEPS / 3)).min(STEPS);
        let mut started = bench.start(job);
        started.wait_for_step(step);
        // A step takes some milliseconds; writing, publishing and proving the result some more.
        let most_milliseconds = if step < STEPS { 8.0 } else { 60.0 };
        let moment = most_milliseconds * random.fraction();
        std::thread::sleep(Duration::from_micros((1000.0 * moment) as u64));
        started.signal("-KILL");
        assert!(step == STEPS || !report.exists(), "the run ended before it was killed");
    }
    bench.run(job).ok();
}

#[test]
fn a_killed_lora_run_ends_with_the_very_same_adapter() {
    let Some(bench) = Bench::new() else { return };
    bench.run(&long_job(&bench, "whole")).ok();
    let whole = sha256(&bench.path("whole/adapter_model.safetensors"));
    for seed in [1, 2] {
        let output = format!("killed-{seed}");
        kill_often(&bench, &long_job(&bench, &output), seed);
        let killed = sha256(&bench.path(&format!("{output}/adapter_model.safetensors")));
        assert_eq!(killed, whole, "seed {seed}");
        bench.published(&output);
    }
}

#[test]
fn a_killed_full_parameter_run_ends_with_the_very_same_model() {
    let Some(bench) = Bench::new() else { return };
    let job = |output: &str| {
        let mut job = long_job(&bench, output);
        job["spec"].as_object_mut().unwrap().remove("loraConfig");
        job["spec"]["training"]["learningRate"] = json!(1e-3);
        job
    };
    bench.run(&job("whole")).ok();
    kill_often(&bench, &job("killed"), 3);
    let digest = |output: &str| sha256(&bench.path(&format!("{output}/model.safetensors")));
    assert_eq!(digest("killed"), digest("whole"));
    bench.published("killed");
}

#[test]
fn an_interrupted_run_says_so_and_goes_on() {
    let Some(bench) = Bench::new() else { return };
    let job = long_job(&bench, "output");
    let mut started = bench.start(&job);
    started.wait_for_step(5);
    let ran = started.signal("-INT");
    assert_eq!(ran.code, 75, "{}", ran.stderr);
    let saved = bench.report(&job).steps;
    assert!((5..STEPS).contains(&saved));
    let message =
        format!("interrupted; step {saved} is saved. Run the same command again to go on");
    assert!(ran.stderr.contains(&message), "{}", ran.stderr);
    bench.run(&job).ok();
    assert_eq!(bench.report(&job).resumed_from_step, Some(saved));
    bench.published("output");
}

#[test]
fn a_truncated_checkpoint_is_passed_over_for_the_one_before() {
    let Some(bench) = Bench::new() else { return };
    bench.run(&long_job(&bench, "whole")).ok();
    let job = long_job(&bench, "output");
    let mut started = bench.start(&job);
    started.wait_for_step(10);
    started.signal("-KILL");
    let checkpoints = bench.checkpoints("output");
    let [.., before, newest] = &checkpoints[..] else { panic!("{checkpoints:?}") };
    let state = newest.join("state.safetensors");
    let length = fs::metadata(&state).unwrap().len();
    fs::File::options().write(true).open(&state).unwrap().set_len(length / 2).unwrap();
    let ran = bench.run(&job).ok();
    assert!(ran.stderr.contains("skipped a damaged checkpoint"), "{}", ran.stderr);
    let step = bench.report(&job).resumed_from_step.unwrap();
    assert_eq!(before.file_name().unwrap().to_string_lossy(), format!("step-{step:08}"));
    let digest = |output: &str| sha256(&bench.path(&format!("{output}/adapter_model.safetensors")));
    assert_eq!(digest("output"), digest("whole"));
}

#[test]
fn a_run_does_not_go_on_with_other_rows() {
    let Some(bench) = Bench::new() else { return };
    let job = long_job(&bench, "output");
    let mut started = bench.start(&job);
    started.wait_for_step(4);
    started.signal("-INT");
    bench.write_rows("train.jsonl", 0..13);
    let shown = bench.shown(&bench.run(&job));
    let step = bench.checkpoints("output").pop().unwrap();
    let shown = shown.replace(&*step.file_name().unwrap().to_string_lossy(), "STEP");
    let run = step.parent().unwrap().file_name().unwrap().to_string_lossy().into_owned();
    insta::assert_snapshot!(shown.replace(&run, "RUN"), @r"
exit 78
error: the checkpoint file://DIR/output.checkpoints/RUN/STEP was written with other data or settings than this run's: delete file://DIR/output.checkpoints/RUN to start over, or restore what was changed
");
}
