//! The failure detector: one socket from every rank to rank 0, beside the collectives.
//!
//! A process that dies closes its sockets, so its end is known at once and by rank; one that hangs
//! stops sending heartbeats. Rank 0 informs the others. Each then exits by itself, or is ended if
//! its main thread waits in a collective that will never complete.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{distributed::rank::Timeouts, runtime::clock};

/// How often each side sends a heartbeat.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often rank 0 polls for the next connection.
const POLL: Duration = Duration::from_millis(20);
/// The longest message that is passed on.
const TEXT_BYTES: usize = 2000;

/// Called when another rank is lost and this one does not exit by itself.
pub type OnLost = Box<dyn FnOnce(&str) + Send>;

/// The connections of this rank: on rank 0 to every rank, on others to rank 0.
#[derive(Debug)]
pub(super) struct Heartbeat {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    rank: u32,
    /// The number of collectives this rank has started.
    started: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Why the run was aborted, as the first rank to know reported it.
    abort_reason: Option<String>,
    /// Whether this rank has finished or failed, so that the loss of others no longer matters.
    is_done: bool,
    peers: BTreeMap<u32, Peer>,
}

#[derive(Debug)]
struct Peer {
    stream: TcpStream,
    /// The number of collectives it had started at its last heartbeat.
    started: u64,
}

impl Heartbeat {
    /// Accepts, on rank 0, the connections of all other ranks.
    ///
    /// # Errors
    /// An error of the system, or a timeout if some ranks did not connect.
    pub(super) fn accept(
        listener: &TcpListener,
        world_size: u32,
        timeouts: Timeouts,
    ) -> std::io::Result<Self> {
        let until = clock::now() + timeouts.rendezvous;
        listener.set_nonblocking(true)?;
        let mut peers = BTreeMap::new();
        while peers.len() + 1 < world_size as usize {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    if let Some((rank, stream)) = handshake(stream, world_size) {
                        peers.insert(rank, stream);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if clock::now() > until {
                        return Err(std::io::ErrorKind::TimedOut.into());
                    }
                    thread::sleep(POLL);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Self::start(0, peers, timeouts))
    }

    /// Connects to rank 0.
    ///
    /// # Errors
    /// An error of the system.
    pub(super) fn connect(
        rank: u32,
        address: &str,
        port: u16,
        timeouts: Timeouts,
    ) -> std::io::Result<Self> {
        let mut stream = TcpStream::connect((address, port))?;
        writeln!(stream, "rank {rank}")?;
        Ok(Self::start(rank, BTreeMap::from([(0, stream)]), timeouts))
    }

    fn start(rank: u32, streams: BTreeMap<u32, TcpStream>, timeouts: Timeouts) -> Self {
        let shared = Arc::new(Shared {
            rank,
            started: AtomicU64::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        for (rank, stream) in streams {
            let _ = stream.set_nodelay(true);
            let _ = stream.set_read_timeout(Some(timeouts.heartbeat));
            if let Ok(reader) = stream.try_clone() {
                shared.lock().peers.insert(rank, Peer { stream, started: 0 });
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.listen(rank, reader, timeouts.heartbeat));
            }
        }
        let sender = Arc::clone(&shared);
        thread::spawn(move || sender.send_heartbeats());
        Self { shared }
    }

    /// Calls `on_lost` if another rank is lost and this one is not done within the grace period.
    pub(super) fn watch(&self, grace: Duration, on_lost: OnLost) {
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            let Some(reason) = shared.wait(None, |state| state.abort_reason.clone()) else {
                return;
            };
            let is_done = shared.wait(Some(grace), |state| state.is_done.then_some(()));
            if is_done.is_none() {
                on_lost(&reason);
            }
        });
    }

