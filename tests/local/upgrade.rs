//! What an earlier release left behind: `upgrade/` holds a plan, a checkpoint and a result that
//! release b62728c wrote, with its model and rows.
//!
//! Digests of a run contain the URIs of what it reads, so these name the directory that a process runs
//! in.

use std::{fs, path::Path};

use finetune_contract::{Outcome, RunConfig, RunReport, parse};
use serde_json::{Value, json};

use crate::sandbox::Sandbox;

/// The step of the stored checkpoint, and the last step of its run.
const STEPS: (u64, u64) = (102, 400);

/// Returns a directory that is as the earlier release left it.
fn sandbox() -> Option<Sandbox> {
    let sandbox = Sandbox::new()?;
    let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/local/upgrade");
    fs::remove_dir_all(sandbox.path("model")).unwrap();
    copy(&stored, &sandbox.path(""));
    Some(sandbox)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, target).unwrap();
        }
    }
}

fn job(sandbox: &Sandbox, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(sandbox.path(name)).unwrap()).unwrap()
}

#[test]
fn a_stored_plan_resumes_from_a_checkpoint_of_an_earlier_release() {
    let Some(sandbox) = sandbox() else { return };
    let stored = fs::read_to_string(sandbox.path("interrupted.config.json")).unwrap();
    let config: RunConfig = parse(&stored).unwrap();
    sandbox.start_trainers(&RunConfig { attempt: 1, ..config }).finish();
    let report = fs::read_to_string(sandbox.path("work-output/rank-0/report.json")).unwrap();
    let report: RunReport = parse(&report).unwrap();
    assert!(matches!(report.outcome, Outcome::Succeeded { .. }), "{:?}", report.outcome);
    assert_eq!((report.resumed_from_step, report.steps), (Some(STEPS.0), STEPS.1));
    assert_eq!(sandbox.published("output").step, STEPS.1);
}

#[test]
fn the_same_manifest_resumes_a_run_of_an_earlier_release() {
    let Some(sandbox) = sandbox() else { return };
    let job = job(&sandbox, "interrupted.job.json");
    sandbox.run(&job).ok();
    let report = sandbox.report(&job);
    assert_eq!((report.resumed_from_step, report.steps), (Some(STEPS.0), STEPS.1));
}

#[test]
fn a_result_of_an_earlier_release_is_verified_and_trained_further() {
    let Some(sandbox) = sandbox() else { return };
    sandbox.finetune(&["verify", "file:///proc/self/cwd/published"]).ok();
    let mut job = job(&sandbox, "published.job.json");
    job["spec"]["initialAdapter"] = json!({"uri": "file:///proc/self/cwd/published"});
    job["spec"]["output"]["uri"] = json!(sandbox.uri("further"));
    sandbox.run(&job).ok();
    sandbox.published("further");
}
