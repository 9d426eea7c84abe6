//! Runs on a real model, which really learn.
//!
//! `FINETUNE_TEST_MODEL` names a directory with SmolLM2-135M-Instruct, or a model of its size.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde_json::{Value, json};

use crate::sandbox::{Sandbox, lines, needed};

/// The most memory a LoRA run on a model of this size may take, in bytes.
const LORA_PEAK_BYTES: u64 = 1_600_000_000;
/// What the loss on held-out rows must fall to, as a part of what it was.
const LEARNED: f64 = 0.6;

/// Returns a job that teaches the model how one station answers.
fn job(sandbox: &Sandbox, training: Value) -> Option<Value> {
    let directory = std::env::var_os("FINETUNE_TEST_MODEL").map(PathBuf::from);
    let directory = needed(directory, "FINETUNE_TEST_MODEL is not set")?;
    sandbox.write("train.jsonl", &reports(0..160));
    sandbox.write("validation.jsonl", &reports(160..176));
    let mut job = sandbox.job("output");
    let spec = &mut job["spec"];
    spec["model"]["uri"] = json!(format!("file://{}", directory.display()));
    spec["dataset"]["validation"] = json!(sandbox.uri("validation.jsonl"));
    spec["training"] = training;
    Some(job)
}

fn reports(numbers: std::ops::Range<u32>) -> String {
    let row = |number: u32| {
        let place = ["harbor", "ridge", "valley", "delta"][number as usize % 4];
        let level = number * 37 % 90 + 10;
        json!({"messages": [
            {"role": "user", "content": format!("Gauge {number} at the {place} reads {level}. Report it.")},
            {"role": "assistant", "content": format!("STATION {} // GAUGE {number} // LEVEL {level} // END OF REPORT", place.to_uppercase())},
        ]})
    };
    lines(numbers.map(row))
}

/// Real work takes all cores, so there is one such run at a time.
static MACHINE: Mutex<()> = Mutex::new(());

fn sandbox() -> Option<(Sandbox, MutexGuard<'static, ()>)> {
    let machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut sandbox = Sandbox::new()?;
    let cores = std::thread::available_parallelism().unwrap();
    sandbox.set("OMP_NUM_THREADS", &cores.to_string());
    Some((sandbox, machine))
}

#[track_caller]
fn learns(sandbox: &Sandbox, job: &Value) {
    let ran = sandbox.run(job).ok();
    eprintln!("{}", ran.stdout);
    let [before, after] = sandbox.report(job).eval_loss.unwrap();
    assert!(after < LEARNED * before, "{before} → {after}");
    sandbox.published("output");
    sandbox.finetune(&["verify", &sandbox.uri("output")]).ok();
}

#[test]
fn an_adapter_of_a_real_model_learns_in_little_memory() {
    let Some((sandbox, _machine)) = sandbox() else { return };
    let training = json!({
        "contextLength": 128, "maxSteps": 25, "learningRate": 1e-3, "trainBatchSizePerDevice": 2,
        "gradientAccumulationSteps": 2, "evaluationSteps": 25,
    });
    let Some(mut job) = job(&sandbox, training) else { return };
    job["spec"]["loraConfig"] = json!({});
    learns(&sandbox, &job);
    let peak = sandbox.report(&job).measured_peak_bytes;
    assert!(peak < LORA_PEAK_BYTES, "{peak} bytes");
}

#[test]
fn a_real_model_trained_in_full_learns() {
    let Some((sandbox, _machine)) = sandbox() else { return };
    let training = json!({
        "contextLength": 128, "maxSteps": 6, "learningRate": 1e-4, "trainBatchSizePerDevice": 2,
        "gradientAccumulationSteps": 2, "numWarmupSteps": 1, "evaluationSteps": 6,
    });
    let Some(mut job) = job(&sandbox, training) else { return };
    job["spec"].as_object_mut().unwrap().remove("loraConfig");
    learns(&sandbox, &job);
}
