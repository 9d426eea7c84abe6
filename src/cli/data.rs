//! `finetune data check`: shows what of the rows is trained on, before anything is trained.

use std::{ffi::OsString, fs, path::PathBuf};

use clap::Args;
use finetune_api::{FineTuneJob, manifest};
use serde_json::json;

use super::{failure::Failure, run, trainer};

/// Which rows, and how they are shown.
#[derive(Debug, Args)]
pub(super) struct Check {
    /// The rows: a file here, or the URI of a file or prefix; with --model
    #[arg(value_name = "ROWS", required_unless_present = "manifest", requires = "model")]
    rows_at: Option<String>,
    /// The model they are for: a directory here, or a URI such as hf://OWNER/NAME
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// A FineTuneJob that names both, and says how rows are read
    #[arg(short = 'f', long = "file", value_name = "FILE", conflicts_with_all = ["rows_at", "model"])]
    manifest: Option<PathBuf>,
    /// How many rows to show from the first
    #[arg(long, default_value_t = 3, value_name = "N")]
    rows: u32,
    /// Show this row instead, by its line: 17, or train.jsonl:17; may be given more than once
    #[arg(long, value_name = "LINE")]
    line: Vec<String>,
    /// Show each token with its id
    #[arg(long)]
    ids: bool,
    /// Where models and documents go; below ~/.local/state/finetune if absent
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
}

/// Shows rows.
pub(super) fn check(asked: Check, named: Option<PathBuf>) -> Result<(), Failure> {
    let Check { rows_at, model, manifest, rows, line, ids, work_dir } = asked;
    let job = match (manifest, rows_at, model) {
        (None, Some(rows), Some(model)) => job_of(&rows, &model)?,
        (Some(file), ..) => run::read(&file)?,
        (None, ..) => {
            return Err(Failure::configuration("name rows and --model, or a manifest with -f"));
        }
    };
    let program = trainer::find(named)?;
    let work_dir = run::make_work_dir(work_dir, &job)?;
    let config_path = work_dir.join("data-check-config.json");
    let config = run::preflight_config(&job, false)?;
    fs::write(&config_path, finetune_contract::render(&config))
        .map_err(|error| trainer::cannot_write(&config_path, &error))?;
    let mut arguments: Vec<OsString> = vec![
        "--config".into(),
        config_path.into(),
        "--work-dir".into(),
        work_dir.into(),
        "--rows".into(),
        rows.to_string().into(),
    ];
    for line in line {
        arguments.extend(["--line".into(), line.into()]);
    }
    arguments.extend(ids.then(|| "--ids".into()));
    trainer::pass_on(Some(program), "data-check", &arguments)
}

/// Creates a job of rows and a model, with the defaults of everything else.
fn job_of(rows: &str, model: &str) -> Result<FineTuneJob, Failure> {
    let text = json!({
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "data-check"},
        "spec": {
            "model": {"uri": uri(model)?},
            "dataset": {"train": uri(rows)?},
            // Every job has one; nothing is written to it.
            "output": {"uri": "file:///nothing-is-written"},
        },
    });
    manifest::parse(&text.to_string()).map_err(|error| match error {
        manifest::Error::Violations(violations) => {
            Failure::violations("these rows or this model cannot be read:", &violations)
        }
        other => Failure::internal(other),
    })
}

/// Returns the URI of what a user names: a path here, unless it is one.
fn uri(place: &str) -> Result<String, Failure> {
    if place.contains("://") {
        return Ok(place.to_owned());
    }
    let path = std::path::absolute(place)
        .map_err(|error| Failure::configuration(format!("{place:?} is no path: {error}")))?;
    Ok(format!("file://{}", path.display()))
}