    /// Counts a collective that this rank starts.
    pub(super) fn count_collective(&self) -> u64 {
        self.shared.started.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Waits for the reason of an abort; `None` if there is none within the timeout.
    pub(super) fn abort_reason(&self, timeout: Duration) -> Option<String> {
        self.shared.wait(Some(timeout), |state| state.abort_reason.clone())
    }

    /// Lists the connected ranks that have started fewer collectives than this one.
    pub(super) fn stragglers(&self) -> Vec<u32> {
        let started = self.shared.started.load(Ordering::Relaxed);
        let state = self.shared.lock();
        state
            .peers
            .iter()
            .filter(|(_, peer)| peer.started < started)
            .map(|(rank, _)| *rank)
            .collect()
    }

    /// Aborts the run on all ranks.
    pub(super) fn abort(&self, reason: &str) {
        self.shared.abort(reason.to_owned());
    }

    /// Tells the peers that this rank has finished.
    pub(super) fn done(&self) {
        self.leave("done");
    }

    /// Tells the peers why this rank failed, so that they abort.
    pub(super) fn fail(&self, message: &str) {
        let Shared { rank, .. } = *self.shared;
        let text = one_line(&format!("rank {rank} failed: {message}"));
        self.leave(&format!("lost {text}"));
    }

    fn leave(&self, message: &str) {
        let mut state = self.shared.lock();
        state.is_done = true;
        state.broadcast(message);
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `find` returns a value; `None` after the timeout.
    fn wait<R>(&self, timeout: Option<Duration>, find: impl Fn(&State) -> Option<R>) -> Option<R> {
        let until: Option<Instant> = timeout.map(|timeout| clock::now() + timeout);
        let mut state = self.lock();
        loop {
            if let Some(found) = find(&state) {
                return Some(found);
            }
            let remaining = match until {
                None => Duration::MAX,
                Some(until) => until.saturating_duration_since(clock::now()),
            };
            if remaining.is_zero() || (timeout.is_none() && state.is_done) {
                return None;
            }
            let woken = self.changed.wait_timeout(state, remaining.min(Duration::from_hours(1)));
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn send_heartbeats(&self) {
        loop {
            {
                let mut state = self.lock();
                if state.is_done && self.rank != 0 {
                    return;
                }
                state.broadcast(&format!("beat {}", self.started.load(Ordering::Relaxed)));
            }
            thread::sleep(INTERVAL);
        }
    }

    /// Reads the messages of a peer until it finishes or is lost.
    fn listen(&self, rank: u32, stream: TcpStream, timeout: Duration) {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        let reason = loop {
            line.clear();
            match reader.read_line(&mut line) {
                Ok(0) => break format!("rank {rank} is gone: its process ended without a message"),
                Ok(_) => {}
                Err(error) if is_timeout(&error) => {
                    break format!(
                        "rank {rank} sent no heartbeat for {} s: its machine or network is down, or its process was suspended",
                        timeout.as_secs()
                    );
                }
                Err(_) => break format!("rank {rank} is gone: its connection was reset"),
            }
            match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
                ("beat", started) => {
                    if let Some(peer) = self.lock().peers.get_mut(&rank) {
                        peer.started = started.parse().unwrap_or(peer.started);
                    }
                }
                ("done", _) => {
                    self.lock().peers.remove(&rank);
                    return;
                }
                ("lost", text) => break text.to_owned(),
                // A message of another release; versions are compared elsewhere.
                _ => {}
            }
        };
        self.lock().peers.remove(&rank);
        self.abort(reason);
    }

    /// Records the first reason for an abort and passes it on to the peers.
    fn abort(&self, reason: String) {
        let mut state = self.lock();
        if state.is_done || state.abort_reason.is_some() {
            return;
        }
        state.broadcast(&format!("lost {}", one_line(&reason)));
        state.abort_reason = Some(reason);
        drop(state);
        self.changed.notify_all();
    }
}

impl State {
    /// Sends a line to all peers; the reading thread notices a broken connection.
    fn broadcast(&mut self, line: &str) {
        for peer in self.peers.values_mut() {
            let _ = writeln!(peer.stream, "{line}");
        }
    }
}

/// Reads the rank of a new connection; `None` if it is not a rank of this run.
fn handshake(stream: TcpStream, world_size: u32) -> Option<(u32, TcpStream)> {
    stream.set_read_timeout(Some(INTERVAL)).ok()?;
    let mut line = String::new();
    // Byte by byte, because later messages belong to the reading thread.
    let mut reader = BufReader::with_capacity(1, stream.try_clone().ok()?);
    reader.read_line(&mut line).ok()?;
    let rank: u32 = line.trim_end().strip_prefix("rank ")?.parse().ok()?;
    (1..world_size).contains(&rank).then_some((rank, stream))
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

fn one_line(text: &str) -> String {
    let mut text = text.replace(['\n', '\r'], " ");
    text.truncate(text.floor_char_boundary(TEXT_BYTES));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUTS: Timeouts = Timeouts {
        rendezvous: Duration::from_secs(5),
        collective: Duration::from_secs(5),
        heartbeat: Duration::from_secs(3),
        grace: Duration::from_millis(10),
    };

    /// Connects rank 0 with so many other ranks.
    fn join(others: u32) -> (Heartbeat, Vec<Heartbeat>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let connecting = thread::spawn(move || {
            (1..=others)
                .map(|rank| Heartbeat::connect(rank, "127.0.0.1", port, TIMEOUTS).unwrap())
                .collect::<Vec<_>>()
        });
        (Heartbeat::accept(&listener, others + 1, TIMEOUTS).unwrap(), connecting.join().unwrap())
    }

    fn abort_reason(heartbeat: &Heartbeat) -> Option<String> {
        heartbeat.abort_reason(Duration::from_secs(6))
    }

    fn disconnect(heartbeat: &Heartbeat) {
        let state = heartbeat.shared.lock();
        for peer in state.peers.values() {
            let _ = peer.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    #[test]
    fn all_ranks_learn_which_rank_is_gone() {
        let (first, others) = join(2);
        disconnect(&others[1]);
        let gone = "rank 2 is gone: its process ended without a message";
        assert_eq!(abort_reason(&first).as_deref(), Some(gone));
        assert_eq!(abort_reason(&others[0]).as_deref(), Some(gone));
    }

    #[test]
    fn all_ranks_learn_why_one_failed() {
        let (first, others) = join(2);
        others[0].fail("the disk\nis full");
        let failed = "rank 1 failed: the disk is full";
        assert_eq!(abort_reason(&first).as_deref(), Some(failed));
        assert_eq!(abort_reason(&others[1]).as_deref(), Some(failed));
    }

    #[test]
    fn a_rank_that_is_done_may_disconnect() {
        let (first, others) = join(2);
        others[0].done();
        disconnect(&others[0]);
        assert_eq!(first.abort_reason(Duration::from_millis(300)), None);
        first.done();
        disconnect(&first);
        assert_eq!(others[1].abort_reason(Duration::from_millis(300)), None);
    }

    #[test]
    fn missing_heartbeats_are_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        writeln!(silent, "rank 1").unwrap();
        let first = Heartbeat::accept(&listener, 2, TIMEOUTS).unwrap();
        insta::assert_snapshot!(abort_reason(&first).unwrap(), @"rank 1 sent no heartbeat for 3 s: its machine or network is down, or its process was suspended");
    }

    #[test]
    fn a_rank_that_does_not_exit_is_ended() {
        let (first, others) = join(2);
        let (sender, receiver) = std::sync::mpsc::channel();
        first
            .watch(TIMEOUTS.grace, Box::new(move |reason| sender.send(reason.to_owned()).unwrap()));
        disconnect(&others[0]);
        assert!(
            receiver.recv_timeout(Duration::from_secs(6)).unwrap().starts_with("rank 1 is gone")
        );
    }
}
