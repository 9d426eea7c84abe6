//! Serves the progress of the run over HTTP: `/progress` as JSON for the operator, `/metrics` for
//! Prometheus.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
};

use axum::{Router, extract::State, routing::get};
use finetune_contract::{
    FailureReason, Progress, RunConfig,
    process::{METRICS_PATH, PROGRESS_PATH},
    render,
};

use crate::{
    failure::Failure,
    metrics::{prometheus, sink::Sink},
};

/// Serves the latest progress; clones share it.
#[derive(Clone)]
pub struct MetricsServer {
    last: Arc<Mutex<Option<Progress>>>,
    run_id: String,
    predicted_bytes: u64,
}

impl MetricsServer {
    /// Creates a server without any progress yet.
    pub fn new(config: &RunConfig) -> Self {
        Self {
            last: Arc::default(),
            run_id: config.run_id.0.clone(),
            predicted_bytes: config.predicted_peak_bytes,
        }
    }

    /// Starts serving from a thread of its own, which runs until the process exits.
    ///
    /// # Errors
    /// [`Failure`] if the server cannot listen on the address.
    pub fn start(&self, address: SocketAddr) -> Result<(), Failure> {
        let cannot_listen = |error: &std::io::Error| {
            Failure::new(
                FailureReason::InvalidConfiguration,
                format!(
                    "cannot listen on {address}: {error}: choose another address with --listen"
                ),
            )
        };
        let listener = TcpListener::bind(address).map_err(|error| cannot_listen(&error))?;
        listener.set_nonblocking(true).map_err(|error| cannot_listen(&error))?;
        let router = Router::new()
            .route(
                PROGRESS_PATH,
                get(|State(server): State<Self>| async move { server.progress_json() }),
            )
            .route(
                METRICS_PATH,
                get(|State(server): State<Self>| async move { server.metrics_text() }),
            )
            .with_state(self.clone());
        let serve = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await
            })
        };
        let thread = std::thread::Builder::new().name("metrics".to_owned());
        thread
            .spawn(move || {
                if let Err(error) = serve() {
                    tracing::warn!(%error, "the metrics server stopped: progress is no longer served");
                }
            })
            .map_err(|error| cannot_listen(&error))?;
        Ok(())
    }

    fn replace(&self, progress: &Progress) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress.clone());
    }

    fn last(&self) -> Option<Progress> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the latest progress as JSON; an empty text before any.
    fn progress_json(&self) -> String {
        self.last().as_ref().map(render).unwrap_or_default()
    }

    /// Returns the latest progress as metrics of Prometheus; an empty text before any.
    fn metrics_text(&self) -> String {
        let Some(progress) = self.last() else { return String::new() };
        prometheus::render(&progress, &self.run_id, self.predicted_bytes).unwrap_or_default()
    }
}

impl Sink for MetricsServer {
    fn record_stage(&mut self, progress: &Progress) {
        self.replace(progress);
    }

    fn record_metrics(&mut self, progress: &Progress) {
        self.replace(progress);
    }

    /// Does nothing: only the latest progress is served.
    fn resume(&mut self, _step: u64) {}
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use finetune_contract::{Progress, parse, testing};

    use super::MetricsServer;
    use crate::metrics::sink::Sink;

    fn get(port: u16, path: &str) -> String {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: trainer\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    #[test]
    fn serves_the_last_progress_and_its_figures() {
        let mut server = MetricsServer {
            last: std::sync::Arc::default(),
            run_id: "a-1".to_owned(),
            predicted_bytes: 7,
        };
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        server.start(([127, 0, 0, 1], port).into()).unwrap();
        assert_eq!(get(port, "/metrics"), "", "no progress yet");
        let progress = Progress {
            step: 3,
            loss: Some(2.5),
            checkpoint_stall_seconds: Some(0.25),
            checkpoint_write_seconds: Some(1.5),
            ..testing::progress()
        };
        server.record_metrics(&progress);
        assert_eq!(parse::<Progress>(&get(port, "/progress")).unwrap(), progress);
        let metrics = get(port, "/metrics");
        for line in [
            "finetune_trainer_loss{run_id=\"a-1\"} 2.5",
            "finetune_trainer_step{run_id=\"a-1\"} 3",
            "finetune_trainer_memory_predicted_bytes{run_id=\"a-1\"} 7",
            "finetune_trainer_checkpoint_stall_seconds{run_id=\"a-1\"} 0.25",
            "finetune_trainer_checkpoint_write_seconds{run_id=\"a-1\"} 1.5",
            "finetune_trainer_stage{run_id=\"a-1\",stage=\"Training\"} 1",
            "finetune_trainer_stage{run_id=\"a-1\",stage=\"Loading\"} 0",
        ] {
            assert!(metrics.contains(line), "{line} is not in {metrics}");
        }
        assert!(!metrics.contains("eval_loss"), "an unknown value is absent: {metrics}");
    }
}
