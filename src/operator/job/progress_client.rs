//! Asks running trainers for their progress.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use finetune_api::{FineTuneJob, Step};
use finetune_contract::{
    Progress,
    process::{METRICS_PORT, PROGRESS_PATH},
};

use super::{
    decide::PROGRESS_INTERVAL,
    observe::{Observed, ObservedPod, PodState},
};

/// How long a trainer may take to answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// An HTTP client that asks each trainer at most every [`PROGRESS_INTERVAL`].
pub(super) struct ProgressClient {
    http: reqwest::Client,
    /// When the trainer of a job was last asked, by the job's UID.
    asked: Mutex<HashMap<String, Instant>>,
}

impl ProgressClient {
    pub(super) fn new() -> reqwest::Result<Self> {
        // Fails if a provider is set already, which can only be ring: no other is compiled in.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?;
        Ok(Self { http, asked: Mutex::default() })
    }

    /// Returns the progress of a job, if its trainer runs, was not asked just now, and answers.
    pub(super) async fn progress(
        &self,
        job: &FineTuneJob,
        observed: &Observed,
    ) -> Option<Progress> {
        let ip = trainer_ip(job, observed)?;
        if !self.is_due(job) {
            return None;
        }
        let progress = self.get(ip).await?;
        // A pod may answer anything: what is not this run's progress is not believed.
        let plan = job.status.as_ref()?.plan.as_ref()?;
        (progress.run_id.0 == plan.run_id).then_some(progress)
    }

    fn is_due(&self, job: &FineTuneJob) -> bool {
        let uid = job.metadata.uid.clone().unwrap_or_default();
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = asked.get(&uid).is_none_or(|last| last.elapsed() >= PROGRESS_INTERVAL);
        if is_due {
            asked.insert(uid, Instant::now());
        }
        is_due
    }

    async fn get(&self, ip: &str) -> Option<Progress> {
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        let url = format!("http://{host}:{METRICS_PORT}{PROGRESS_PATH}");
        let answer = self.http.get(url).send().await;
        let text = answer.ok()?.error_for_status().ok()?.text().await.ok()?;
        finetune_contract::parse(&text).ok()
    }

    /// Forgets all jobs but those with these UIDs.
    pub(super) fn forget_others(&self, uids: &HashSet<&str>) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.retain(|uid, _| uids.contains(uid.as_str()));
    }
}

/// Returns the address of rank 0, which answers for all ranks.
fn trainer_ip<'a>(job: &FineTuneJob, observed: &'a Observed) -> Option<&'a str> {
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
    observed.pods.iter().find(is_asked)?.ip.as_deref()
}
