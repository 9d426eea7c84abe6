//! The operator killed before and after every write of a job's life: always the same end.
//!
//! It runs in this process, on the real cluster; a layer in front of its client counts writes and
//! stops the world at the one a test names.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
};

use finetune_operator::operator::{
    job::controller::Operator, runtime::metrics::Metrics, settings::Settings,
};
use futures::StreamExt;
use http::{Method, Request, Response};
use k8s_openapi::api::batch::v1::Job;
use kube::{
    Client, Config, ResourceExt,
    api::ListParams,
    client::{Body, ClientBuilder},
};
use tokio::sync::Notify;
use tower::{BoxError, Layer, Service};

use crate::test_namespace::TestNamespace;

/// Writes of a job's whole life, at most.
const WRITES_MAX: u32 = 12;
/// Lives at once: as many as the node has room for.
const AT_ONCE: usize = 4;

/// Where a life is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Crash {
    Never,
    Before(u32),
    After(u32),
}

/// Counts writes, and ends at one of them.
#[derive(Clone)]
struct Faults {
    crash: Crash,
    writes: Arc<AtomicU32>,
    crashed: Arc<Notify>,
}

#[derive(Clone)]
struct Faulty<S> {
    inner: S,
    faults: Faults,
}

impl<S> Layer<S> for Faults {
    type Service = Faulty<S>;

    fn layer(&self, inner: S) -> Faulty<S> {
        Faulty { inner, faults: self.clone() }
    }
}

impl<S, B> Service<Request<Body>> for Faulty<S>
where
    S: Service<Request<Body>, Response = Response<B>, Error = BoxError>,
    S::Future: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.method() == Method::GET {
            return Box::pin(self.inner.call(request));
        }
        let number = self.faults.writes.fetch_add(1, Ordering::SeqCst) + 1;
        let Faults { crash, crashed, .. } = self.faults.clone();
        let is_past = match crash {
            Crash::Never => false,
            Crash::Before(at) => number >= at,
            Crash::After(at) => number > at,
        };
        if is_past {
            crashed.notify_one();
            return Box::pin(std::future::pending());
        }
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            if crash == Crash::After(number) {
                crashed.notify_one();
                std::future::pending::<()>().await;
            }
            answer
        })
    }
}

fn settings(namespace: &str) -> Settings {
    let image = std::env::var("FINETUNE_TEST_TRAINER_IMAGE").unwrap();
    let endpoint = std::env::var("FINETUNE_TEST_S3_ENDPOINT").unwrap();
    Settings::parse(&format!(
        "trainerImage: {image}\nimagePullPolicy: Never\nnamespaces: [{namespace}]\npreflight: {{cpu: 0.2, memoryGiB: 0.5, storageGiB: 1}}\nterminationGracePeriodSeconds: 10\naccelerators: [{{name: cpu, cpu: 0.2, memoryGiB: 2, bf16Tflops: 0.4, fp32Tflops: 0.2, hasBf16: true}}]\nenvironment: {{AWS_ENDPOINT_URL: '{endpoint}', AWS_ALLOW_HTTP: 'true', AWS_REGION: us-east-1}}\n"
    ))
    .unwrap()
}

/// Starts an operator of one namespace; it ends when the task is aborted.
async fn start(namespace: &str, faults: &Faults) -> tokio::task::JoinHandle<()> {
    let config = Config::infer().await.unwrap();
    let client: Client = ClientBuilder::try_from(config).unwrap().with_layer(faults).build();
    let metrics = Metrics::new().unwrap();
    let scope = Some(namespace.to_owned());
    let operator = Operator::new(client, settings(namespace), metrics, "test", scope).unwrap();
    tokio::spawn(Arc::new(operator).run(std::future::pending()))
}

/// Lives one job's life with a crash in it; returns the number of writes of the first operator.
async fn live(name: &str, crash: Crash) -> u32 {
    let test = TestNamespace::new(&format!("crash-{name}")).await.unwrap();
    let faults = Faults { crash, writes: Arc::default(), crashed: Arc::default() };
    let first = start(&test.namespace, &faults).await;
    test.apply(&test.job("job")).await;
    let mut second = None;
    if crash == Crash::Never {
        test.wait("job", "True Succeeded").await;
    } else {
        tokio::select! {
            () = faults.crashed.notified() => {}
            () = test.wait("job", "True Succeeded") => {
                // The last write is an event: all that matters was written.
            }
        }
        first.abort();
        let never = Faults { crash: Crash::Never, writes: Arc::default(), crashed: Arc::default() };
        second = Some(start(&test.namespace, &never).await);
        test.wait("job", "True Succeeded").await;
    }
    let mut jobs: Vec<String> = test
        .children
        .list(&ListParams::default())
        .await
        .unwrap()
        .iter()
        .map(Job::name_any)
        .collect();
    jobs.sort();
    assert_eq!(jobs, ["job-0", "job-check-0"], "{crash:?}: one Job a step, whatever happened");
    let attempt = test.status("job").await.attempt.unwrap();
    assert_eq!((attempt.number, attempt.failures, attempt.disruptions), (0, 0, 0), "{crash:?}");
    // Events come last.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let writes = faults.writes.load(Ordering::SeqCst);
    if crash == Crash::Never {
        // Nothing is due: a finished job is not looked at again.
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
        assert_eq!(faults.writes.load(Ordering::SeqCst), writes, "an idle operator writes nothing");
    }
    first.abort();
    if let Some(second) = second {
        second.abort();
    }
    writes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_operator_changes_nothing_in_the_end() {
    if TestNamespace::new("crashes").await.is_none() {
        return;
    }
    let writes = live("never", Crash::Never).await;
    eprintln!("a job's life took {writes} writes");
    assert!(writes <= WRITES_MAX, "{writes} writes");
    let crashes = (1..=writes).flat_map(|at| [Crash::Before(at), Crash::After(at)]);
    let lives = crashes.enumerate().map(|(index, crash)| async move {
        live(&index.to_string(), crash).await;
    });
    futures::stream::iter(lives).buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
}
