//! Serves the progress of the run over HTTP: `/progress` as JSON for the operator, `/metrics` for
//! Prometheus.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
};

use axum::{Router, extract::State, routing::get};
use finetune_contract::{
    FailureReason, Progress, RunConfig, Stage, parse,
    process::{METRICS_PATH, PROGRESS_PATH},
};
use prometheus::{Encoder, Gauge, Opts, Registry, TextEncoder};

use crate::failure::Failure;

/// Serves the latest progress; clones share it.
#[derive(Clone)]
pub struct MetricsServer {
    last: Arc<Mutex<String>>,
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

    /// Replaces the served progress.
    pub fn update(&self, line: &str) {
        line.clone_into(&mut self.last.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn progress(&self) -> String {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
                get(|State(server): State<Self>| async move { server.progress() }),
            )
            .route(METRICS_PATH, get(|State(server): State<Self>| async move { server.metrics() }))
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

    fn metrics(&self) -> String {
        let Ok(progress) = parse::<Progress>(&self.progress()) else { return String::new() };
        self.render(&progress).unwrap_or_default()
    }

    fn render(&self, progress: &Progress) -> prometheus::Result<String> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str, value: Option<f64>| {
            let Some(value) = value else { return Ok(()) };
            let options = Opts::new(format!("finetune_trainer_{name}"), help);
            let gauge = Gauge::with_opts(options.const_label("run_id", self.run_id.clone()))?;
            gauge.set(value);
            registry.register(Box::new(gauge))
        };
        let whole = |number: u64| Some(number as f64);
        gauge("loss", "Mean loss per target token of the last step", progress.loss)?;
        gauge("eval_loss", "Mean loss per target token of the validation set", progress.eval_loss)?;
        gauge("learning_rate", "Learning rate of the last step", progress.learning_rate)?;
        gauge("grad_norm", "2-norm of the gradient before clipping", progress.grad_norm)?;
        gauge("step", "Completed optimizer steps", whole(progress.step))?;
        gauge("total_steps", "Optimizer steps of the whole run", whole(progress.total_steps))?;
        gauge("epoch", "Completed passes over the training data", Some(progress.epoch))?;
        gauge(
            "tokens_per_second",
            "Tokens processed per second, averaged over the last steps",
            progress.tokens_per_second,
        )?;
        let tokens = Opts::new("finetune_trainer_tokens_total", "Tokens processed so far");
        let tokens =
            prometheus::Counter::with_opts(tokens.const_label("run_id", self.run_id.clone()))?;
        tokens.inc_by(progress.tokens_seen as f64);
        registry.register(Box::new(tokens))?;
        gauge(
            "eta_seconds",
            "Estimated seconds until the last step",
            progress.eta_seconds.map(|seconds| seconds as f64),
        )?;
        gauge(
            "memory_peak_bytes",
            "Peak anonymous memory of the process, or peak memory of its GPU",
            whole(progress.peak_memory_bytes),
        )?;
        gauge(
            "memory_predicted_bytes",
            "Peak memory as predicted by the plan",
            whole(self.predicted_bytes),
        )?;
        gauge(
            "checkpoint_step",
            "Step of the newest checkpoint",
            progress.checkpoint_step.map(|step| step as f64),
        )?;
        gauge(
            "checkpoint_stall_seconds",
            "Seconds that training was paused for the newest checkpoint",
            progress.checkpoint_stall_seconds,
        )?;
        gauge(
            "checkpoint_write_seconds",
            "Seconds that writing the newest checkpoint took in the background",
            progress.checkpoint_write_seconds,
        )?;
        let stages = prometheus::GaugeVec::new(
            Opts::new(
                "finetune_trainer_stage",
                "1 for the current stage of the trainer, 0 for the others",
            )
            .const_label("run_id", self.run_id.clone()),
            &["stage"],
        )?;
        for stage in STAGES {
            let is_now = if stage == progress.stage { 1.0 } else { 0.0 };
            stages.with_label_values(&[&format!("{stage:?}")]).set(is_now);
        }
        registry.register(Box::new(stages))?;
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

const STAGES: [Stage; 7] = [
    Stage::Fetching,
    Stage::Loading,
    Stage::Training,
    Stage::Evaluating,
    Stage::Exporting,
    Stage::Publishing,
    Stage::Verifying,
];

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use finetune_contract::{CONTRACT_VERSION, Progress, RunId, Stage, parse, render};

    use super::MetricsServer;

    fn get(port: u16, path: &str) -> String {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: trainer\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    #[test]
    fn serves_the_last_line_and_its_figures() {
        let server = MetricsServer {
            last: std::sync::Arc::default(),
            run_id: "a-1".to_owned(),
            predicted_bytes: 7,
        };
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        server.start(([127, 0, 0, 1], port).into()).unwrap();
        assert_eq!(get(port, "/metrics"), "", "no progress yet");
        let progress = Progress {
            version: CONTRACT_VERSION,
            run_id: RunId("a-1".to_owned()),
            stage: Stage::Training,
            step: 3,
            total_steps: 10,
            epoch: 0.5,
            loss: Some(2.5),
            eval_loss: None,
            learning_rate: Some(1e-4),
            grad_norm: Some(1.0),
            tokens_per_second: Some(400.0),
            tokens_seen: 3000,
            eta_seconds: Some(12),
            peak_memory_bytes: 5,
            checkpoint_step: Some(2),
            checkpoint_stall_seconds: Some(0.25),
            checkpoint_write_seconds: Some(1.5),
            resumed_from_step: None,
        };
        server.update(&render(&progress));
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
