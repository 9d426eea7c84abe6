//! How far the run is, over HTTP: `/progress` as JSON for the operator, `/metrics` for Prometheus.

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

/// What was last told, as it is served.
#[derive(Clone)]
pub struct Board {
    last: Arc<Mutex<String>>,
    run_id: String,
    predicted_bytes: u64,
}

impl Board {
    /// Makes a board with nothing on it.
    pub fn new(config: &RunConfig) -> Self {
        Self {
            last: Arc::default(),
            run_id: config.run_id.0.clone(),
            predicted_bytes: config.predicted_peak_bytes,
        }
    }

    /// Puts up a line of progress.
    pub fn put(&self, line: &str) {
        line.clone_into(&mut self.last.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn progress(&self) -> String {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Serves the board from a thread of its own until the process ends.
    ///
    /// # Errors
    /// [`Failure`] if the address cannot be listened on.
    pub fn serve(&self, address: SocketAddr) -> Result<(), Failure> {
        let cannot = |error: &std::io::Error| {
            Failure::new(
                FailureReason::InvalidConfiguration,
                format!(
                    "cannot listen on {address}: {error}: choose another address with --listen"
                ),
            )
        };
        let listener = TcpListener::bind(address).map_err(|error| cannot(&error))?;
        listener.set_nonblocking(true).map_err(|error| cannot(&error))?;
        let router = Router::new()
            .route(PROGRESS_PATH, get(|State(board): State<Self>| async move { board.progress() }))
            .route(METRICS_PATH, get(|State(board): State<Self>| async move { board.metrics() }))
            .with_state(self.clone());
        let serve = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await
            })
        };
        let thread = std::thread::Builder::new().name("board".to_owned());
        thread
            .spawn(move || {
                if let Err(error) = serve() {
                    tracing::warn!(%error, "progress is no longer served");
                }
            })
            .map_err(|error| cannot(&error))?;
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
        gauge("grad_norm", "The gradient's 2-norm before clipping", progress.grad_norm)?;
        gauge("step", "Optimizer steps done", whole(progress.step))?;
        gauge("total_steps", "Optimizer steps of the whole run", whole(progress.total_steps))?;
        gauge("epoch", "Passes over the data done", Some(progress.epoch))?;
        gauge(
            "tokens_per_second",
            "Positions per second over the last steps",
            progress.tokens_per_second,
        )?;
        let tokens = Opts::new("finetune_trainer_tokens_total", "Positions trained on so far");
        let tokens =
            prometheus::Counter::with_opts(tokens.const_label("run_id", self.run_id.clone()))?;
        tokens.inc_by(progress.tokens_seen as f64);
        registry.register(Box::new(tokens))?;
        gauge(
            "eta_seconds",
            "Seconds until the last step, estimated",
            progress.eta_seconds.map(|seconds| seconds as f64),
        )?;
        gauge(
            "memory_peak_bytes",
            "The largest anonymous memory of the process so far",
            whole(progress.peak_memory_bytes),
        )?;
        gauge(
            "memory_predicted_bytes",
            "The plan's prediction of it",
            whole(self.predicted_bytes),
        )?;
        gauge(
            "checkpoint_step",
            "The step of the newest checkpoint",
            progress.checkpoint_step.map(|step| step as f64),
        )?;
        gauge(
            "checkpoint_stall_seconds",
            "Seconds training stood still for the newest checkpoint",
            progress.checkpoint_stall_seconds,
        )?;
        gauge(
            "checkpoint_write_seconds",
            "Seconds the newest checkpoint was being written beside training",
            progress.checkpoint_write_seconds,
        )?;
        let stages = prometheus::GaugeVec::new(
            Opts::new("finetune_trainer_stage", "1 for what the trainer is doing")
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

    use super::Board;

    fn ask(port: u16, path: &str) -> String {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: board\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    #[test]
    fn serves_the_last_line_and_its_figures() {
        let board =
            Board { last: std::sync::Arc::default(), run_id: "a-1".to_owned(), predicted_bytes: 7 };
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        board.serve(([127, 0, 0, 1], port).into()).unwrap();
        assert_eq!(ask(port, "/metrics"), "", "nothing was told yet");
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
        board.put(&render(&progress));
        assert_eq!(parse::<Progress>(&ask(port, "/progress")).unwrap(), progress);
        let metrics = ask(port, "/metrics");
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
        assert!(!metrics.contains("eval_loss"), "what is not known is not told: {metrics}");
    }
}
