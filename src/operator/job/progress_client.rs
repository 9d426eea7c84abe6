//! Asks running trainers for their progress, beside the reconciliations: an answer causes one.
//!
//! What answers may be any program of a tenant's, or a firewall that drops packets. Answers are bounded in
//! size and time, and who does not answer is asked less and less often.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use finetune_api::{FineTuneJob, Step};
use finetune_contract::{
    Progress,
    process::{METRICS_PORT, PROGRESS_PATH},
};
use futures::{Stream, channel::mpsc};
use kube::runtime::reflector::ObjectRef;
use tokio::sync::Semaphore;

use super::{
    decide::PROGRESS_INTERVAL,
    observe::{Observed, ObservedPod, PodState},
};

/// How long a trainer may take to answer.
const TIMEOUT: Duration = Duration::from_secs(3);
/// The longest answer, in bytes; a trainer's has less than one thousand.
const MAX_ANSWER: usize = 64 << 10;
/// Trainers asked at once, at most.
const CONCURRENCY: usize = 32;
/// The longest wait before a trainer that does not answer is asked again.
const MAX_WAIT: Duration = Duration::from_mins(5);

/// An HTTP client that asks each trainer at most every [`PROGRESS_INTERVAL`].
pub(super) struct ProgressClient {
    http: reqwest::Client,
    /// What is known of the trainer of each job, by the job's UID.
    trainers: Arc<Mutex<HashMap<String, Trainer>>>,
    slots: Arc<Semaphore>,
    answered: mpsc::UnboundedSender<ObjectRef<FineTuneJob>>,
    answers: Mutex<Option<mpsc::UnboundedReceiver<ObjectRef<FineTuneJob>>>>,
}

/// What is known of a trainer.
struct Trainer {
    /// The UID of its pod.
    pod: String,
    /// When it was last asked.
    asked: Instant,
    /// How many times in a row it has not answered.
    silences: u32,
    /// Its last answer, until a reconciliation takes it.
    answer: Option<Progress>,
}

impl Trainer {
    /// Returns how long after a question the next one follows: it doubles with each silence.
    fn wait(&self) -> Duration {
        (PROGRESS_INTERVAL * 2_u32.saturating_pow(self.silences.min(16))).min(MAX_WAIT)
    }
}

impl ProgressClient {
    pub(super) fn new() -> reqwest::Result<Self> {
        // Fails if a provider is set already, which can only be ring: no other is compiled in.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        let (answered, answers) = mpsc::unbounded();
        Ok(Self {
            http,
            trainers: Arc::default(),
            slots: Arc::new(Semaphore::new(CONCURRENCY)),
            answered,
            answers: Mutex::new(Some(answers)),
        })
    }

    /// Returns the jobs whose trainers have answered, as they do; empty if called again.
    pub(super) fn answers(&self) -> impl Stream<Item = ObjectRef<FineTuneJob>> + Send + use<> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner).take();
        answers.unwrap_or_else(|| mpsc::unbounded().1)
    }

    /// Takes the answer of a job's trainer if there is one, and asks it again if that is due.
    pub(super) fn take(&self, job: &FineTuneJob, observed: &Observed) -> Option<Progress> {
        let pod = trainer_pod(job, observed)?;
        let uid = job.metadata.uid.clone()?;
        let mut trainers = lock(&self.trainers);
        let known = trainers.get_mut(&uid).filter(|trainer| trainer.pod == pod.uid);
        let answer = if let Some(trainer) = known {
            let answer = believed(job, trainer.answer.take());
            if trainer.asked.elapsed() < trainer.wait() {
                return answer;
            }
            trainer.asked = Instant::now();
            answer
        } else {
            let (pod, asked) = (pod.uid.clone(), Instant::now());
            trainers.insert(uid.clone(), Trainer { pod, asked, silences: 0, answer: None });
            None
        };
        drop(trainers);
        self.ask(job, uid, pod);
        answer
    }

    /// Asks a trainer in a task of its own.
    fn ask(&self, job: &FineTuneJob, uid: String, pod: &ObservedPod) {
        let Some(ip) = &pod.ip else { return };
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
        let url = format!("http://{host}:{METRICS_PORT}{PROGRESS_PATH}");
        let (http, slots, pod) = (self.http.clone(), Arc::clone(&self.slots), pod.uid.clone());
        let (trainers, answered) = (Arc::clone(&self.trainers), self.answered.clone());
        let job = ObjectRef::from_obj(job);
        tokio::spawn(async move {
            let Ok(_slot) = slots.acquire().await else { return };
            let answer = get(&http, &url).await;
            let mut trainers = lock(&trainers);
            let Some(trainer) = trainers.get_mut(&uid).filter(|trainer| trainer.pod == pod) else {
                return;
            };
            trainer.silences = if answer.is_some() { 0 } else { trainer.silences + 1 };
            if answer.is_some() {
                trainer.answer = answer;
                // Fails if the controller has stopped.
                let _ = answered.unbounded_send(job);
            }
        });
    }

    /// Forgets all jobs but those with these UIDs.
    pub(super) fn forget_others(&self, uids: &HashSet<&str>) {
        lock(&self.trainers).retain(|uid, _| uids.contains(uid.as_str()));
    }
}

