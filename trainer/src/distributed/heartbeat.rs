//! Who is still there: one socket from every rank to rank 0, beside the collectives.
//!
//! A process that dies closes its sockets, so its end is known at once, by number; one that stops
//! without dying falls silent. Rank 0 tells the others, and each ends by itself, or is ended when
//! its main thread waits in a collective that will never be complete.

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

use crate::{distributed::rank::Patience, runtime::clock};

/// How often each side gives a sign of life.
const BEAT: Duration = Duration::from_secs(1);
/// How often a waiting host looks for the next caller.
const POLL: Duration = Duration::from_millis(20);
/// The longest text that is passed on.
const TEXT_BYTES: usize = 2000;

/// What to do when another rank is lost and this one does not end by itself.
pub type OnLost = Box<dyn FnOnce(&str) + Send>;

/// This rank's end of the sockets.
#[derive(Debug)]
pub(super) struct Lifeline {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    rank: u32,
    /// Collectives this rank has begun.
    begun: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Why the run cannot go on, as the first to know said it.
    verdict: Option<String>,
    /// Whether this rank has ended, well or not: what others do no longer matters to it.
    is_done: bool,
    peers: BTreeMap<u32, Peer>,
}

#[derive(Debug)]
struct Peer {
    stream: TcpStream,
    begun: u64,
}

