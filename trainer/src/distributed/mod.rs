//! The ranks of a run: they meet, exchange tensors through torch's process groups, and end together.
//!
//! [`place`] says which rank this is; `ffi` reaches c10d's TCPStore and ProcessGroupGloo through a
//! small C++ shim; `lifeline` knows who is still there. [`Ranks`] is all that the rest sees, and one
//! rank alone is a case of it.
//!
//! A group that broke stays broken: every later call returns the same error. So a call deep in the
//! model, where no error can be returned, need not be: the next one that can returns it.

mod ffi;
mod heartbeat;
pub mod launch;
pub mod rank;

use std::{
    cell::{Cell, RefCell},
    net::TcpListener,
    rc::Rc,
    time::Duration,
};

use finetune_contract::{ExitCode, FailureReason};
use tch::{Device, Tensor};

use crate::{
    distributed::{
        ffi::{Backend, Group, Store, Work},
        heartbeat::Lifeline,
        rank::{Patience, Place},
    },
    failure::Failure,
    runtime::clock,
};
pub use heartbeat::OnLost;

/// How often a waiting rank looks into the store.
const POLL: Duration = Duration::from_millis(100);
/// The same where training stands still meanwhile.
const SHORT_POLL: Duration = Duration::from_millis(1);
/// Where rank 0 says on which port it hears signs of life.
const LIFELINE_PORT: &str = "lifeline-port";

/// Why ranks cannot work together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Rank 0 cannot be reached, or, on rank 0, its port not be opened.
    #[error("the ranks cannot meet at {address}:{port}: {reason}")]
    Meet {
        /// Rank 0's name or address.
        address: String,
        /// Its port.
        port: u16,
        /// What the system or torch said.
        reason: String,
    },
    /// Some did not come.
    #[error(
        "{} of {world_size} did not come to {place} within {seconds} s: see why in {} log", ranks(missing),
        if missing.len() == 1 { "its" } else { "their" }
    )]
    Missing {
        /// Who.
        missing: Vec<u32>,
        /// Of how many.
        world_size: u32,
        /// To what.
        place: String,
        /// How long they were waited for.
        seconds: u64,
    },
    /// Another rank ended or fell silent.
    #[error(
        "{why}; this rank {rank} cannot go on without it: the run goes on from its last checkpoint when all are started again"
    )]
    Lost {
        /// This rank.
        rank: u32,
        /// Who, and what is known.
        why: String,
    },
    /// A collective failed though everybody is there.
    #[error("rank {rank} could not complete {collective}: {reason}{}", stragglers(behind))]
    Collective {
        /// This rank.
        rank: u32,
        /// Which.
        collective: &'static str,
        /// What torch said.
        reason: String,
        /// Who has not come to it.
        behind: Vec<u32>,
    },
}

fn ranks(ranks: &[u32]) -> String {
    let numbers: Vec<String> = ranks.iter().map(u32::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, numbers.join(", "))
}

fn stragglers(behind: &[u32]) -> String {
    if behind.is_empty() {
        String::new()
    } else {
        format!("; {} did not come to it", ranks(behind))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from_chain(FailureReason::PeerLost, &error)
    }
}

/// The ranks of a run, seen from one of them. A clone is the same group.
#[derive(Debug, Clone)]
pub struct Ranks(Option<Rc<Joined>>);

#[derive(Debug)]
struct Joined {
    rank: u32,
    world_size: u32,
    /// What the group is called in the store.
    name: String,
    store: Store,
    group: RefCell<Option<Group>>,
    lifeline: Lifeline,
    patience: Patience,
    device: Device,
    sent: Cell<u64>,
    broken: RefCell<Option<Error>>,
}

