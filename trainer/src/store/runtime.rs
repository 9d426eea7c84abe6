//! The tokio runtime of the process, on which all store requests run.

use std::{future::Future, sync::OnceLock};

use tokio::runtime::{Builder, Runtime};

/// Runs a future on the runtime and blocks until it completes.
///
/// # Panics
/// If called from async code, which the trainer has only in this module.
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
