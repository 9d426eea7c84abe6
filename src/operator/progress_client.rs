//! Asks a running trainer for its progress.

use std::time::{Duration, Instant};

use finetune_contract::{
    Progress,
    process::{METRICS_PORT, PROGRESS_PATH},
};

use super::{
    context::Context,
    decide::PROGRESS_INTERVAL,
    observe::{Observed, ObservedPod, PodState},
};
use crate::api::{FineTuneJob, Step};

/// How long a trainer may take to answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// An HTTP client for trainers.
pub(super) struct ProgressClient(reqwest::Client);

impl ProgressClient {
    pub(super) fn new() -> reqwest::Result<Self> {
        // An error means that one is set already, and none but ring is compiled in.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(Self(reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?))
    }

    async fn get(&self, ip: &str) -> Option<Progress> {
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        let url = format!("http://{host}:{METRICS_PORT}{PROGRESS_PATH}");
        let answer = self.0.get(url).send().await;
        let text = answer.ok()?.error_for_status().ok()?.text().await.ok()?;
        finetune_contract::parse(&text).ok()
    }
}

/// Returns the progress of a job, if its trainer runs, was not asked just now, and answers.
pub(super) async fn progress(
    context: &Context,
    job: &FineTuneJob,
    observed: &Observed,
) -> Option<Progress> {
    let ip = trainer_ip(job, observed)?;
    let is_early = context.remember(job, |memory| {
        let is_early = memory.asked.is_some_and(|asked| asked.elapsed() < PROGRESS_INTERVAL);
        if !is_early {
            memory.asked = Some(Instant::now());
        }
        is_early
    });
    if is_early {
        return None;
    }
    let progress = context.progress.get(ip).await?;
    // A pod may answer anything: what is not this run's progress is not believed.
    let plan = job.status.as_ref()?.plan.as_ref()?;
    (progress.run_id.0 == plan.run_id).then_some(progress)
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
