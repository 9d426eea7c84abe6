//! libtorch's own threads for our kernels: a second set would compete for the same processors.

use std::{
    ffi::c_void,
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use finetune_kernels::pool::Pool;

/// libtorch's threads.
pub(super) struct Threads;

impl Pool for Threads {
    fn run(&self, units: usize, task: &(dyn Fn(usize) + Sync)) {
        let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1).min(units);
        if threads <= 1 {
            (0..units).for_each(task);
            return;
        }
        // Units differ in length: whoever is free takes the next.
        let next = AtomicUsize::new(0);
        parallel_for(threads, &|_| {
            loop {
                let unit = next.fetch_add(1, Ordering::Relaxed);
                if unit >= units {
                    break;
                }
                task(unit);
            }
        });
    }
}

/// Divides rows into runs of about `at_once` and calls `task` with each.
pub(super) fn rows(rows: usize, at_once: usize, task: &(dyn Fn(Range<usize>) + Sync)) {
    let at_once = at_once.max(1);
    Threads.run(rows.div_ceil(at_once), &|unit| {
        task(unit * at_once..rows.min((unit + 1) * at_once));
    });
}

/// Calls `task` once on each of some threads.
fn parallel_for(threads: usize, task: &(dyn Fn(usize) + Sync)) {
    /// Hands a part of the range to the closure that `context` points to.
    extern "C" fn call(begin: i64, end: i64, context: *mut c_void) {
        #[expect(unsafe_code, reason = "a closure behind a C pointer")]
        // SAFETY: `context` is the reference below, which outlives the call.
        let task = unsafe { &**context.cast::<&(dyn Fn(usize) + Sync)>() };
        (begin..end).for_each(|index| task(index as usize));
    }
    #[expect(unsafe_code, reason = "libtorch's C interface")]
    // SAFETY: declared as in torch/csrc/stable/c/shim.h, 2.13.
    unsafe extern "C" {
        fn torch_parallel_for(
            begin: i64,
            end: i64,
            grain_size: i64,
            function: extern "C" fn(i64, i64, *mut c_void),
            context: *mut c_void,
        ) -> i32;
    }
    let context = (&raw const task).cast_mut().cast::<c_void>();
    #[expect(unsafe_code, reason = "libtorch's C interface")]
    // SAFETY: it returns only after the last call of `call`.
    let status = unsafe { torch_parallel_for(0, threads as i64, 1, call, context) };
    assert_eq!(status, 0, "libtorch could not run a kernel on its threads");
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use finetune_kernels::pool::Pool;

    use super::{Threads, rows};

    #[test]
    fn every_unit_runs_once() {
        for units in [0, 1, 2, 7, 1000] {
            let runs: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
            Threads.run(units, &|unit| {
                runs[unit].fetch_add(1, Ordering::Relaxed);
            });
            assert!(runs.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn rows_are_covered_once() {
        let sum = AtomicUsize::new(0);
        rows(1001, 64, &|range| {
            sum.fetch_add(range.sum::<usize>(), Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 1001 * 1000 / 2);
    }
}