/// A collective under way; wait for it before its tensors are used.
#[derive(Debug)]
pub struct Pending(Option<(Work, &'static str)>);

/// A sum over ranks of which each gets a part, under way.
#[derive(Debug)]
pub struct Reducing {
    /// This rank's part from each rank, one after the other.
    received: Tensor,
    pending: Pending,
}

impl Ranks {
    /// One rank, alone.
    pub fn alone() -> Self {
        Self(None)
    }

    /// Meets the other ranks; `name` must be the same on all of them and new each time.
    ///
    /// `on_lost` is called, from another thread, when a rank is lost and this one does not end by
    /// itself within the grace.
    ///
    /// # Errors
    /// [`Error`] that names who did not come.
    pub fn join(
        place: &Place,
        name: &str,
        device: Device,
        patience: Patience,
        on_lost: OnLost,
    ) -> Result<Self, Error> {
        let Place { rank, world_size, master_address: address, master_port: port, .. } = place;
        let (rank, world_size) = (*rank, *world_size);
        let cannot_meet =
            |reason: String| Error::Meet { address: address.clone(), port: *port, reason };
        let store =
            Store::open(address, *port, rank == 0, patience.rendezvous).map_err(cannot_meet)?;
        let lifeline_key = format!("{name}/{LIFELINE_PORT}");
        let listener = (rank == 0).then(|| listen(place)).transpose().map_err(cannot_meet)?;
        if let Some((_, port)) = &listener {
            store.set(&lifeline_key, &port.to_string()).map_err(cannot_meet)?;
        }
        // Who comes late still finds rank 0; who never comes is named.
        store.set(&format!("{name}/here/{rank}"), "1").map_err(cannot_meet)?;
        let until = clock::now() + patience.rendezvous;
        loop {
            let missing =
                absent(&store, &format!("{name}/here"), world_size).map_err(cannot_meet)?;
            if missing.is_empty() {
                break;
            }
            if clock::now() > until {
                return Err(Error::Missing {
                    missing,
                    world_size,
                    place: format!("{address}:{port}"),
                    seconds: patience.rendezvous.as_secs(),
                });
            }
            std::thread::sleep(POLL);
        }
        let lifeline = if let Some((listener, _)) = &listener {
            Lifeline::host(listener, world_size, patience)
        } else {
            let port = store.get(&lifeline_key).map_err(cannot_meet)?.unwrap_or_default();
            Lifeline::call(rank, address, port.parse().unwrap_or_default(), patience)
        }
        .map_err(|error| cannot_meet(format!("no sign of life can be given: {error}")))?;
        lifeline.guard(patience.grace, on_lost);
        let backend = match device {
            Device::Cuda(_) => Backend::Nccl,
            _ => Backend::Gloo {
                address: if place.is_local() { "127.0.0.1" } else { "" },
                interface: place.interface.as_deref().unwrap_or_default(),
            },
        };
        let group = Group::open(&store, name, [rank, world_size], &backend, patience.collective)
            .map_err(|reason| match lifeline.verdict(Duration::ZERO) {
                Some(why) => Error::Lost { rank, why },
                None => cannot_meet(reason),
            })?;
        Ok(Self(Some(Rc::new(Joined {
            rank,
            world_size,
            name: name.to_owned(),
            store,
            group: RefCell::new(Some(group)),
            lifeline,
            patience,
            device,
            sent: Cell::new(0),
            broken: RefCell::new(None),
        }))))
    }

    /// Returns this rank, from 0.
    pub fn rank(&self) -> u32 {
        self.0.as_ref().map_or(0, |joined| joined.rank)
    }

    /// Returns how many there are.
    pub fn world_size(&self) -> u32 {
        self.0.as_ref().map_or(1, |joined| joined.world_size)
    }

    /// Tells whether this is the rank that writes, tells and publishes.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Returns the bytes of tensors this rank has sent.
    ///
    /// # Source
    /// What each algorithm sends per rank, of `n` bytes over `W` ranks: `2 n (W − 1) / W` for a ring
    /// all-reduce, `n (W − 1) / W` for a ring all-gather or an exchange of parts (Thakur et al.,
    /// "Optimization of Collective Communication Operations in MPICH", 2005).
    pub fn sent_bytes(&self) -> u64 {
        self.0.as_ref().map_or(0, |joined| joined.sent.get())
    }

    /// Sums a tensor over all ranks, in place; all get the very same bits.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<(), Error> {
        self.wait(self.start_all_reduce(tensor)?)
    }

    /// Starts to do so.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn start_all_reduce(&self, tensor: &Tensor) -> Result<Pending, Error> {
        let Some(joined) = &self.0 else { return Ok(Pending(None)) };
        joined.count(2 * bytes(tensor));
        let work = joined.start("a sum", |group| group.all_reduce(tensor))?;
        Ok(Pending(Some(work)))
    }

    /// Starts to fill `whole` with the `part` of each rank, by rank.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn start_all_gather(&self, whole: &Tensor, part: &Tensor) -> Result<Pending, Error> {
        let Some(joined) = &self.0 else {
            whole.shallow_clone().copy_(part);
            return Ok(Pending(None));
        };
        joined.count(bytes(whole));
        let work = joined.start("gathering weights", |group| group.all_gather(whole, part))?;
        Ok(Pending(Some(work)))
    }

    /// Waits for what was started.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn wait(&self, pending: Pending) -> Result<(), Error> {
        match (&self.0, pending.0) {
            (Some(joined), Some(work)) => joined.finish(work),
            _ => Ok(()),
        }
    }

    /// Starts to sum `whole` over all ranks, of which each gets its part. `whole` must not change
    /// meanwhile.
    ///
    /// Each rank sends every other its part, and each adds what it got in the order of ranks, so the
    /// sum does not depend on who was first. c10d's own reduce-scatter is, with Gloo, an all-reduce
    /// of which most is thrown away: twice the bytes.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn start_reduce_scatter(&self, whole: &Tensor) -> Result<Reducing, Error> {
        let Some(joined) = &self.0 else {
            return Ok(Reducing { received: whole.shallow_clone(), pending: Pending(None) });
        };
        joined.count(bytes(whole));
        let received = whole.empty_like();
        let work =
            joined.start("reducing gradients", |group| group.all_to_all(&received, whole))?;
        Ok(Reducing { received, pending: Pending(Some(work)) })
    }

    /// Waits for such a sum and adds this rank's part of it to `part`.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn finish_reduce_scatter(&self, reducing: Reducing, part: &Tensor) -> Result<(), Error> {
        let Reducing { received, pending } = reducing;
        self.wait(pending)?;
        let mut part = part.shallow_clone();
        for from in received.chunk(i64::from(self.world_size()), 0) {
            let _ = part.g_add_(&from);
        }
        Ok(())
    }

    /// Sums numbers over all ranks.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn sum<const N: usize>(&self, numbers: [f64; N]) -> Result<[f64; N], Error> {
        let Some(joined) = &self.0 else { return Ok(numbers) };
        let tensor = Tensor::from_slice(&numbers).to_device(joined.device);
        self.all_reduce(&tensor)?;
        Ok(std::array::from_fn(|index| tensor.double_value(&[index as i64])))
    }

    /// Tells whether any rank says so.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn any(&self, is_so: bool) -> Result<bool, Error> {
        self.sum([f64::from(u8::from(is_so))]).map(|[count]| count > 0.0)
    }

    /// Returns on every rank what rank 0 says; exact below 2⁵³.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn from_first(&self, number: u64) -> Result<u64, Error> {
        let said = if self.is_first() { number as f64 } else { 0.0 };
        self.sum([said]).map(|[number]| number as u64)
    }

    /// Waits until all ranks have come here, however long they take, unless one is lost: the way to
    /// a first collective leads through downloads of unknown length.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn wait_for_all(&self, place: &str) -> Result<(), Error> {
        let Some(joined) = &self.0 else { return Ok(()) };
        let Joined { rank, name, store, world_size, lifeline, .. } = &**joined;
        let place = &format!("{name}/{place}");
        let lost = |reason: String| {
            let why = lifeline.verdict(joined.patience.grace).unwrap_or(reason);
            joined.broken(Error::Lost { rank: *rank, why })
        };
        store.set(&format!("{place}/{rank}"), "1").map_err(lost)?;
        while !absent(store, place, *world_size).map_err(lost)?.is_empty() {
            if let Some(why) = lifeline.verdict(POLL) {
                return Err(joined.broken(Error::Lost { rank: *rank, why }));
            }
        }
        Ok(())
    }

    /// Sends a short text to rank 0, which gets those of all, by rank; each `place` once.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn tell_first(&self, place: &str, text: &str) -> Result<Option<Vec<String>>, Error> {
        let Some(joined) = &self.0 else { return Ok(Some(vec![text.to_owned()])) };
        let Joined { rank, name, store, world_size, lifeline, .. } = &**joined;
        let key = |rank: u32| format!("{name}/{place}/{rank}");
        let lost = |reason: String| joined.failed("telling rank 0", reason);
        store.set(&key(*rank), text).map_err(lost)?;
        if !self.is_first() {
            return Ok(None);
        }
        let mut told = Vec::new();
        while told.len() < *world_size as usize {
            match store.get(&key(told.len() as u32)).map_err(lost)? {
                Some(text) => told.push(text),
                None => {
                    if let Some(why) = lifeline.verdict(SHORT_POLL) {
                        return Err(joined.broken(Error::Lost { rank: *rank, why }));
                    }
                }
            }
        }
        Ok(Some(told))
    }

    /// Returns the error of a group that broke where no error could be returned.
    ///
    /// # Errors
    /// That [`Error`].
    pub fn check(&self) -> Result<(), Error> {
        self.0.as_ref().map_or(Ok(()), |joined| joined.check())
    }

    /// Says that this rank has done all it had to, and closes the group.
    pub fn done(&self) {
        let Some(joined) = &self.0 else { return };
        joined.lifeline.done();
        if let (Ok(()), Some(group)) = (joined.check(), joined.group.take()) {
            group.close();
        }
    }

    /// Tells the other ranks why this one ends; the group is left open, for closing it could wait.
    pub fn fail(&self, message: &str) {
        if let Some(joined) = &self.0 {
            joined.lifeline.fail(message);
        }
    }
}

