//! Runs that are interrupted, killed and damaged, and still end as if nothing had been.

use std::{collections::BTreeSet, fs, time::Duration};

use finetune_contract::{Optimizer, RunConfig, Stage, Strategy};
use serde_json::{Value, json};

use crate::{
    sandbox::{Ran, Sandbox, sha256},
    tiny_model::Random,
};

const STEPS: u64 = 40;

/// Returns a job long enough to be killed in, with dropout and held-out rows, so that all state
/// counts.
fn long_job(sandbox: &Sandbox, output: &str) -> Value {
    sandbox.write_rows("validation.jsonl", 20..24);
    let mut job = sandbox.job(output);
    job["spec"]["dataset"]["validation"] = json!(sandbox.uri("validation.jsonl"));
    job["spec"]["training"]["maxSteps"] = json!(STEPS);
    job["spec"]["training"]["evaluationSteps"] = json!(4);
    job
}

/// Where a run is killed, once rank 0 has told so many lines, or that it exports.
enum Moment {
    Lines(u64),
    Exporting,
}

/// Kills the trainers of runs of a job again and again, while they load, train, write checkpoints,
/// export, publish and prove, and lets each run end at last with the file an unkilled one has.
fn kill_often(sandbox: &Sandbox, planned: &RunConfig, kills: u32, seed: u64) {
    let ranks = planned.parallelism.world_size;
    let file =
        if planned.lora.is_some() { "adapter_model.safetensors" } else { "model.safetensors" };
    let into = |output: &str| {
        let mut config = planned.clone();
        config.output.uri = sandbox.uri(output).parse().unwrap();
        config.checkpoints_uri = config.output.uri.with_suffix(".checkpoints");
        config
    };
    let digest = |output: &str| sha256(&sandbox.path(&format!("{output}/{file}")));
    sandbox.start_trainers(&into("whole")).finish();
    let whole = digest("whole");

    let mut random = Random::new(seed);
    let (mut done, mut at_the_end, mut runs) = (0, 0, 0);
    let mut half_written = BTreeSet::new();
    while done < kills {
        runs += 1;
        let output = format!("killed-{runs}");
        loop {
            let mut trainers = sandbox.start_trainers(&into(&output));
            if done == kills {
                trainers.finish();
                break;
            }
            let moment = match random.number() % 3 {
                0 => Moment::Exporting,
                _ => Moment::Lines(1 + random.number() % (STEPS / 2)),
            };
            let (mut lines, mut is_at_the_end) = (0, false);
            while let Some(progress) = trainers.next() {
                lines += 1;
                is_at_the_end = progress.stage >= Stage::Exporting;
                let is_it = match moment {
                    Moment::Lines(count) => lines >= count,
                    Moment::Exporting => is_at_the_end,
                };
                if is_it {
                    break;
                }
            }
            // A step takes some milliseconds; writing, publishing and proving the result some more.
            let most_milliseconds = if is_at_the_end { 60.0 } else { 8.0 };
            let mut wait =
                || Duration::from_micros((1000.0 * most_milliseconds * random.fraction()) as u64);
            std::thread::sleep(wait());
            let apart = wait();
            if trainers.kill((random.number() % u64::from(ranks)) as usize, apart) {
                break;
            }
            done += 1;
            half_written.extend(sandbox.half_written(&output));
            at_the_end += u32::from(is_at_the_end);
        }
        sandbox.published(&output);
        assert_eq!(digest(&output), whole, "seed {seed}, run {runs}, {done} kills");
    }
    eprintln!(
        "{kills} kills of {runs} runs: {} left a half-written checkpoint, {at_the_end} came after \
         training (seed {seed})",
        half_written.len()
    );
    assert!(at_the_end > 0 && at_the_end < kills, "seed {seed}: all at one side of the last step");
}

#[test]
fn a_lora_run_killed_a_hundred_times_ends_with_the_very_same_adapter() {
    let Some(sandbox) = Sandbox::new() else { return };
    let planned = sandbox.planned(&long_job(&sandbox, "output"), 1);
    kill_often(&sandbox, &planned, 100, 1);
}

#[test]
fn a_killed_full_parameter_run_ends_with_the_very_same_model() {
    for optimizer in ["adamw", "adamw8bit"] {
        let Some(sandbox) = Sandbox::new() else { return };
        let mut job = full_parameter(&sandbox);
        job["spec"]["training"]["optimizer"] = json!(optimizer);
        kill_often(&sandbox, &sandbox.planned(&job, 1), 15, 2);
    }
}

#[test]
fn two_killed_ranks_end_with_the_very_same_weights() {
    let Some(sandbox) = Sandbox::new() else { return };
    let planned = sandbox.planned(&long_job(&sandbox, "output"), 2);
    kill_often(&sandbox, &planned, 15, 3);
}

