//! The ranks of a run: rendezvous, collectives over torch's process groups, and a common end.
//!
//! [`rank`] reads which rank this is; `ffi` calls c10d's TCPStore and process groups through a
//! small C++ shim; `heartbeat` detects lost ranks. The rest of the trainer sees only [`Ranks`],
//! which also represents a single rank.
//!
//! A broken group stays broken: every later call returns the same error. A call deep in the model
//! that cannot return an error may therefore ignore it, because the next call that can will return
//! it.

mod error;
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

use finetune_contract::ExitCode;
use tch::{Device, Tensor};

use crate::{
    distributed::{
        ffi::{Backend, Group, Store, Work},
        heartbeat::Heartbeat,
        rank::{RankInfo, Timeouts},
    },
    runtime::clock,
};
pub use error::Error;
pub use heartbeat::OnLost;

/// How often a waiting rank polls the store.
const POLL: Duration = Duration::from_millis(100);
/// The same while training waits.
const SHORT_POLL: Duration = Duration::from_millis(1);
/// The key in the store of the port on which rank 0 accepts heartbeats; part of the protocol
/// between ranks.
const HEARTBEAT_PORT: &str = "lifeline-port";

/// The ranks of a run, seen from one of them. A clone refers to the same group.
#[derive(Debug, Clone)]
pub struct Ranks(Option<Rc<RankGroup>>);

#[derive(Debug)]
struct RankGroup {
    rank: u32,
    world_size: u32,
    /// The prefix of the group's keys in the store.
    name: String,
    store: Store,
    process_group: RefCell<Option<Group>>,
    heartbeat: Heartbeat,
    timeouts: Timeouts,
    device: Device,
    sent_bytes: Cell<u64>,
    /// The error that broke the group.
    broken: RefCell<Option<Error>>,
}

