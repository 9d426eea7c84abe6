//! Several trainers on this machine that train one model: started together, ended together.

use std::{
    net::TcpListener,
    os::unix::process::ExitStatusExt,
    process::{Child, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use finetune_contract::{
    ExitCode, RunConfig,
    parallelism::environment::{MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE},
};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

use super::{
    failure::Failure,
    trainer::{Documents, Ended, OomWatch, POLL, Trainer, cannot_start, cannot_write, follow},
};

/// How long the others may take to end by themselves after one has failed.
const GRACE: Duration = Duration::from_secs(15);
/// What limits the threads of libtorch.
const THREADS: &str = "OMP_NUM_THREADS";
/// What a trainer logs.
const LOG: &str = "FINETUNE_LOG";

/// One trainer.
struct Rank {
    child: Child,
    documents: Documents,
    status: Option<ExitStatus>,
}

/// Trains over the ranks of `config`; returns how the run ended and the report that says so.
///
/// That is rank 0's, unless another failed by itself: its own word is worth more than what the
/// others say of it.
pub(super) fn train(
    trainer: &Trainer,
    config: &RunConfig,
) -> Result<(Ended, Option<String>), Failure> {
    // Listening replaces the default action, so that the children can save a checkpoint first.
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(Failure::internal)?;
    let memory = OomWatch::start();
    let mut ranks = Vec::new();
    let port = free_port()?;
    for rank in 0..config.parallelism.world_size {
        match start(trainer, config, rank, port) {
            Ok(started) => ranks.push(started),
            Err(failure) => {
                kill_all(&mut ranks);
                return Err(failure);
            }
        }
    }
    let reader = ranks.first_mut().and_then(|rank| rank.child.stdout.take());
    let reader = reader.map(|stdout| std::thread::spawn(move || follow(stdout)));
    let waited = wait(&mut ranks, &mut signals);
    if waited.is_err() {
        kill_all(&mut ranks);
    }
    if let Some(reader) = reader {
        let _ = reader.join();
    }
    let Waited { first_failed, was_interrupted } = waited?;
    let telling = first_failed.unwrap_or(0);
    let Rank { documents, status, .. } = &ranks[telling];
    let report = documents.report();
    let is_out_of_memory = status.is_some_and(|status| memory.is_cause_of(status));
    if is_out_of_memory {
        return Ok((Ended { code: None, was_interrupted, is_out_of_memory }, None));
    }
    if let (None, Some(signal)) = (&report, status.and_then(|status| status.signal())) {
        let message = format!(
            "rank {telling} was killed (signal {signal}), perhaps for want of memory; the other ranks ended with it. \
             Run the same command again to go on from the last checkpoint"
        );
        return Err(Failure::new(ExitCode::PeerLost, message));
    }
    let code = status.and_then(|status| status.code());
    Ok((Ended { code, was_interrupted, is_out_of_memory }, report))
}

fn start(trainer: &Trainer, config: &RunConfig, rank: u32, port: u16) -> Result<Rank, Failure> {
    let world_size = config.parallelism.world_size;
    // Rank 0 works where one rank alone would: what it fetched before is still there.
    let work_dir = if rank == 0 {
        trainer.work_dir.clone()
    } else {
        trainer.work_dir.join(format!("rank-{rank}"))
    };
    std::fs::create_dir_all(&work_dir).map_err(|error| cannot_write(&work_dir, &error))?;
    let documents = Documents::prepare(&work_dir, "train", config)?;
    let mut command = trainer.command("train", &documents, &work_dir);
    command
        .env(RANK, rank.to_string())
        .env(WORLD_SIZE, world_size.to_string())
        .env(MASTER_ADDR, "127.0.0.1")
        .env(MASTER_PORT, port.to_string())
        .stdout(if rank == 0 { Stdio::piped() } else { Stdio::null() });
    if std::env::var_os(THREADS).is_none() {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        command.env(THREADS, (cores / world_size as usize).max(1).to_string());
    }
    // All say the same of what goes well; rank 0 says it.
    if rank > 0 && std::env::var_os(LOG).is_none() {
        command.env(LOG, "error");
    }
    let child = command.spawn().map_err(|error| cannot_start(&trainer.program, &error))?;
    Ok(Rank { child, documents, status: None })
}

struct Waited {
    /// The rank that failed first, by itself if any did.
    first_failed: Option<usize>,
    was_interrupted: bool,
}

/// Waits for all; once one has failed, not for long.
///
/// Signals are passed on to all, as one trainer's are; a second one kills.
fn wait(ranks: &mut [Rank], signals: &mut Signals) -> Result<Waited, Failure> {
    let mut waited = Waited { first_failed: None, was_interrupted: false };
    let mut until: Option<Instant> = None;
    loop {
        for index in 0..ranks.len() {
            let rank = &mut ranks[index];
            if rank.status.is_some() {
                continue;
            }
            rank.status = rank.child.try_wait().map_err(Failure::internal)?;
            let Some(status) = rank.status.filter(|status| !is_well(*status)) else { continue };
            until.get_or_insert_with(|| Instant::now() + GRACE);
            // Who lost a peer did not fail by itself; who did may be noticed a moment later.
            let known = waited.first_failed.and_then(|first| ranks[first].status);
            if known.is_none_or(is_peer_lost) && (known.is_none() || !is_peer_lost(status)) {
                waited.first_failed = Some(index);
            }
        }
        if ranks.iter().all(|rank| rank.status.is_some()) {
            waited.was_interrupted |= signals.pending().next().is_some();
            return Ok(waited);
        }
        if until.is_some_and(|until| Instant::now() > until) {
            kill_all(ranks);
        }
        for signal in signals.pending() {
            if waited.was_interrupted {
                kill_all(ranks);
                continue;
            }
            waited.was_interrupted = true;
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
        .map_err(|error| {
            Failure::internal(format!("no port is free for the ranks to meet at: {error}"))
        })
}
