//! The trainer as a child process: documents in files, progress on its standard output.

use std::{
    ffi::OsString,
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use finetune_contract::{
    Document, ExitCode, Progress, TrainerArgs, TrainerCommand, process::environment::GOMP_SPINCOUNT,
};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

use super::{display::ProgressDisplay, failure::Failure, lock::Locks};

/// How often a waiting command looks at the child and at its own signals.
const POLL: Duration = Duration::from_millis(50);

/// The trainer's program and the directory its documents go to.
pub(super) struct Trainer {
    pub(super) program: PathBuf,
    pub(super) work_dir: PathBuf,
    /// The locks of the run; none for what does not run.
    pub(super) locks: Option<Locks>,
}

/// How a child ended.
pub(super) struct Ended {
    pub(super) code: Option<i32>,
    /// Whether this command was asked to stop meanwhile.
    pub(super) was_interrupted: bool,
    /// Whether it was OOM-killed.
    pub(super) is_out_of_memory: bool,
}

/// Tells a process that was OOM-killed from one that somebody killed.
struct OomWatch(Option<u64>);

impl OomWatch {
    /// Starts watching.
    fn start() -> Self {
        Self(oom_kills())
    }

    /// Returns whether a process that ended meanwhile was OOM-killed.
    fn is_cause_of(&self, status: ExitStatus) -> bool {
        let is_killed = status.signal() == Some(Signal::KILL.as_raw());
        is_killed && self.0.zip(oom_kills()).is_some_and(|(before, now)| now > before)
    }
}

/// Returns how many processes of this machine were OOM-killed; none where the kernel does not tell.
///
/// # Source
/// `oom_kill` of `/proc/vmstat`, which counts those of a cgroup's limit too.
fn oom_kills() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// Finds the trainer: the one named, else the one beside this program.
pub(super) fn find(named: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let program = match named {
        Some(program) => program,
        None => {
            std::env::current_exe().map_err(Failure::internal)?.with_file_name("finetune-trainer")
        }
    };
    if program.is_file() {
        return Ok(program);
    }
    Err(Failure::configuration(format!(
        "no trainer at {}: build it with `cargo xtask build`, or name it with --trainer FILE",
        program.display()
    )))
}

/// Runs `finetune-trainer SUBCOMMAND ARGUMENTS…` and passes its exit status on.
pub(super) fn pass_on(
    named: Option<PathBuf>,
    subcommand: &str,
    arguments: &[OsString],
) -> Result<(), Failure> {
    let program = find(named)?;
    let status = Command::new(&program).arg(subcommand).args(arguments).status();
    let status = status.map_err(|error| cannot_start(&program, &error))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => Err(Failure::explained(code as u8)),
        None => Err(Failure::internal(format!("finetune-trainer {subcommand} was killed"))),
    }
}

impl Trainer {
    /// Runs one step with `config`; returns how it ended and the text of its report, if it left one.
    pub(super) fn run<D: Document>(
        &self,
        what: TrainerCommand,
        config: &D,
    ) -> Result<(Ended, Option<String>), Failure> {
        let documents = Documents::prepare(&self.work_dir, what.as_str(), config)?;
        // Listening replaces the default action, so that the child can save a checkpoint first.
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(Failure::internal)?;
        let memory = OomWatch::start();
        let mut child = self
            .command(what, &documents)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| cannot_start(&self.program, &error))?;
        let reader = child.stdout.take().map(|stdout| std::thread::spawn(move || follow(stdout)));
        let (status, was_interrupted) = wait(&mut child, &mut signals)?;
        if let Some(reader) = reader {
            let _ = reader.join();
        }
        let is_out_of_memory = memory.is_cause_of(status);
        let ended = Ended { code: status.code(), was_interrupted, is_out_of_memory };
        Ok((ended, documents.report()))
    }

    /// Creates the command of a trainer.
    fn command(&self, what: TrainerCommand, documents: &Documents) -> Command {
        let Documents { config_path, report_path } = documents;
        let mut command = Command::new(&self.program);
        command
            .args(TrainerArgs::new(what, config_path, report_path, &self.work_dir).to_args())
            .env(GOMP_SPINCOUNT.0, GOMP_SPINCOUNT.1)
            .stdin(self.locks.as_ref().map_or_else(Stdio::null, Locks::for_trainer));
        command
    }
}

/// The two files that a trainer reads and writes.
struct Documents {
    config_path: PathBuf,
    report_path: PathBuf,
}

impl Documents {
    /// Writes what to do, and removes an earlier answer.
    fn prepare<D: Document>(
        directory: &Path,
        subcommand: &str,
        config: &D,
    ) -> Result<Self, Failure> {
        let config_path = directory.join(format!("{subcommand}-config.json"));
        let report_path = directory.join(format!("{subcommand}-report.json"));
        std::fs::write(&config_path, finetune_contract::render(config))
            .map_err(|error| cannot_write(&config_path, &error))?;
        if let Err(error) = std::fs::remove_file(&report_path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(cannot_write(&report_path, &error));
        }
        Ok(Self { config_path, report_path })
    }

    /// Returns the answer's text, if there is one.
    fn report(&self) -> Option<String> {
        std::fs::read_to_string(&self.report_path).ok()
    }
}

/// Shows the progress lines of a child until it closes its standard output.
fn follow(stdout: impl std::io::Read) {
    let mut display = ProgressDisplay::new();
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        match finetune_contract::parse::<Progress>(&line) {
            Ok(progress) => display.show(&progress),
            Err(_) => display.line(&line),
        }
    }
    display.finish();
}

/// Waits for the child; returns how it ended, and whether this command was told to stop meanwhile.
///
/// The first signal is passed on, so that it also reaches the child when only this process was
/// told; a terminal tells both, and to the child twice is once. A second signal kills.
fn wait(child: &mut Child, signals: &mut Signals) -> Result<(ExitStatus, bool), Failure> {
    let mut was_interrupted = false;
    loop {
        if let Some(status) = child.try_wait().map_err(Failure::internal)? {
            // A signal that came with the child's end still counts.
            return Ok((status, was_interrupted || signals.pending().next().is_some()));
        }
        for signal in signals.pending() {
            if was_interrupted {
                child.kill().map_err(Failure::internal)?;
                continue;
            }
            was_interrupted = true;
            let signal = if signal == SIGTERM { Signal::TERM } else { Signal::INT };
            // Not reaped yet, so the number still means this child; it may have ended by itself.
            let _ = kill_process(Pid::from_child(child), signal);
        }
        std::thread::sleep(POLL);
    }
}

fn cannot_start(program: &Path, error: &std::io::Error) -> Failure {
    Failure::configuration(format!("cannot start the trainer {}: {error}", program.display()))
}

pub(super) fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(
        ExitCode::BadConfiguration,
        format!(
            "cannot write {}: {error}: choose another directory with --work-dir",
            path.display()
        ),
    )
}
