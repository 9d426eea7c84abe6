//! Several ranks in one pod or on one machine: started together, ended together.
//!
//! The process that is asked for all of them trains nothing itself. It starts itself once for each,
//! passes signals on, and reports what the rank says that ended for a reason of its own.

use std::{
    net::{SocketAddr, TcpListener},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use finetune_contract::{
    Device, ExitCode, FailureReason, RunConfig, TrainerArgs, TrainerCommand,
    process::environment::{
        JOB_COMPLETION_INDEX, LOCAL_RANK, LOG, MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS, RANK,
        WORLD_SIZE,
    },
};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{
    failure::Failure,
    runtime::{clock, memory},
    store::Environment,
};

/// How often children and signals are looked at.
const POLL: Duration = Duration::from_millis(50);
/// How long the others may take to end by themselves after one has failed.
const GRACE: Duration = Duration::from_secs(15);
/// Which GPUs a process sees.
const GPUS: &str = "CUDA_VISIBLE_DEVICES";

/// Where a rank keeps fetched models, below its work directory.
pub const MODELS: &str = "models";

/// What the ranks are started with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The run, whose ranks here are started.
    pub config: &'a RunConfig,
    /// The file it was read from.
    pub config_path: &'a Path,
    /// Where the report goes.
    pub report_path: &'a Path,
    /// Scratch space of the first rank; the others' lies in it.
    pub work_dir: &'a Path,
    /// Where the run's first rank serves its progress, if anywhere.
    pub listen: Option<SocketAddr>,
}

/// Makes a rank that was started here end with the process that started it.
pub fn end_with_launcher(environment: &Environment) {
    if environment.plain(LOCAL_RANK).is_some() {
        // Fails where the kernel has no such thing; then the lifeline ends the rank, in seconds.
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    }
}

/// Tells whether this process is asked for all ranks of its place, and not for one.
pub fn is_asked_for_all(config: &RunConfig, environment: &Environment) -> bool {
    config.parallelism.local_world_size > 1 && environment.plain(RANK).is_none()
}

/// Trains with all ranks of this place; returns how that ended, which is written as a report too.
///
/// That is the first rank's end, unless another failed by itself: its own word is worth more than
/// what the others say of it.
///
/// # Errors
/// A [`Failure`] if a rank cannot be started, or was killed and so left no report.
pub fn run(launch: &Launch<'_>, environment: &Environment) -> Result<ExitCode, Failure> {
    // Listening replaces the default action, so that the ranks can save a checkpoint first.
    let mut signals = Signals::new([SIGINT, SIGTERM])
        .map_err(|error| Failure::from_io(&error, "cannot listen for signals"))?;
    let oom_kills_before = memory::oom_kills();
    let mut ranks = Started(Vec::new());
    let port = free_port()?;
    for local in 0..launch.config.parallelism.local_world_size {
        ranks.0.push(start(launch, environment, local, port)?);
    }
    let telling = wait(&mut ranks.0, &mut signals)?;
    let Rank { number, report, status, .. } = &ranks.0[telling];
    if let Some(signal) = status.and_then(|status| status.signal()) {
        // On a GPU it was host memory, which smaller micro-batches need no less of.
        let is_of_tensors = launch.config.device == Device::Cpu;
        let is_kernels = memory::oom_kills() > oom_kills_before;
        if signal == Signal::KILL.as_raw() && is_of_tensors && is_kernels {
            let message = format!("the kernel ended rank {number} for want of memory");
            return Err(Failure::new(FailureReason::OutOfMemory, message));
        }
        let message = format!(
            "rank {number} was killed (signal {signal}), perhaps for want of memory; the other ranks ended with it. \
             Started again, the run goes on from the last checkpoint"
        );
        return Err(Failure::new(FailureReason::PeerLost, message));
    }
    if let Ok(text) = std::fs::read(report) {
        std::fs::write(launch.report_path, text).map_err(|error| {
            Failure::from_io(&error, &format!("cannot write {:?}", launch.report_path))
        })?;
    }
    let code = status.and_then(|status| status.code()).and_then(ExitCode::from_code);
    Ok(code.unwrap_or(ExitCode::Internal))
}

/// One rank's process.
#[derive(Debug)]
struct Rank {
    number: u32,
    child: Child,
    report: PathBuf,
    status: Option<ExitStatus>,
}

/// Ranks that do not outlive the one who waits for them.
#[derive(Debug)]
struct Started(Vec<Rank>);

impl Drop for Started {
    fn drop(&mut self) {
        kill_all(&mut self.0);
    }
}