#[test]
fn two_killed_ranks_that_divide_the_model_end_with_the_very_same_weights() {
    for (strategy, optimizer) in
        [(Strategy::Zero1, Optimizer::Adamw), (Strategy::Zero3, Optimizer::Adamw8bit)]
    {
        let Some(sandbox) = Sandbox::new() else { return };
        let mut planned = sandbox.planned(&full_parameter(&sandbox), 2);
        planned.parallelism.strategy = strategy;
        planned.training.optimizer = optimizer;
        kill_often(&sandbox, &planned, 10, 4);
    }
}

fn full_parameter(sandbox: &Sandbox) -> Value {
    let mut job = long_job(sandbox, "output");
    job["spec"].as_object_mut().unwrap().remove("loraConfig");
    job["spec"]["training"]["learningRate"] = json!(1e-3);
    job
}

#[test]
fn an_interrupted_run_says_so_and_goes_on() {
    let Some(sandbox) = Sandbox::new() else { return };
    let job = long_job(&sandbox, "output");
    let mut started = sandbox.start(&job);
    started.wait_for_step(5);
    let ran = started.signal("-INT");
    assert_eq!(ran.code, 75, "{}", ran.stderr);
    let saved = sandbox.report(&job).steps;
    assert!((5..STEPS).contains(&saved));
    let message =
        format!("interrupted; step {saved} is saved. Run the same command again to resume");
    assert!(ran.stderr.contains(&message), "{}", ran.stderr);
    sandbox.run(&job).ok();
    assert_eq!(sandbox.report(&job).resumed_from_step, Some(saved));
    sandbox.published("output");
}

#[test]
fn a_truncated_checkpoint_is_passed_over_for_the_one_before() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.run(&long_job(&sandbox, "whole")).ok();
    let job = long_job(&sandbox, "output");
    let mut started = sandbox.start(&job);
    started.wait_for_checkpoint(8);
    started.signal("-KILL");
    let checkpoints = sandbox.checkpoints("output");
    let [.., before, newest] = &checkpoints[..] else { panic!("{checkpoints:?}") };
    let state = newest.join("state.safetensors");
    let length = fs::metadata(&state).unwrap().len();
    fs::File::options().write(true).open(&state).unwrap().set_len(length / 2).unwrap();
    let ran = sandbox.run(&job).ok();
    assert!(ran.stderr.contains("skipped a damaged checkpoint"), "{}", ran.stderr);
    let step = sandbox.report(&job).resumed_from_step.unwrap();
    assert_eq!(before.file_name().unwrap().to_string_lossy(), format!("step-{step:08}"));
    let digest =
        |output: &str| sha256(&sandbox.path(&format!("{output}/adapter_model.safetensors")));
    assert_eq!(digest("output"), digest("whole"));
}

#[test]
fn a_checkpoint_of_which_one_part_is_damaged_is_passed_over_by_all() {
    let Some(sandbox) = Sandbox::new() else { return };
    let job = |output: &str| {
        let mut job = full_parameter(&sandbox);
        job["spec"]["output"]["uri"] = json!(sandbox.uri(output));
        job
    };
    Ran::of(&sandbox.ranks_command(&job("whole"), 2).output().unwrap()).ok();
    let damaged = job("output");
    let mut started = sandbox.start_with(&mut sandbox.ranks_command(&damaged, 2), &damaged);
    started.wait_for_checkpoint(8);
    assert_eq!(started.signal("-INT").code, 75);
    let checkpoints = sandbox.checkpoints("output");
    let [.., before, newest] = &checkpoints[..] else { panic!("{checkpoints:?}") };
    let part = newest.join("state-00002-of-00002.safetensors");
    let length = fs::metadata(&part).unwrap().len();
    fs::File::options().write(true).open(&part).unwrap().set_len(length / 2).unwrap();
    let ran = Ran::of(&sandbox.ranks_command(&damaged, 2).output().unwrap()).ok();
    assert!(ran.stderr.contains("skipped a damaged checkpoint"), "{}", ran.stderr);
    let step = sandbox.report(&damaged).resumed_from_step.unwrap();
    assert_eq!(before.file_name().unwrap().to_string_lossy(), format!("step-{step:08}"));
    let digest = |output: &str| sha256(&sandbox.path(&format!("{output}/model.safetensors")));
    assert_eq!(digest("output"), digest("whole"));
}

#[test]
fn a_run_does_not_go_on_with_other_rows() {
    let Some(sandbox) = Sandbox::new() else { return };
    let job = long_job(&sandbox, "output");
    let mut started = sandbox.start(&job);
    started.wait_for_step(4);
    started.signal("-INT");
    sandbox.write_rows("train.jsonl", 0..13);
    let shown = sandbox.shown(&sandbox.run(&job));
    let step = sandbox.checkpoints("output").pop().unwrap();
    let shown = shown.replace(&*step.file_name().unwrap().to_string_lossy(), "STEP");
    let run = step.parent().unwrap().file_name().unwrap().to_string_lossy().into_owned();
    insta::assert_snapshot!(shown.replace(&run, "RUN"), @r"
exit 78
error: the checkpoint file://DIR/output.checkpoints/RUN/STEP was written with data or settings that differ from this run's: delete file://DIR/output.checkpoints/RUN to start over, or restore the original data and settings
");
}
