//! The allocator of this program and, by its C names, of libtorch.
//!
//! glibc's keeps buffers of ever other sizes apart and grows with the number of micro-batches; this
//! one does not. What is freed stays here: the next micro-batch wants the same buffers, and pages
//! that were given back cost faults when they are written again, a tenth of a step. Where the next
//! one wants buffers of other sizes the pages go back first, or those would come on top of them.
//! `docs/log/2026-11.md` has the figures.
#![expect(unsafe_code, reason = "configures and calls jemalloc by its C names")]

use std::{
    ffi::CStr,
    ptr::null_mut,
    sync::{Mutex, PoisonError},
};

use tracing::debug;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What jemalloc reads when it starts, a text that ends in zero: freed pages are kept until they are
/// asked back, and however much lies free in one piece, small buffers are cut from it too. The
/// environment's `MALLOC_CONF` comes after it.
// SAFETY: the name and type that jemalloc declares.
#[unsafe(export_name = "malloc_conf")]
pub static CONFIGURATION: &[u8; 46] = b"dirty_decay_ms:-1,lg_extent_max_active_fit:20\0";

/// Gives the freed pages of all arenas back; 4096 is `MALLCTL_ARENAS_ALL` of jemalloc.h.
const PURGE: &CStr = c"arena.4096.purge";

/// What buffers' sizes follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// A micro-batch of about so many positions, forward and backward.
    Train(i64),
    /// The same, forward only.
    Evaluate(i64),
}

/// Says that work begins: if the work before was of another kind or size, what it left goes back to
/// the system.
pub fn begin(work: Work) {
    static BEFORE: Mutex<Option<Work>> = Mutex::new(None);
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).replace(work);
    if before != Some(work) {
        give_back();
    }
}

fn give_back() {
    // SAFETY: a control that takes nothing and answers nothing.
    let status = unsafe {
        tikv_jemalloc_sys::mallctl(PURGE.as_ptr(), null_mut(), null_mut(), null_mut(), 0)
    };
    if status != 0 {
        debug!(status, "freed memory could not be given back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::memory::anonymous_bytes;

    #[test]
    fn freed_pages_are_kept_until_they_are_asked_back() {
        let (mut decay, mut size) = (0_isize, size_of::<isize>());
        let name = c"opt.dirty_decay_ms";
        // SAFETY: the control's answer is an `ssize_t`.
        let status = unsafe {
            let answer = (&raw mut decay).cast();
            tikv_jemalloc_sys::mallctl(name.as_ptr(), answer, &raw mut size, null_mut(), 0)
        };
        assert_eq!((status, decay), (0, -1));
    }

    #[test]
    fn pages_go_back_when_they_are_asked_for() {
        // Far more than other tests of this process allocate meanwhile.
        let block = std::hint::black_box(vec![1_u8; 1 << 30]);
        let with_block = anonymous_bytes();
        drop(block);
        give_back();
        let without = anonymous_bytes();
        assert!(with_block > without + (1 << 29), "{with_block} then {without}");
    }
}