fn lock(trainers: &Mutex<HashMap<String, Trainer>>) -> MutexGuard<'_, HashMap<String, Trainer>> {
    trainers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns an answer if it is of this run: a pod may answer anything.
fn believed(job: &FineTuneJob, answer: Option<Progress>) -> Option<Progress> {
    let plan = job.status.as_ref()?.plan.as_ref()?;
    answer.filter(|progress| progress.run_id.0 == plan.run_id)
}

/// Reads a progress document, if there is one and it is no longer than [`MAX_ANSWER`].
async fn get(http: &reqwest::Client, url: &str) -> Option<Progress> {
    let mut answer = http.get(url).send().await.ok()?;
    if !answer.status().is_success() {
        return None;
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await.ok()? {
        if bytes.len() + chunk.len() > MAX_ANSWER {
            return None;
        }
        bytes.extend_from_slice(&chunk);
    }
    finetune_contract::parse(std::str::from_utf8(&bytes).ok()?).ok()
}

/// Returns the pod of rank 0, which answers for all ranks.
fn trainer_pod<'a>(job: &FineTuneJob, observed: &'a Observed) -> Option<&'a ObservedPod> {
    let attempt = job.status.as_ref()?.attempt.as_ref()?;
    if attempt.step != Step::Training {
        return None;
    }
    let uid = attempt.job_uid.as_ref()?;
    let is_asked = |pod: &&ObservedPod| {
        pod.job_uid.as_ref() == Some(uid)
            && pod.rank == 0
            && pod.state == PodState::Running
            && !pod.is_deleting
    };
    observed.pods.iter().find(is_asked)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use axum::{Router, body::Body, response::Redirect, routing::get};
    use finetune_contract::{render, testing};
    use futures::stream;

    use super::{MAX_WAIT, PROGRESS_INTERVAL, ProgressClient, Trainer};

    /// Serves answers of several kinds, and returns the address.
    async fn server() -> String {
        let honest = render(&testing::progress());
        let long = format!("{honest}{}", " ".repeat(super::MAX_ANSWER));
        let endless = || async {
            Body::from_stream(stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b' '; 1 << 16])))
        };
        let router = Router::new()
            .route("/honest", get(|| async { honest }))
            .route("/long", get(|| async { long }))
            .route("/endless", get(endless))
            .route("/redirect", get(|| async { Redirect::temporary("/honest") }))
            .route("/other", get(|| async { "{}" }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("http://{address}")
    }

    #[tokio::test]
    async fn only_a_short_answer_at_that_address_is_taken() {
        let (client, server) = (ProgressClient::new().unwrap(), server().await);
        let answer = |path: &str| {
            let (http, url) = (client.http.clone(), format!("{server}{path}"));
            async move { super::get(&http, &url).await }
        };
        assert_eq!(answer("/honest").await, Some(testing::progress()));
        for path in ["/long", "/endless", "/redirect", "/other", "/missing"] {
            assert_eq!(answer(path).await, None, "{path}");
        }
    }

    #[test]
    fn a_silent_trainer_is_asked_less_and_less_often() {
        let wait = |silences| {
            let (pod, asked) = (String::new(), Instant::now());
            Trainer { pod, asked, silences, answer: None }.wait()
        };
        assert_eq!([wait(0), wait(1)], [PROGRESS_INTERVAL, 2 * PROGRESS_INTERVAL]);
        assert_eq!([wait(10), wait(u32::MAX)], [MAX_WAIT; 2]);
    }
}
