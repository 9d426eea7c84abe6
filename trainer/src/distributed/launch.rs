//! Launches several ranks in one pod or on one machine, as torchrun does.
//!
//! The launcher trains nothing itself. It starts this program once per rank, forwards signals, and
//! publishes the report of the rank that failed first, or else of the first rank.

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

/// How often child processes and signals are polled.
const POLL: Duration = Duration::from_millis(50);
/// How long the other ranks may take to exit by themselves after one has failed.
const GRACE: Duration = Duration::from_secs(15);
/// The variable that limits the GPUs a process sees.
const GPUS: &str = "CUDA_VISIBLE_DEVICES";

/// The directory of fetched models, below the work directory of a rank.
pub const MODEL_CACHE: &str = "models";

/// The arguments of a launch.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The run whose local ranks are started.
    pub config: &'a RunConfig,
    /// The file it was read from.
    pub config_path: &'a Path,
    /// Where the report is written.
    pub report_path: &'a Path,
    /// The work directory of the first local rank; those of the others are below it.
    pub work_dir: &'a Path,
    /// Where the first rank of the run serves its progress, if anywhere.
    pub listen: Option<SocketAddr>,
}

/// Makes a rank that a launcher started end with the launcher.
pub fn end_with_launcher(environment: &Environment) {
    if environment.plain(LOCAL_RANK).is_some() {
        // Fails if the kernel does not support it; then the heartbeat ends the rank within seconds.
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    }
}

/// Reports whether this process must launch all local ranks instead of being one of them.
pub fn is_launcher(config: &RunConfig, environment: &Environment) -> bool {
    config.parallelism.local_world_size > 1 && environment.plain(RANK).is_none()
}

/// Runs all local ranks; returns the exit code of the one whose report is published.
///
/// That is the first local rank, unless another failed first: its own report says more than what
/// the others know of it.
///
/// # Errors
/// A [`Failure`] if a rank cannot be started, or was killed and left no report.
pub fn run(launch: &Launch<'_>, environment: &Environment) -> Result<ExitCode, Failure> {
    // Handling signals replaces the default action, so that the ranks can save a checkpoint first.
    let mut signals = Signals::new([SIGINT, SIGTERM])
        .map_err(|error| Failure::from_io(&error, "cannot listen for signals"))?;
    let oom_kills_before = memory::oom_kills();
    let mut ranks = LocalRanks(Vec::new());
    let port = free_port()?;
    for local in 0..launch.config.parallelism.local_world_size {
        ranks.0.push(start(launch, environment, local, port)?);
    }
    let reported = wait(&mut ranks.0, &mut signals)?;
    let Rank { number, report, status, .. } = &ranks.0[reported];
    if let Some(signal) = status.and_then(|status| status.signal()) {
        // On a GPU, host memory ran out, which smaller micro-batches would not help.
        let tensors_use_host_memory = launch.config.device == Device::Cpu;
        let was_oom_killed = memory::oom_kills() > oom_kills_before;
        if signal == Signal::KILL.as_raw() && tensors_use_host_memory && was_oom_killed {
            let message = format!("rank {number} was OOM-killed by the kernel");
            return Err(Failure::new(FailureReason::OutOfMemory, message));
        }
        let message = format!(
            "rank {number} was killed (signal {signal}), perhaps because it ran out of memory; the other ranks ended \
             with it. Start the run again to resume it from its last checkpoint"
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

/// The process of one rank.
#[derive(Debug)]
struct Rank {
    number: u32,
    child: Child,
    report: PathBuf,
    status: Option<ExitStatus>,
}

/// The processes of local ranks, killed on drop.
#[derive(Debug)]
struct LocalRanks(Vec<Rank>);

impl Drop for LocalRanks {
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
    let pod = environment.plain(JOB_COMPLETION_INDEX).map_or(Ok(0), str::parse::<u32>);
    let pod = pod.map_err(|_| {
        let message = format!("the variable {JOB_COMPLETION_INDEX} must be an integer from 0");
        Failure::new(FailureReason::InvalidConfiguration, message)
    })?;
    let number = pod * parallelism.local_world_size + local;
    // The first one uses the directory of a single rank, so that files fetched before are still
    // there.
    let model_cache = work_dir.join(MODEL_CACHE);
    let work_dir = match local {
        0 => work_dir.to_path_buf(),
        _ => work_dir.join(format!("rank-{number}")),
    };
    let report = work_dir.join(format!("report-{number}.json"));
    std::fs::create_dir_all(&work_dir)
        .and_then(|()| if report.exists() { std::fs::remove_file(&report) } else { Ok(()) })
        .map_err(|error| Failure::from_io(&error, &format!("cannot prepare {work_dir:?}")))?;
    let program = std::env::current_exe()
        .map_err(|error| Failure::from_io(&error, "cannot find the path of this program"))?;
    let args = TrainerArgs {
        listen: launch.listen.filter(|_| number == 0),
        models: (local > 0).then_some(model_cache),
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
        // All ranks would report the same progress; rank 0 does.
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

/// Returns the GPU of a local rank among the visible ones; empty if there are too few.
fn visible_gpu(visible: Option<&str>, local: u32) -> String {
    let Some(list) = visible else { return local.to_string() };
    list.split(',').nth(local as usize).unwrap_or_default().trim().to_owned()
}

/// Waits for all ranks, and after a failure only for the grace period; returns the index of the
/// rank to report.
///
/// Signals are forwarded to all ranks, which are killed if this process is.
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
            let Some(status) = rank.status.filter(|status| !is_success(*status)) else { continue };
            until.get_or_insert_with(|| clock::now() + GRACE);
            // A rank that lost a peer is not the cause; the cause may be noticed a moment later.
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
                // Not reaped yet, so the process id still belongs to this child.
                let _ = kill_process(Pid::from_child(&rank.child), signal);
            }
        }
        std::thread::sleep(POLL);
    }
}

fn is_success(status: ExitStatus) -> bool {
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

/// Finds a port for rank 0 that is free now, and very likely still is when it listens.
fn free_port() -> Result<u16, Failure> {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|error| {
            Failure::from_io(&error, "no port is free for the rendezvous of the ranks")
        })
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
