//! jemalloc as the allocator of this program and, by its C names, of libtorch.
//!
//! With glibc's allocator, buffers of varying sizes fragment memory, which grows with the number of
//! micro-batches. jemalloc keeps freed pages: the next micro-batch needs the same buffers, and page
//! faults on returned memory would cost a tenth of a step. If the next micro-batch needs buffers of
//! other sizes, freed pages are purged first, so that they do not add to the peak. `docs/log/2026-11.md`
//! has the figures.
#![expect(unsafe_code, reason = "configures and calls jemalloc by its C names")]

use std::{
    ffi::CStr,
    ptr::null_mut,
    sync::{Mutex, PoisonError},
};

use tracing::debug;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The configuration that jemalloc reads when it starts, NUL-terminated: freed pages are kept until
/// they are purged, and small buffers may be cut from free extents of any size. The environment
/// variable `MALLOC_CONF` takes precedence.
// SAFETY: jemalloc declares this name and type.
#[unsafe(export_name = "malloc_conf")]
pub static CONFIGURATION: &[u8; 46] = b"dirty_decay_ms:-1,lg_extent_max_active_fit:20\0";

/// The control that purges the freed pages of all arenas; 4096 is `MALLCTL_ARENAS_ALL` of
/// jemalloc.h.
const PURGE: &CStr = c"arena.4096.purge";

/// What determines the sizes of buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Forward and backward passes of micro-batches of about this many tokens.
    Train(i64),
    /// Forward passes of micro-batches of about this many tokens.
    Evaluate(i64),
}

/// Starts a workload: if it differs from the one before, freed pages are returned to the system.
pub fn start_workload(workload: Workload) {
    static CURRENT: Mutex<Option<Workload>> = Mutex::new(None);
    let before = CURRENT.lock().unwrap_or_else(PoisonError::into_inner).replace(workload);
    if before != Some(workload) {
        purge();
    }
}

fn purge() {
    // SAFETY: a control without arguments or result.
    let status = unsafe {
        tikv_jemalloc_sys::mallctl(PURGE.as_ptr(), null_mut(), null_mut(), null_mut(), 0)
    };
    if status != 0 {
        debug!(status, "freed memory could not be purged");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::memory::anonymous_bytes;

    #[test]
    fn freed_pages_are_kept_by_default() {
        let (mut decay, mut size) = (0_isize, size_of::<isize>());
        let name = c"opt.dirty_decay_ms";
        // SAFETY: the result of the control is an `ssize_t`.
        let status = unsafe {
            let result = (&raw mut decay).cast();
            tikv_jemalloc_sys::mallctl(name.as_ptr(), result, &raw mut size, null_mut(), 0)
        };
        assert_eq!((status, decay), (0, -1));
    }

    #[test]
    fn purging_returns_freed_pages() {
        // Far more than other tests of this process allocate concurrently.
        let block = std::hint::black_box(vec![1_u8; 1 << 30]);
        let with_block = anonymous_bytes();
        drop(block);
        purge();
        let without = anonymous_bytes();
        assert!(with_block > without + (1 << 29), "{with_block} then {without}");
    }
}