/// A collective in flight; wait for it before its tensors are used.
#[derive(Debug)]
pub struct Pending(Option<(Work, &'static str)>);

/// A reduce-scatter in flight.
#[derive(Debug)]
pub struct PendingReduceScatter {
    /// This rank's shard from each rank, in the order of ranks.
    received: Tensor,
    pending: Pending,
}

impl Ranks {
    /// Returns the group of a single rank.
    pub fn alone() -> Self {
        Self(None)
    }

    /// Waits for the other ranks at the rendezvous and forms a group. `name` must be the same on
    /// all ranks and different for each group.
    ///
    /// `on_lost` is called from another thread when a rank is lost and this one does not exit by
    /// itself within the grace period.
    ///
    /// # Errors
    /// [`Error`] that names the ranks that did not connect.
    pub fn join(
        info: &RankInfo,
        name: &str,
        device: Device,
        timeouts: Timeouts,
        on_lost: OnLost,
    ) -> Result<Self, Error> {
        let RankInfo { rank, world_size, master_address: address, master_port: port, .. } = info;
        let (rank, world_size) = (*rank, *world_size);
        let rendezvous_failed =
            |reason: String| Error::Rendezvous { address: address.clone(), port: *port, reason };
        let store = Store::open(address, *port, rank == 0, timeouts.rendezvous)
            .map_err(rendezvous_failed)?;
        let heartbeat_key = format!("{name}/{HEARTBEAT_PORT}");
        let listener = (rank == 0).then(|| listen(info)).transpose().map_err(rendezvous_failed)?;
        if let Some((_, port)) = &listener {
            store.set(&heartbeat_key, &port.to_string()).map_err(rendezvous_failed)?;
        }
        // Ranks register one by one, so that the missing ones can be named.
        store.set(&format!("{name}/here/{rank}"), "1").map_err(rendezvous_failed)?;
        let until = clock::now() + timeouts.rendezvous;
        loop {
            let missing =
                absent(&store, &format!("{name}/here"), world_size).map_err(rendezvous_failed)?;
            if missing.is_empty() {
                break;
            }
            if clock::now() > until {
                return Err(Error::Missing {
                    missing,
                    world_size,
                    address: format!("{address}:{port}"),
                    seconds: timeouts.rendezvous.as_secs(),
                });
            }
            std::thread::sleep(POLL);
        }
        let heartbeat = if let Some((listener, _)) = &listener {
            Heartbeat::accept(listener, world_size, timeouts)
        } else {
            let port = store.get(&heartbeat_key).map_err(rendezvous_failed)?.unwrap_or_default();
            Heartbeat::connect(rank, address, port.parse().unwrap_or_default(), timeouts)
        }
        .map_err(|error| rendezvous_failed(format!("no heartbeat can be sent: {error}")))?;
        heartbeat.watch(timeouts.grace, on_lost);
        let backend = match device {
            Device::Cuda(_) => Backend::Nccl,
            _ => Backend::Gloo {
                address: if info.is_local() { "127.0.0.1" } else { "" },
                interface: info.interface.as_deref().unwrap_or_default(),
            },
        };
        let process_group =
            Group::open(&store, name, [rank, world_size], &backend, timeouts.collective).map_err(
                |reason| match heartbeat.abort_reason(Duration::ZERO) {
                    Some(why) => Error::Lost { rank, why },
                    None => rendezvous_failed(reason),
                },
            )?;
        Ok(Self(Some(Rc::new(RankGroup {
            rank,
            world_size,
            name: name.to_owned(),
            store,
            process_group: RefCell::new(Some(process_group)),
            heartbeat,
            timeouts,
            device,
            sent_bytes: Cell::new(0),
            broken: RefCell::new(None),
        }))))
    }

    /// Returns this rank, from 0.
    pub fn rank(&self) -> u32 {
        self.0.as_ref().map_or(0, |group| group.rank)
    }

    /// Returns the number of ranks.
    pub fn world_size(&self) -> u32 {
        self.0.as_ref().map_or(1, |group| group.world_size)
    }

    /// Reports whether this is rank 0, which alone logs progress, completes checkpoints and publishes.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Returns the bytes of tensors that this rank has sent.
    ///
    /// # Source
    /// The bytes that each algorithm sends per rank, of `n` bytes over `W` ranks: `2 n (W − 1) / W`
    /// for a ring all-reduce, `n (W − 1) / W` for a ring all-gather or an all-to-all exchange
    /// (Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005).
    pub fn sent_bytes(&self) -> u64 {
        self.0.as_ref().map_or(0, |group| group.sent_bytes.get())
    }

    /// Sums a tensor over all ranks, in place; the result is equal bit for bit on all of them.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<(), Error> {
        self.wait(self.start_all_reduce(tensor)?)
    }

    /// Starts an all-reduce, in place.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn start_all_reduce(&self, tensor: &Tensor) -> Result<Pending, Error> {
        let Some(group) = &self.0 else { return Ok(Pending(None)) };
        group.count(2 * bytes(tensor));
        let work = group.start("all-reduce", |process_group| process_group.all_reduce(tensor))?;
        Ok(Pending(Some(work)))
    }

    /// Starts to gather the `shard` of each rank into `gathered`, in the order of ranks.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn start_all_gather(&self, gathered: &Tensor, shard: &Tensor) -> Result<Pending, Error> {
        let Some(group) = &self.0 else {
            gathered.shallow_clone().copy_(shard);
            return Ok(Pending(None));
        };
        group.count(bytes(gathered));
        let work = group.start("all-gather of weights", |process_group| {
            process_group.all_gather(gathered, shard)
        })?;
        Ok(Pending(Some(work)))
    }

    /// Waits for a collective.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn wait(&self, pending: Pending) -> Result<(), Error> {
        match (&self.0, pending.0) {
            (Some(group), Some(work)) => group.finish(work),
            _ => Ok(()),
        }
    }

    /// Starts a reduce-scatter: `tensor` is summed over all ranks, and each rank gets its shard of
    /// the sum. `tensor` must not change until it is finished.
    ///
    /// Each rank sends every other rank its shard and adds what it receives in the order of ranks,
    /// so the sum does not depend on which rank is fastest. With Gloo, c10d's own reduce-scatter is
    /// an all-reduce of which most is thrown away: twice the bytes.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn start_reduce_scatter(&self, tensor: &Tensor) -> Result<PendingReduceScatter, Error> {
        let Some(group) = &self.0 else {
            return Ok(PendingReduceScatter {
                received: tensor.shallow_clone(),
                pending: Pending(None),
            });
        };
        group.count(bytes(tensor));
        let received = tensor.empty_like();
        let work = group.start("reduce-scatter of gradients", |process_group| {
            process_group.all_to_all(&received, tensor)
        })?;
        Ok(PendingReduceScatter { received, pending: Pending(Some(work)) })
    }

    /// Waits for a reduce-scatter and adds this rank's shard of the sum to `shard`.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn finish_reduce_scatter(
        &self,
        reduce_scatter: PendingReduceScatter,
        shard: &Tensor,
    ) -> Result<(), Error> {
        let PendingReduceScatter { received, pending } = reduce_scatter;
        self.wait(pending)?;
        let mut shard = shard.shallow_clone();
        for from in received.chunk(i64::from(self.world_size()), 0) {
            let _ = shard.g_add_(&from);
        }
        Ok(())
    }

    /// Sums numbers over all ranks.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn sum<const N: usize>(&self, numbers: [f64; N]) -> Result<[f64; N], Error> {
        let Some(group) = &self.0 else { return Ok(numbers) };
        let tensor = Tensor::from_slice(&numbers).to_device(group.device);
        self.all_reduce(&tensor)?;
        Ok(std::array::from_fn(|index| tensor.double_value(&[index as i64])))
    }

    /// Reports whether the condition holds on any rank.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn any(&self, condition: bool) -> Result<bool, Error> {
        self.sum([f64::from(u8::from(condition))]).map(|[count]| count > 0.0)
    }

    /// Returns rank 0's number on every rank; exact below 2⁵³.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn broadcast(&self, number: u64) -> Result<u64, Error> {
        let summand = if self.is_first() { number as f64 } else { 0.0 };
        self.sum([summand]).map(|[number]| number as u64)
    }

    /// Waits until all ranks have reached this barrier, without a timeout unless one is lost:
    /// before the first collective come downloads of unknown length.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn barrier(&self, barrier: &str) -> Result<(), Error> {
        let Some(group) = &self.0 else { return Ok(()) };
        let RankGroup { rank, name, store, world_size, heartbeat, .. } = &**group;
        let prefix = &format!("{name}/{barrier}");
        let lost = |reason: String| {
            let why = heartbeat.abort_reason(group.timeouts.grace).unwrap_or(reason);
            group.break_with(Error::Lost { rank: *rank, why })
        };
        store.set(&format!("{prefix}/{rank}"), "1").map_err(lost)?;
        while !absent(store, prefix, *world_size).map_err(lost)?.is_empty() {
            if let Some(why) = heartbeat.abort_reason(POLL) {
                return Err(group.break_with(Error::Lost { rank: *rank, why }));
            }
        }
        Ok(())
    }

    /// Gathers a short text of every rank at rank 0, in the order of ranks; others get `None`. Each
    /// `key` may be used once.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn gather_texts(&self, key: &str, text: &str) -> Result<Option<Vec<String>>, Error> {
        let Some(group) = &self.0 else { return Ok(Some(vec![text.to_owned()])) };
        let RankGroup { rank, name, store, world_size, heartbeat, .. } = &**group;
        let rank_key = |rank: u32| format!("{name}/{key}/{rank}");
        let lost = |reason: String| group.failed("gathering at rank 0", reason);
        store.set(&rank_key(*rank), text).map_err(lost)?;
        if !self.is_first() {
            return Ok(None);
        }
        let mut texts = Vec::new();
        while texts.len() < *world_size as usize {
            match store.get(&rank_key(texts.len() as u32)).map_err(lost)? {
                Some(text) => texts.push(text),
                None => {
                    if let Some(why) = heartbeat.abort_reason(SHORT_POLL) {
                        return Err(group.break_with(Error::Lost { rank: *rank, why }));
                    }
                }
            }
        }
        Ok(Some(texts))
    }

    /// Checks that the group is not broken.
    ///
    /// # Errors
    /// The [`Error`] that broke it.
    pub fn check(&self) -> Result<(), Error> {
        self.0.as_ref().map_or(Ok(()), |group| group.check())
    }

    /// Tells the other ranks that this one has finished, and closes the group.
    pub fn done(&self) {
        let Some(group) = &self.0 else { return };
        group.heartbeat.done();
        if let (Ok(()), Some(process_group)) = (group.check(), group.process_group.take()) {
            process_group.close();
        }
    }

    /// Tells the other ranks why this one failed; the group stays open, because closing it could
    /// block.
    pub fn fail(&self, message: &str) {
        if let Some(group) = &self.0 {
            group.heartbeat.fail(message);
        }
    }
}

