//! Where a test works: a directory with a model and rows, and the two programs.

use std::{
    fs,
    io::{BufRead, BufReader, Lines},
    net::TcpListener,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    time::{Duration, Instant},
};

use finetune_contract::{
    Manifest, Progress, RunConfig, RunReport, TrainerArgs, TrainerCommand, artifact::MANIFEST_NAME,
    parse, render,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::tiny_model;

const FINETUNE: &str = env!("CARGO_BIN_EXE_finetune");
/// How long a process may take to get where a test waits for it.
const PATIENCE: Duration = Duration::from_mins(2);

/// Returns a value a test cannot do without; says so loudly, or fails in CI, if there is none.
pub(crate) fn needed<T>(value: Option<T>, missing: &str) -> Option<T> {
    if value.is_none() {
        let test = std::thread::current().name().unwrap_or_default().to_owned();
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{test}: {missing}");
        eprintln!("SKIPPED {test}: {missing}");
    }
    value
}

/// A directory with a tiny model in `model` and twelve rows in `train.jsonl`.
pub(crate) struct Sandbox {
    directory: TempDir,
    trainer: PathBuf,
    environment: Vec<(String, String)>,
}

/// How a command ended.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Sandbox {
    pub(crate) fn new() -> Option<Self> {
        let beside = Path::new(FINETUNE).with_file_name("finetune-trainer");
        let release = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/release/finetune-trainer");
        let trainer = [beside, release].into_iter().find(|path| path.is_file());
        let trainer = needed(trainer, "target/release/finetune-trainer is not built")?;
        // Threads of a math library wait by spinning, and many tests run at once.
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state").display().to_string();
        let environment = vec![
            ("OMP_NUM_THREADS".to_owned(), "1".to_owned()),
            ("XDG_STATE_HOME".to_owned(), state),
        ];
        let sandbox = Self { directory, trainer, environment };
        tiny_model::write(&sandbox.path("model"));
        sandbox.write_rows("train.jsonl", 0..12);
        Some(sandbox)
    }

    /// Sets a variable of the processes' environment.
    pub(crate) fn set(&mut self, key: &str, value: &str) {
        self.environment.retain(|(other, _)| other != key);
        self.environment.push((key.to_owned(), value.to_owned()));
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn uri(&self, name: &str) -> String {
        format!("file://{}", self.path(name).display())
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn write_rows(&self, name: &str, numbers: std::ops::Range<u32>) {
        self.write(name, &rows(numbers));
    }

    /// Returns a short LoRA job with its result in `output`.
    pub(crate) fn job(&self, output: &str) -> Value {
        json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tiny"},
            "spec": {
                "model": {"uri": self.uri("model")},
                "dataset": {"train": self.uri("train.jsonl")},
                "loraConfig": {"r": 4, "loraDropout": 0.1},
                "training": {
                    "contextLength": 128, "maxSteps": 6, "learningRate": 1e-2, "dtype": "fp32",
                    "trainBatchSizePerDevice": 2, "gradientAccumulationSteps": 2, "checkpointSteps": 3,
                },
                "output": {"uri": self.uri(output)},
            },
        })
    }

    /// Runs `finetune run` on a job, with a work directory by its output's name.
    pub(crate) fn run(&self, job: &Value) -> Ran {
        Ran::of(&self.run_command(job).output().unwrap())
    }

    /// Starts `finetune run` on a job, as the leader of a process group.
    pub(crate) fn start(&self, job: &Value) -> Started {
        self.start_with(&mut self.run_command(job), job)
    }

    /// Starts a command that runs a job, as the leader of a process group.
    pub(crate) fn start_with(&self, command: &mut Command, job: &Value) -> Started {
        let child = command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        Started { child: child.spawn().unwrap(), history: self.work_dir(job).join("metrics.jsonl") }
    }

    /// Returns `finetune run --ranks` on a job.
    pub(crate) fn ranks_command(&self, job: &Value, ranks: u32) -> Command {
        let mut command = self.run_command(job);
        command.args(["--ranks", &ranks.to_string()]);
        command
    }

    fn run_command(&self, job: &Value) -> Command {
        let work_dir = self.work_dir(job);
        let file = work_dir.with_extension("json");
        fs::write(&file, job.to_string()).unwrap();
        let mut command = self.command();
        command.arg("run").arg("-f").arg(file).arg("--work-dir").arg(work_dir);
        command
    }

    /// Runs `finetune` with arguments.
    pub(crate) fn finetune(&self, arguments: &[&str]) -> Ran {
        Ran::of(&self.command().args(arguments).output().unwrap())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(FINETUNE);
        command.arg("--trainer").arg(&self.trainer).current_dir(self.directory.path());
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        command
    }

    pub(crate) fn work_dir(&self, job: &Value) -> PathBuf {
        let uri = job["spec"]["output"]["uri"].as_str().unwrap();
        self.path(&format!("work-{}", uri.rsplit('/').next().unwrap()))
    }

    /// Plans a job over so many ranks, so that its trainers can be started without the command.
    pub(crate) fn planned(&self, job: &Value, ranks: u32) -> RunConfig {
        self.write("planned.json", &job.to_string());
        let ranks = ranks.to_string();
        let arguments = ["plan", "-f", "planned.json", "--ranks", &ranks, "-o", "json"];
        let plan: Value = serde_json::from_str(&self.finetune(&arguments).ok().stdout).unwrap();
        serde_json::from_value(plan["runConfig"].clone()).unwrap()
    }

    /// Starts the trainers of a run's ranks.
    pub(crate) fn start_trainers(&self, config: &RunConfig) -> Trainers {
        let work_dir = self.path(&format!("work-{}", config.output.uri.file_name()));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let world_size = config.parallelism.world_size;
        let ranks = (0..world_size).map(|rank| {
            let directory = work_dir.join(format!("rank-{rank}"));
            fs::create_dir_all(&directory).unwrap();
            let path = |name: &str| directory.join(name);
            fs::write(path("config.json"), render(config)).unwrap();
            let mut command = Command::new(&self.trainer);
            command.current_dir(self.directory.path());
            let [config_file, report_file] = ["config.json", "report.json"].map(path);
            let args =
                TrainerArgs::new(TrainerCommand::Train, config_file, report_file, &directory);
            command.args(args.to_args());
            command.envs(self.environment.iter().map(|(key, value)| (key, value)));
            command.env("RANK", rank.to_string()).env("WORLD_SIZE", world_size.to_string());
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            command.stdout(if rank == 0 { Stdio::piped() } else { Stdio::null() });
            command.stderr(fs::File::create(path("log")).unwrap());
            (command.spawn().unwrap(), path("log"))
        });
        let mut ranks: Vec<_> = ranks.collect();
        let lines = BufReader::new(ranks[0].0.stdout.take().unwrap()).lines();
        Trainers { ranks, lines }
    }

    /// Returns the report of a job's last training.
    pub(crate) fn report(&self, job: &Value) -> RunReport {
        parse(&fs::read_to_string(self.work_dir(job).join("train-report.json")).unwrap()).unwrap()
    }

    /// Returns the names of a job's checkpoints, oldest first, and their directory.
    pub(crate) fn checkpoints(&self, output: &str) -> Vec<PathBuf> {
        let runs = fs::read_dir(self.path(&format!("{output}.checkpoints"))).unwrap();
        let mut paths: Vec<PathBuf> = runs
            .flat_map(|run| fs::read_dir(run.unwrap().path()).unwrap())
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("step-"))
            .filter(|path| path.join("checkpoint-manifest.json").exists())
            .collect();
        paths.sort();
        paths
    }

    /// Returns the checkpoints that were begun and have no manifest, of a run whose checkpoints are
    /// directly beside its output.
    pub(crate) fn half_written(&self, output: &str) -> Vec<PathBuf> {
        let directory = self.path(&format!("{output}.checkpoints"));
        let entries = fs::read_dir(directory).into_iter().flatten();
        let is_begun = |path: &PathBuf| {
            fs::read_dir(path).is_ok_and(|mut files| files.next().is_some())
                && !path.join("checkpoint-manifest.json").exists()
        };
        entries.map(|entry| entry.unwrap().path()).filter(is_begun).collect()
    }

    /// Reads a published result and checks every file against the manifest, as anybody could.
    pub(crate) fn published(&self, output: &str) -> Manifest {
        let directory = self.path(output);
        let text = fs::read_to_string(directory.join(MANIFEST_NAME)).unwrap();
        let manifest: Manifest = parse(&text).unwrap();
        for file in &manifest.files {
            let path = directory.join(&file.path);
            assert_eq!(fs::metadata(&path).unwrap().len(), file.size, "{}", file.path);
            assert_eq!(sha256(&path), file.sha256, "{}", file.path);
        }
        manifest
    }

    /// Returns what a command said for people, without this machine's paths.
    pub(crate) fn shown(&self, ran: &Ran) -> String {
        let lines: Vec<&str> =
            ran.stderr.lines().skip_while(|line| !line.starts_with("error: ")).collect();
        let text = format!("exit {}\n{}", ran.code, lines.join("\n"));
        text.replace(&self.directory.path().display().to_string(), "DIR")
    }
}