impl Lifeline {
    /// Waits, on rank 0, for every other rank to call.
    ///
    /// # Errors
    /// What the system said, or that some did not call in time.
    pub(super) fn host(
        listener: &TcpListener,
        world_size: u32,
        patience: Patience,
    ) -> std::io::Result<Self> {
        let until = clock::now() + patience.rendezvous;
        listener.set_nonblocking(true)?;
        let mut peers = BTreeMap::new();
        while peers.len() + 1 < world_size as usize {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    if let Some((rank, stream)) = introduced(stream, world_size) {
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
        Ok(Self::start(0, peers, patience))
    }

    /// Calls rank 0.
    ///
    /// # Errors
    /// What the system said.
    pub(super) fn call(
        rank: u32,
        address: &str,
        port: u16,
        patience: Patience,
    ) -> std::io::Result<Self> {
        let mut stream = TcpStream::connect((address, port))?;
        writeln!(stream, "rank {rank}")?;
        Ok(Self::start(rank, BTreeMap::from([(0, stream)]), patience))
    }

    fn start(rank: u32, streams: BTreeMap<u32, TcpStream>, patience: Patience) -> Self {
        let shared = Arc::new(Shared {
            rank,
            begun: AtomicU64::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        for (rank, stream) in streams {
            let _ = stream.set_nodelay(true);
            let _ = stream.set_read_timeout(Some(patience.silence));
            if let Ok(reader) = stream.try_clone() {
                shared.lock().peers.insert(rank, Peer { stream, begun: 0 });
                let shared = Arc::clone(&shared);
                thread::spawn(move || shared.listen(rank, reader, patience.silence));
            }
        }
        let beating = Arc::clone(&shared);
        thread::spawn(move || beating.beat());
        Self { shared }
    }

    /// Calls `on_lost` if another rank is lost and this one is not done within its grace.
    pub(super) fn guard(&self, grace: Duration, on_lost: OnLost) {
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            let Some(verdict) = shared.wait(None, |state| state.verdict.clone()) else { return };
            let is_done = shared.wait(Some(grace), |state| state.is_done.then_some(()));
            if is_done.is_none() {
                on_lost(&verdict);
            }
        });
    }

    /// Notes that this rank begins its next collective.
    pub(super) fn begin(&self) -> u64 {
        self.shared.begun.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Waits a while for word of who is lost.
    pub(super) fn verdict(&self, patience: Duration) -> Option<String> {
        self.shared.wait(Some(patience), |state| state.verdict.clone())
    }

    /// Names the ranks this one knows of that have begun fewer collectives than it has.
    pub(super) fn behind(&self) -> Vec<u32> {
        let begun = self.shared.begun.load(Ordering::Relaxed);
        let state = self.shared.lock();
        state.peers.iter().filter(|(_, peer)| peer.begun < begun).map(|(rank, _)| *rank).collect()
    }

    /// Declares on behalf of all that the run cannot go on.
    pub(super) fn declare(&self, why: &str) {
        self.shared.decide(why.to_owned());
    }

    /// Says goodbye: this rank has done all it had to.
    pub(super) fn done(&self) {
        self.leave("done");
    }

    /// Says why this rank ends, so that the others can.
    pub(super) fn fail(&self, message: &str) {
        let Shared { rank, .. } = *self.shared;
        let text = one_line(&format!("rank {rank} failed: {message}"));
        self.leave(&format!("lost {text}"));
    }

    fn leave(&self, word: &str) {
        let mut state = self.shared.lock();
        state.is_done = true;
        state.say(word);
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `look` finds something, or for as long as is allowed.
    fn wait<R>(&self, patience: Option<Duration>, look: impl Fn(&State) -> Option<R>) -> Option<R> {
        let until: Option<Instant> = patience.map(|patience| clock::now() + patience);
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&state) {
                return Some(found);
            }
            let left = match until {
                None => Duration::MAX,
                Some(until) => until.saturating_duration_since(clock::now()),
            };
            if left.is_zero() || (patience.is_none() && state.is_done) {
                return None;
            }
            let woken = self.changed.wait_timeout(state, left.min(Duration::from_hours(1)));
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn beat(&self) {
        loop {
            {
                let mut state = self.lock();
                if state.is_done && self.rank != 0 {
                    return;
                }
                state.say(&format!("beat {}", self.begun.load(Ordering::Relaxed)));
            }
            thread::sleep(BEAT);
        }
    }

    /// Follows what a peer says until it says goodbye or is lost.
    fn listen(&self, rank: u32, stream: TcpStream, silence: Duration) {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        let why = loop {
            line.clear();
            match reader.read_line(&mut line) {
                Ok(0) => break format!("rank {rank} is gone: its process ended without a word"),
                Ok(_) => {}
                Err(error) if is_timeout(&error) => {
                    break format!(
                        "rank {rank} gave no sign of life for {} s: its machine or network is down, or it was stopped",
                        silence.as_secs()
                    );
                }
                Err(_) => break format!("rank {rank} is gone: its connection was reset"),
            }
            match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
                ("beat", begun) => {
                    if let Some(peer) = self.lock().peers.get_mut(&rank) {
                        peer.begun = begun.parse().unwrap_or(peer.begun);
                    }
                }
                ("done", _) => {
                    self.lock().peers.remove(&rank);
                    return;
                }
                ("lost", text) => break text.to_owned(),
                // Another release's word; versions are compared elsewhere.
                _ => {}
            }
        };
        self.lock().peers.remove(&rank);
        self.decide(why);
    }

    /// Takes the first reason for the end, and, on rank 0, passes it on.
    fn decide(&self, why: String) {
        let mut state = self.lock();
        if state.is_done || state.verdict.is_some() {
            return;
        }
        state.say(&format!("lost {}", one_line(&why)));
        state.verdict = Some(why);
        drop(state);
        self.changed.notify_all();
    }
}

impl State {
    /// Says a line to all peers; one that cannot hear it is noticed by who listens to it.
    fn say(&mut self, line: &str) {
        for peer in self.peers.values_mut() {
            let _ = writeln!(peer.stream, "{line}");
        }
    }
}

/// Reads who calls; `None` for a stranger.
fn introduced(stream: TcpStream, world_size: u32) -> Option<(u32, TcpStream)> {
    stream.set_read_timeout(Some(BEAT)).ok()?;
    let mut line = String::new();
    // Byte by byte: what follows belongs to who listens next.
    let mut byte = BufReader::with_capacity(1, stream.try_clone().ok()?);
    byte.read_line(&mut line).ok()?;
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

    const PATIENCE: Patience = Patience {
        rendezvous: Duration::from_secs(5),
        collective: Duration::from_secs(5),
        silence: Duration::from_secs(3),
        grace: Duration::from_millis(10),
    };

    /// Makes the lifelines of rank 0 and of as many callers.
    fn join(callers: u32) -> (Lifeline, Vec<Lifeline>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let calling = thread::spawn(move || {
            (1..=callers)
                .map(|rank| Lifeline::call(rank, "127.0.0.1", port, PATIENCE).unwrap())
                .collect::<Vec<_>>()
        });
        (Lifeline::host(&listener, callers + 1, PATIENCE).unwrap(), calling.join().unwrap())
    }

    fn hear(lifeline: &Lifeline) -> Option<String> {
        lifeline.verdict(Duration::from_secs(6))
    }

    fn hang_up(lifeline: &Lifeline) {
        let state = lifeline.shared.lock();
        for peer in state.peers.values() {
            let _ = peer.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    #[test]
    fn all_hear_who_is_gone() {
        let (host, callers) = join(2);
        hang_up(&callers[1]);
        let gone = "rank 2 is gone: its process ended without a word";
        assert_eq!(hear(&host).as_deref(), Some(gone));
        assert_eq!(hear(&callers[0]).as_deref(), Some(gone));
    }

    #[test]
    fn all_hear_why_one_failed() {
        let (host, callers) = join(2);
        callers[0].fail("the disk\nis full");
        let failed = "rank 1 failed: the disk is full";
        assert_eq!(hear(&host).as_deref(), Some(failed));
        assert_eq!(hear(&callers[1]).as_deref(), Some(failed));
    }

    #[test]
    fn who_is_done_may_go() {
        let (host, callers) = join(2);
        callers[0].done();
        hang_up(&callers[0]);
        assert_eq!(host.verdict(Duration::from_millis(300)), None);
        host.done();
        hang_up(&host);
        assert_eq!(callers[1].verdict(Duration::from_millis(300)), None);
    }

    #[test]
    fn silence_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        writeln!(silent, "rank 1").unwrap();
        let host = Lifeline::host(&listener, 2, PATIENCE).unwrap();
        insta::assert_snapshot!(hear(&host).unwrap(), @"rank 1 gave no sign of life for 3 s: its machine or network is down, or it was stopped");
    }

    #[test]
    fn who_does_not_end_is_ended() {
        let (host, callers) = join(2);
        let (tell, told) = std::sync::mpsc::channel();
        host.guard(PATIENCE.grace, Box::new(move |why| tell.send(why.to_owned()).unwrap()));
        hang_up(&callers[0]);
        assert!(told.recv_timeout(Duration::from_secs(6)).unwrap().starts_with("rank 1 is gone"));
    }
}