impl Joined {
    /// Counts what is sent of a tensor whose every element but this rank's share goes out.
    fn count(&self, bytes: u64) {
        let world_size = u64::from(self.world_size);
        self.sent.set(self.sent.get() + bytes * (world_size - 1) / world_size);
    }

    fn check(&self) -> Result<(), Error> {
        self.broken.borrow().clone().map_or(Ok(()), Err)
    }

    fn start(
        &self,
        collective: &'static str,
        start: impl FnOnce(&Group) -> Result<Work, String>,
    ) -> Result<(Work, &'static str), Error> {
        self.check()?;
        self.lifeline.begin();
        let group = self.group.borrow();
        let started = group.as_ref().ok_or_else(|| "the group is closed".to_owned());
        let work = started.and_then(start).map_err(|reason| self.failed(collective, reason))?;
        Ok((work, collective))
    }

    fn finish(&self, (work, collective): (Work, &'static str)) -> Result<(), Error> {
        self.check()?;
        work.wait().map_err(|reason| self.failed(collective, reason))
    }

    /// Finds out why a collective failed, and remembers it.
    fn failed(&self, collective: &'static str, reason: String) -> Error {
        let rank = self.rank;
        if let Some(why) = self.lifeline.verdict(self.patience.grace) {
            return self.broken(Error::Lost { rank, why });
        }
        let behind = self.lifeline.behind();
        let error = Error::Collective { rank, collective, reason, behind };
        self.lifeline.declare(&error.to_string());
        self.broken(error)
    }

    fn broken(&self, error: Error) -> Error {
        *self.broken.borrow_mut() = Some(error.clone());
        error
    }
}

/// Ends the process at once: its destructors could wait for ranks that will not answer.
pub fn exit(code: ExitCode) -> ! {
    ffi::exit(code.code())
}

fn listen(place: &Place) -> Result<(TcpListener, u16), String> {
    let addresses = if place.is_local() { ["127.0.0.1", "::1"] } else { ["::", "0.0.0.0"] };
    let listener = addresses
        .iter()
        .find_map(|address| TcpListener::bind((*address, 0)).ok())
        .ok_or("no port can be listened on")?;
    let port = listener.local_addr().map_err(|error| error.to_string())?.port();
    Ok((listener, port))
}

/// Lists the ranks that have not set their key below `place`.
fn absent(store: &Store, place: &str, world_size: u32) -> Result<Vec<u32>, String> {
    let mut absent = Vec::new();
    for rank in 0..world_size {
        if store.get(&format!("{place}/{rank}"))?.is_none() {
            absent.push(rank);
        }
    }
    Ok(absent)
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