impl RankGroup {
    /// Counts the bytes sent when every element but this rank's shard is sent.
    fn count(&self, bytes: u64) {
        let world_size = u64::from(self.world_size);
        self.sent_bytes.set(self.sent_bytes.get() + bytes * (world_size - 1) / world_size);
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
        self.heartbeat.count_collective();
        let process_group = self.process_group.borrow();
        let started = process_group.as_ref().ok_or_else(|| "the group is closed".to_owned());
        let work = started.and_then(start).map_err(|reason| self.failed(collective, reason))?;
        Ok((work, collective))
    }

    fn finish(&self, (work, collective): (Work, &'static str)) -> Result<(), Error> {
        self.check()?;
        work.wait().map_err(|reason| self.failed(collective, reason))
    }

    /// Finds out why a collective failed, and breaks the group.
    fn failed(&self, collective: &'static str, reason: String) -> Error {
        let rank = self.rank;
        if let Some(why) = self.heartbeat.abort_reason(self.timeouts.grace) {
            return self.break_with(Error::Lost { rank, why });
        }
        let stragglers = self.heartbeat.stragglers();
        let error = Error::Collective { rank, collective, reason, stragglers };
        self.heartbeat.abort(&error.to_string());
        self.break_with(error)
    }

    fn break_with(&self, error: Error) -> Error {
        *self.broken.borrow_mut() = Some(error.clone());
        error
    }
}

/// Exits at once, because destructors could wait for ranks that will not answer.
pub fn exit(code: ExitCode) -> ! {
    ffi::exit(code.code())
}

fn listen(info: &RankInfo) -> Result<(TcpListener, u16), String> {
    let addresses = if info.is_local() { ["127.0.0.1", "::1"] } else { ["::", "0.0.0.0"] };
    let listener = addresses
        .iter()
        .find_map(|address| TcpListener::bind((*address, 0)).ok())
        .ok_or("no port can be listened on")?;
    let port = listener.local_addr().map_err(|error| error.to_string())?.port();
    Ok((listener, port))
}

/// Lists the ranks that have not set their key below `prefix`.
fn absent(store: &Store, prefix: &str, world_size: u32) -> Result<Vec<u32>, String> {
    let mut absent = Vec::new();
    for rank in 0..world_size {
        if store.get(&format!("{prefix}/{rank}"))?.is_none() {
            absent.push(rank);
        }
    }
    Ok(absent)
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}