fn start(
    launch: &Launch<'_>,
    environment: &Environment,
    local: u32,
    port: u16,
) -> Result<Rank, Failure> {
    let Launch { config, config_path, work_dir, .. } = launch;
    let parallelism = config.parallelism;
    let place = environment.plain(JOB_COMPLETION_INDEX).map_or(Ok(0), str::parse::<u32>);
    let place = place.map_err(|_| {
        let message = format!("the variable {JOB_COMPLETION_INDEX} must be a whole number from 0");
        Failure::new(FailureReason::InvalidConfiguration, message)
    })?;
    let number = place * parallelism.local_world_size + local;
    // The first works where one rank alone would: what it fetched before is still there.
    let models = work_dir.join(MODELS);
    let work_dir = match local {
        0 => work_dir.to_path_buf(),
        _ => work_dir.join(format!("rank-{number}")),
    };
    let report = work_dir.join(format!("report-{number}.json"));
    std::fs::create_dir_all(&work_dir)
        .and_then(|()| if report.exists() { std::fs::remove_file(&report) } else { Ok(()) })
        .map_err(|error| Failure::from_io(&error, &format!("cannot prepare {work_dir:?}")))?;
    let program = std::env::current_exe()
        .map_err(|error| Failure::from_io(&error, "cannot find this program"))?;
    let args = TrainerArgs {
        listen: launch.listen.filter(|_| number == 0),
        models: (local > 0).then_some(models),
        ..TrainerArgs::new(TrainerCommand::Train, *config_path, &report, &work_dir)
    };
    let mut command = Command::new(&program);
    command
        .args(args.to_args())
        .env(RANK, number.to_string())
        .env(LOCAL_RANK, local.to_string())
        .env(WORLD_SIZE, parallelism.world_size.to_string())
        .stdin(Stdio::null());
    if parallelism.places() == 1 {
        command.env(MASTER_ADDR, "127.0.0.1").env(MASTER_PORT, port.to_string());
    }
    if config.device == Device::Cuda {
        command.env(GPUS, visible_gpu(environment.plain(GPUS), local));
    }
    if environment.plain(OMP_NUM_THREADS).is_none() {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = cores / parallelism.local_world_size as usize;
        command.env(OMP_NUM_THREADS, threads.max(1).to_string());
    }
    if number > 0 {
        // All say the same of what goes well; the first says it.
        command.stdout(Stdio::null());
        if environment.plain(LOG).is_none() {
            command.env(LOG, "error");
        }
    }
    let child = command
        .spawn()
        .map_err(|error| Failure::from_io(&error, &format!("cannot start {program:?}")))?;
    Ok(Rank { number, child, report, status: None })
}

/// Returns the one GPU a rank sees, of those that are visible here; none if they are too few.
fn visible_gpu(visible: Option<&str>, local: u32) -> String {
    let Some(list) = visible else { return local.to_string() };
    list.split(',').nth(local as usize).unwrap_or_default().trim().to_owned()
}

/// Waits for all, once one has failed not for long; returns the place of the one to tell of.
///
/// Signals are passed on to all; who kills this process kills them.
fn wait(ranks: &mut [Rank], signals: &mut Signals) -> Result<usize, Failure> {
    let mut first_failed: Option<usize> = None;
    let mut has_killed = false;
    let mut until = None;
    loop {
        for index in 0..ranks.len() {
            let rank = &mut ranks[index];
            if rank.status.is_some() {
                continue;
            }
            rank.status = rank
                .child
                .try_wait()
                .map_err(|error| Failure::from_io(&error, "cannot wait for a rank"))?;
            let Some(status) = rank.status.filter(|status| !is_well(*status)) else { continue };
            until.get_or_insert_with(|| clock::now() + GRACE);
            // Who lost a peer did not fail by itself; who did may be noticed a moment later.
            let known = first_failed.and_then(|first: usize| ranks[first].status);
            let is_cause = known.is_none() || !is_peer_lost(status);
            if !has_killed && known.is_none_or(is_peer_lost) && is_cause {
                first_failed = Some(index);
            }
        }
        if ranks.iter().all(|rank| rank.status.is_some()) {
            return Ok(first_failed.unwrap_or(0));
        }
        if until.is_some_and(|until| clock::now() > until) {
            has_killed = true;
            kill_all(ranks);
        }
        for signal in signals.pending() {
            let signal = if signal == SIGTERM { Signal::TERM } else { Signal::INT };
            for rank in ranks.iter().filter(|rank| rank.status.is_none()) {
                // Not reaped yet, so the number still means this child.
                let _ = kill_process(Pid::from_child(&rank.child), signal);
            }
        }
        std::thread::sleep(POLL);
    }
}

fn is_well(status: ExitStatus) -> bool {
    let interrupted = i32::from(ExitCode::Interrupted.code());
    status.success() || status.code() == Some(interrupted)
}

fn is_peer_lost(status: ExitStatus) -> bool {
    status.code() == Some(i32::from(ExitCode::PeerLost.code()))
}

fn kill_all(ranks: &mut [Rank]) {
    for rank in ranks.iter_mut().filter(|rank| rank.status.is_none()) {
        let _ = rank.child.kill();
    }
}

/// Finds a port for rank 0 to listen on: free now, and in a moment with all likelihood still.
fn free_port() -> Result<u16, Failure> {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|error| Failure::from_io(&error, "no port is free for the ranks to meet at"))
}

#[cfg(test)]
mod tests {
    use super::visible_gpu;

    #[test]
    fn each_rank_sees_one_of_the_visible_gpus() {
        assert_eq!(visible_gpu(None, 3), "3");
        assert_eq!(visible_gpu(Some("4, 5"), 1), "5");
        assert_eq!(visible_gpu(Some("GPU-8f3"), 0), "GPU-8f3");
        assert_eq!(visible_gpu(Some("GPU-8f3"), 1), "");
    }
}
