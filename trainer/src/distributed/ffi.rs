//! Safe wrappers of the shim over torch's process groups (`trainer/shim/c10d.cpp`): the only
//! `unsafe` code of this module.
#![expect(unsafe_code, reason = "calls the C interface of the shim")]

use std::{
    ffi::{CString, c_char, c_int, c_void},
    ptr::NonNull,
    time::Duration,
};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::runtime::shim::{ErrorBuffer, call};

/// The largest value in the store, in bytes; values are numbers and digests.
const VALUE_BYTES: usize = 128;

unsafe extern "C" {
    fn finetune_store_open(
        host: *const c_char,
        port: u16,
        is_server: bool,
        timeout: i64,
        error: ErrorBuffer,
    ) -> *mut c_void;
    fn finetune_store_set(
        store: *mut c_void,
        key: *const c_char,
        value: *const c_char,
        error: ErrorBuffer,
    ) -> bool;
    fn finetune_store_get(
        store: *mut c_void,
        key: *const c_char,
        value: *mut c_char,
        size: usize,
        error: ErrorBuffer,
    ) -> i64;
    fn finetune_store_close(store: *mut c_void);
    fn finetune_gloo_open(
        store: *mut c_void,
        prefix: *const c_char,
        rank: c_int,
        size: c_int,
        address: *const c_char,
        interface: *const c_char,
        timeout: i64,
        error: ErrorBuffer,
    ) -> *mut c_void;
    fn finetune_nccl_open(
        store: *mut c_void,
        prefix: *const c_char,
        rank: c_int,
        size: c_int,
        timeout: i64,
        error: ErrorBuffer,
    ) -> *mut c_void;
    fn finetune_group_close(group: *mut c_void);
    fn finetune_all_reduce(
        group: *mut c_void,
        tensor: *const C_tensor,
        error: ErrorBuffer,
    ) -> *mut c_void;
    fn finetune_all_gather(
        group: *mut c_void,
        gathered: *const C_tensor,
        shard: *const C_tensor,
        error: ErrorBuffer,
    ) -> *mut c_void;
    fn finetune_all_to_all(
        group: *mut c_void,
        received: *const C_tensor,
        sent: *const C_tensor,
        error: ErrorBuffer,
    ) -> *mut c_void;
    fn finetune_work_wait(work: *mut c_void, error: ErrorBuffer) -> bool;
    fn finetune_exit(code: c_int) -> !;
}

fn pointer(function: impl FnOnce(ErrorBuffer) -> *mut c_void) -> Result<NonNull<c_void>, String> {
    call(|pointer: &*mut c_void| !pointer.is_null(), function)
        .and_then(|pointer| NonNull::new(pointer).ok_or_else(String::new))
}

