//! Programs that run on after this one: started once, found again, ended.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::cluster::network::Namespace;

/// How long a program may take until it is ready.
const READY_TIMEOUT: Duration = Duration::from_mins(1);
/// How long the kernel may take to end it.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often to look.
const INTERVAL: Duration = Duration::from_millis(100);
/// How many lines of a log are shown on failure.
const LOG_LINES: usize = 20;

/// A process, told from a later one of the same number by the time of its start.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// In the kernel's ticks since its own start.
    start_ticks: u64,
}

impl Process {
    /// Returns the process that has a number now, unless it has ended.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses, which may hold anything.
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?;
        // The 22nd field; the fourth comes next.
        let start_ticks = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(Self { pid, start_ticks })
    }

    /// Returns whether it has not ended.
    pub(crate) fn is_running(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    fn kill(self) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|_| self.is_running()) {
            // It may end before the signal comes.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// The recorded processes of a cluster.
pub(crate) struct Processes<'a> {
    pub(crate) state_dir: &'a Path,
    pub(crate) namespace: &'a Namespace,
}

impl Processes<'_> {
    /// Starts a program inside the namespace, unless it runs.
    pub(crate) fn start(&self, name: &str, program: &Path, arguments: &[String]) -> Result<()> {
        if self.find(name).is_some_and(Process::is_running) {
            return Ok(());
        }
        let log = File::create(self.log(name))?;
        // Each replaces itself by the next, so that all have one number; a session of its own
        // keeps the program from this terminal's signals.
        let inside = self.namespace.command(program);
        let mut command = Command::new("setsid");
        command
            .arg(inside.get_program())
            .args(inside.get_args())
            .args(arguments)
            .current_dir(self.state_dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let process =
            Process::of(child.id()).with_context(|| self.complaint(name, "ended at once"))?;
        let record = format!("{} {}\n", process.pid, process.start_ticks);
        Ok(std::fs::write(self.record(name), record)?)
    }

    /// Waits until a started program is ready.
    pub(crate) fn wait(&self, name: &str, is_ready: impl Fn() -> bool) -> Result<()> {
        let started = Instant::now();
        while !is_ready() {
            if !self.find(name).is_some_and(Process::is_running) {
                bail!(self.complaint(name, "ended"));
            }
            if started.elapsed() > READY_TIMEOUT {
                bail!(self.complaint(name, &format!("is not ready after {READY_TIMEOUT:?}")));
            }
            std::thread::sleep(INTERVAL);
        }
        Ok(())
    }

    /// Returns the process that was started under a name, whether it still runs or not.
    pub(crate) fn find(&self, name: &str) -> Option<Process> {
        let record = std::fs::read_to_string(self.record(name)).ok()?;
        let (pid, start_ticks) = record.trim().split_once(' ')?;
        Some(Process { pid: pid.parse().ok()?, start_ticks: start_ticks.parse().ok()? })
    }

    /// Returns whether all of these run.
    pub(crate) fn are_running(&self, names: &[&str]) -> bool {
        names.iter().all(|name| self.find(name).is_some_and(Process::is_running))
    }

    fn record(&self, name: &str) -> PathBuf {
        self.state_dir.join("run").join(format!("{name}.pid"))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.state_dir.join("log").join(format!("{name}.log"))
    }

    fn complaint(&self, name: &str, what: &str) -> String {
        let path = self.log(name);
        let log = std::fs::read(&path).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        format!("{name} {what}; the end of {}:\n{last}", path.display())
    }
}

/// Ends processes at once: what they would save is removed next.
pub(crate) fn kill(processes: &[Process]) {
    for process in processes {
        process.kill();
    }
    let asked = Instant::now();
    while asked.elapsed() < KILL_TIMEOUT && processes.iter().any(|process| process.is_running()) {
        std::thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::{Process, kill};

    #[test]
    fn tells_a_process_from_one_that_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.is_running());
        let earlier = Process { start_ticks: process.start_ticks - 1, ..process };
        assert!(!earlier.is_running());
        kill(&[earlier]);
        assert!(process.is_running());
        kill(&[process]);
        assert!(!process.is_running());
        child.wait().unwrap();
    }
}