impl Ran {
    pub(crate) fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    /// Checks that the command succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}\n{}", self.stdout, self.stderr);
        self
    }
}

/// A run under way.
pub(crate) struct Started {
    child: Child,
    history: PathBuf,
}

impl Started {
    /// Waits until the history tells of `step`, or the run ended.
    pub(crate) fn wait_for_step(&mut self, step: u64) {
        self.wait_for(&format!("step {step}"), |last| last.step >= step);
    }

    /// Waits until the history tells of a complete checkpoint of `step` or later, or the run ended.
    pub(crate) fn wait_for_checkpoint(&mut self, step: u64) {
        self.wait_for(&format!("a checkpoint of step {step}"), |last| {
            last.checkpoint_step.is_some_and(|saved| saved >= step)
        });
    }

    fn wait_for(&mut self, what: &str, is_there: impl Fn(&Progress) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !self.last().is_some_and(|last| is_there(&last)) {
            if self.child.try_wait().unwrap().is_some() {
                return;
            }
            assert!(Instant::now() < deadline, "{what} is not reached");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn last(&self) -> Option<Progress> {
        let text = fs::read_to_string(&self.history).ok()?;
        // The last line may be half written.
        text.lines().rev().find_map(|line| parse::<Progress>(line).ok())
    }

    /// Waits until it ends by itself.
    pub(crate) fn end(self) -> Ran {
        Ran::of(&self.child.wait_with_output().unwrap())
    }

    /// Sends a signal to command and trainer, as a terminal does.
    pub(crate) fn signal(self, signal: &str) -> Ran {
        let group = format!("-{}", self.child.id());
        let sent = Command::new("kill").args([signal, "--", &group]).stderr(Stdio::null()).status();
        sent.unwrap();
        Ran::of(&self.child.wait_with_output().unwrap())
    }
}

/// The trainers of a run under way, and what rank 0 tells.
pub(crate) struct Trainers {
    ranks: Vec<(Child, PathBuf)>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Trainers {
    /// Waits for the next that rank 0 tells; `None` when it has ended.
    pub(crate) fn next(&mut self) -> Option<Progress> {
        let line = self.lines.next()?.unwrap();
        Some(parse(&line).unwrap())
    }

    /// Kills all, `first` before the others; tells whether one ended well before.
    pub(crate) fn kill(mut self, first: usize, apart: Duration) -> bool {
        let count = self.ranks.len();
        for index in 0..count {
            self.ranks[(first + index) % count].0.kill().unwrap();
            if index + 1 < count {
                std::thread::sleep(apart);
            }
        }
        let statuses: Vec<_> =
            self.ranks.iter_mut().map(|(child, _)| child.wait().unwrap()).collect();
        statuses[0].success()
    }

    /// Waits until all have ended well.
    #[track_caller]
    pub(crate) fn finish(mut self) {
        self.lines.by_ref().for_each(drop);
        for (child, log) in &mut self.ranks {
            let status = child.wait().unwrap();
            assert!(status.success(), "{status}\n{}", fs::read_to_string(log).unwrap());
        }
    }
}

/// Returns chat rows with regular answers.
pub(crate) fn rows(numbers: std::ops::Range<u32>) -> String {
    let row = |number: u32| {
        json!({"messages": [
            {"role": "user", "content": format!("{number}+1")},
            {"role": "assistant", "content": format!("= {}", number + 1)},
        ]})
    };
    lines(numbers.map(row))
}

/// Returns JSON values as the lines of a file.
pub(crate) fn lines(values: impl Iterator<Item = Value>) -> String {
    let lines: Vec<String> = values.map(|value| format!("{value}\n")).collect();
    lines.concat()
}

pub(crate) fn sha256(path: &Path) -> String {
    let digest = Sha256::digest(fs::read(path).unwrap());
    let bytes: Vec<String> = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.concat()
}
