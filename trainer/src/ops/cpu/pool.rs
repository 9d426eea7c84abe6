//! Runs our kernels on libtorch's threads: a second pool would compete for the same CPU cores.

use std::{
    ffi::c_void,
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use finetune_kernels::pool::Pool;

/// libtorch's thread pool.
pub(super) struct Threads;

impl Pool for Threads {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1).min(count);
        if threads <= 1 {
            (0..count).for_each(task);
            return;
        }
        // Tasks differ in length, so an idle thread takes the next one.
        let next = AtomicUsize::new(0);
        parallel_for(threads, &|_| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                task(index);
            }
        });
    }
}

/// Divides rows into chunks of about `chunk` rows and calls `task` with each.
pub(super) fn for_each_chunk(rows: usize, chunk: usize, task: &(dyn Fn(Range<usize>) + Sync)) {
    let chunk = chunk.max(1);
    Threads.run(rows.div_ceil(chunk), &|index| {
        task(index * chunk..rows.min((index + 1) * chunk));
    });
}

/// Calls `task` once on each of `threads` threads.
fn parallel_for(threads: usize, task: &(dyn Fn(usize) + Sync)) {
    /// Passes a part of the range to the closure that `context` points to.
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

    use super::{Threads, for_each_chunk};

    #[test]
    fn every_task_runs_once() {
        for count in [0, 1, 2, 7, 1000] {
            let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            Threads.run(count, &|index| {
                runs[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(runs.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn rows_are_covered_once() {
        let sum = AtomicUsize::new(0);
        for_each_chunk(1001, 64, &|range| {
            sum.fetch_add(range.sum::<usize>(), Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 1001 * 1000 / 2);
    }
}