fn text(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(|_| format!("{text:?} contains a zero byte"))
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// A client of the store at rank 0; on rank 0 also its server.
#[derive(Debug)]
pub(super) struct Store(NonNull<c_void>);

impl Store {
    pub(super) fn open(
        host: &str,
        port: u16,
        is_server: bool,
        timeout: Duration,
    ) -> Result<Self, String> {
        let host = text(host)?;
        // SAFETY: the string outlives the call, which copies it.
        pointer(|error| unsafe {
            finetune_store_open(host.as_ptr(), port, is_server, milliseconds(timeout), error)
        })
        .map(Self)
    }

    pub(super) fn set(&self, key: &str, value: &str) -> Result<(), String> {
        let (key, value) = (text(key)?, text(value)?);
        // SAFETY: the store is open until dropped; the strings outlive the call.
        call(
            |succeeded| *succeeded,
            |error| unsafe {
                finetune_store_set(self.0.as_ptr(), key.as_ptr(), value.as_ptr(), error)
            },
        )
        .map(drop)
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<String>, String> {
        let key = text(key)?;
        let mut value = [0_u8; VALUE_BYTES];
        let buffer = value.as_mut_ptr().cast();
        // SAFETY: as in `set`; the shim writes at most `VALUE_BYTES` to `value`.
        let length = call(
            |length: &i64| *length >= 0,
            |error| unsafe {
                finetune_store_get(self.0.as_ptr(), key.as_ptr(), buffer, VALUE_BYTES, error)
            },
        )?;
        let value = &value[..length as usize];
        Ok((length > 0).then(|| String::from_utf8_lossy(value).into_owned()))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: created by `open` and closed once; a group keeps its own reference.
        unsafe { finetune_store_close(self.0.as_ptr()) }
    }
}

/// The backend of a process group.
pub(super) enum Backend<'a> {
    /// Gloo over sockets, between CPUs.
    Gloo {
        /// The address this rank listens on; empty for this machine's host name.
        address: &'a str,
        /// The interface this rank listens on, which takes precedence over the address; may be
        /// empty.
        interface: &'a str,
    },
    /// NCCL between GPUs, with the feature `cuda` only; our tests never run it.
    Nccl,
}

/// A process group.
#[derive(Debug)]
pub(super) struct Group(NonNull<c_void>);

impl Group {
    pub(super) fn open(
        store: &Store,
        prefix: &str,
        [rank, size]: [u32; 2],
        backend: &Backend<'_>,
        timeout: Duration,
    ) -> Result<Self, String> {
        let (prefix, [rank, size]) = (text(prefix)?, [rank, size].map(|number| number as c_int));
        let (store, timeout) = (store.0.as_ptr(), milliseconds(timeout));
        match backend {
            Backend::Gloo { address, interface } => {
                let (address, interface) = (text(address)?, text(interface)?);
                // SAFETY: the store is open and the strings outlive the call, which copies them.
                pointer(|error| unsafe {
                    finetune_gloo_open(
                        store,
                        prefix.as_ptr(),
                        rank,
                        size,
                        address.as_ptr(),
                        interface.as_ptr(),
                        timeout,
                        error,
                    )
                })
            }
            // SAFETY: as above.
            Backend::Nccl => pointer(|error| unsafe {
                finetune_nccl_open(store, prefix.as_ptr(), rank, size, timeout, error)
            }),
        }
        .map(Self)
    }

    /// Starts to sum `tensor` over all ranks, in place.
    pub(super) fn all_reduce(&self, tensor: &Tensor) -> Result<Work, String> {
        // SAFETY: the group is open until dropped; the tensor is alive, and `Work` keeps it so.
        Self::start([tensor, tensor], |[tensor, _], error| unsafe {
            finetune_all_reduce(self.0.as_ptr(), tensor, error)
        })
    }

    /// Starts to gather each rank's `shard` into `gathered`, in the order of ranks.
    pub(super) fn all_gather(&self, gathered: &Tensor, shard: &Tensor) -> Result<Work, String> {
        // SAFETY: as in `all_reduce`.
        Self::start([gathered, shard], |[gathered, shard], error| unsafe {
            finetune_all_gather(self.0.as_ptr(), gathered, shard, error)
        })
    }

    /// Starts to send the `r`-th part of `sent` to rank `r`, and to receive this rank's part from
    /// each.
    pub(super) fn all_to_all(&self, received: &Tensor, sent: &Tensor) -> Result<Work, String> {
        // SAFETY: as in `all_reduce`.
        Self::start([received, sent], |[received, sent], error| unsafe {
            finetune_all_to_all(self.0.as_ptr(), received, sent, error)
        })
    }

    fn start(
        tensors: [&Tensor; 2],
        start: impl FnOnce([*const C_tensor; 2], ErrorBuffer) -> *mut c_void,
    ) -> Result<Work, String> {
        let work = pointer(|error| start(tensors.map(Tensor::as_ptr), error))?;
        Ok(Work { work, _tensors: tensors.map(Tensor::shallow_clone) })
    }

    /// Closes the group, which must have no collective in flight: closing would wait for it.
    pub(super) fn close(self) {
        // SAFETY: created by `open` and closed once.
        unsafe { finetune_group_close(self.0.as_ptr()) }
    }
}

/// A collective in flight. It is either waited for, or leaked with a group that is never closed.
#[derive(Debug)]
pub(super) struct Work {
    work: NonNull<c_void>,
    /// The tensors that it reads and writes.
    _tensors: [Tensor; 2],
}

impl Work {
    pub(super) fn wait(self) -> Result<(), String> {
        // SAFETY: created by the shim, which frees it here, once, because `self` is consumed.
        call(
            |succeeded| *succeeded,
            |error| unsafe { finetune_work_wait(self.work.as_ptr(), error) },
        )
        .map(drop)
    }
}

/// Ends the process without running any destructor.
pub(super) fn exit(code: u8) -> ! {
    // SAFETY: takes a number and does not return.
    unsafe { finetune_exit(c_int::from(code)) }
}
