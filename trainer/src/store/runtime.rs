//! The one tokio runtime of the process, behind which every store call blocks.

use std::{future::Future, sync::OnceLock};

use tokio::runtime::{Builder, Runtime};

/// Runs a future to its end on the process-wide runtime.
///
/// # Panics
/// If called from inside async code, which the trainer has none of outside this module.
pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            Builder::new_multi_thread()
                .worker_threads(2)
                .thread_name("store")
                .enable_all()
                .build()
                .expect("two threads and an event queue can be made at process start")
        })
        .block_on(future)
}
