//! One reconciliation of one job: observe, decide, write the status, emit events, apply.

use std::{panic::AssertUnwindSafe, time::Duration};

use finetune_api::{FineTuneJob, FineTuneJobStatus};
use futures::FutureExt;
use kube::{Api, ResourceExt, api::PostParams, runtime::controller};

use super::{
    accounting, apply,
    context::{Context, ReconcileError},
    decide::{Decision, decide},
    events, late_pods,
    observe::Observed,
    pod_refusals,
};

/// How long a reconciliation may take.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Reconciles one job, and counts how it went.
pub(super) async fn reconcile(
    context: &Context,
    job: &FineTuneJob,
) -> Result<controller::Action, ReconcileError> {
    context.children.ready().await;
    let _active = context.metrics.reconciling();
    let reconciled = contain(TIMEOUT, reconcile_once(context, job)).await;
    let result = match &reconciled {
        Ok(_) => {
            context.remember(job, |memory| memory.failures = 0);
            "success"
        }
        Err(error) if error.is_conflict() => "conflict",
        Err(_) => "error",
    };
    context.metrics.reconciles.with_label_values(&[result]).inc();
    reconciled
}

/// Ends a reconciliation that panics or takes too long with an error: other jobs are reconciled on.
async fn contain<T>(
    limit: Duration,
    reconciliation: impl Future<Output = Result<T, ReconcileError>>,
) -> Result<T, ReconcileError> {
    // What reconciliations share is behind mutexes, whole between statements.
    let contained = AssertUnwindSafe(reconciliation).catch_unwind();
    match tokio::time::timeout(limit, contained).await {
        Ok(Ok(reconciled)) => reconciled,
        Ok(Err(panic)) => {
            let message = panic.downcast_ref::<&str>().copied().map(str::to_owned);
            let message = message.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(ReconcileError::Panicked(message.unwrap_or_default()))
        }
        Err(_) => Err(ReconcileError::TimedOut(limit)),
    }
}

async fn reconcile_once(
    context: &Context,
    job: &FineTuneJob,
) -> Result<controller::Action, ReconcileError> {
    if job.metadata.deletion_timestamp.is_some() {
        // Its Jobs and their pods are deleted with it: they are owned.
        return Ok(controller::Action::await_change());
    }
    let version = job.resource_version();
    if context.remember(job, |memory| memory.replaced.is_some() && memory.replaced == version) {
        return Ok(controller::Action::await_change());
    }

    let now = (context.clock)();
    let mut observed = observe(context, job);
    late_pods::read(context, job, &mut observed).await?;
    observed.pods_refused = pod_refusals::newest(context, job, &observed, now).await;
    let decision = decide(job, &observed, &context.settings, now);

    let Decision { status, actions, events, requeue_after } = decision;
    if job.status.as_ref() != Some(&status) {
        // A plan is stored before a pod of it exists.
        write_status(context, job, &status).await?;
        accounting::count_changes(context, job, &status);
        // Before the actions: if one fails, the next reconciliation finds the status written.
        for event in events {
            events::emit(context, job, event).await;
        }
    }
    for action in actions {
        apply::apply(context, job, action).await?;
    }
    Ok(requeue_after.map_or_else(controller::Action::await_change, controller::Action::requeue))
}

fn observe(context: &Context, job: &FineTuneJob) -> Observed {
    let (namespace, name) = (job.namespace().unwrap_or_default(), job.name_any());
    let uid = job.metadata.uid.as_deref().unwrap_or_default();
    let mut observed = context.children.of(&namespace, &name, uid);
    observed.progress = context.progress.take(job, &observed);
    (observed.refusal, observed.created) =
        context.remember(job, |memory| (memory.refusal.clone(), memory.created.clone()));
    observed
}

async fn write_status(
    context: &Context,
    job: &FineTuneJob,
    status: &FineTuneJobStatus,
) -> Result<(), ReconcileError> {
    let mut next = job.clone();
    next.status = Some(status.clone());
    let namespace = job.namespace().unwrap_or_default();
    let api: Api<FineTuneJob> = Api::namespaced(context.client.clone(), &namespace);
    // The object carries the version that was read: a newer one makes this fail.
    let written = api
        .replace_status(&job.name_any(), &PostParams::default(), &next)
        .await
        .map_err(ReconcileError::api("write the status"))?;
    // Under an older CRD the apiserver drops new fields: if that left nothing to change, the version
    // stays, and no watch will bring another.
    let has_changed = written.resource_version() != job.resource_version();
    let replaced = job.resource_version().filter(|_| has_changed);
    context.remember(job, |memory| memory.replaced = replaced);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{hint::black_box, time::Duration};

    use super::{ReconcileError, contain, write_status};
    use crate::operator::job::testing::World;

    const LIMIT: Duration = Duration::from_mins(1);

    #[tokio::test]
    async fn a_panic_is_an_error_of_its_job() {
        let panics = async { if black_box(true) { panic!("bug {}", 1) } else { Ok(()) } };
        let error = contain(LIMIT, panics).await.unwrap_err();
        assert_eq!(error.to_string(), "the reconciliation panicked, which is a bug: bug 1");
        assert!(contain(LIMIT, async { Ok(1) }).await.is_ok_and(|result| result == 1));
    }

    #[tokio::test]
    async fn a_reconciliation_that_hangs_ends() {
        let hangs = std::future::pending::<Result<(), ReconcileError>>();
        let error = contain(Duration::from_millis(1), hangs).await.unwrap_err();
        assert!(matches!(error, ReconcileError::TimedOut(_)), "{error}");
    }

    #[tokio::test]
    async fn a_write_that_changed_nothing_does_not_stop_a_job() {
        let mut world = World::new("  loraConfig: {}\n");
        world.job.metadata.resource_version = Some("7".to_owned());
        let status = world.decide().status;
        // Under an older CRD the apiserver drops what is new, and nothing is left to change.
        for (version, replaced) in [("7", None), ("8", Some("7"))] {
            let mut written = world.job.clone();
            written.metadata.resource_version = Some(version.to_owned());
            let written = serde_json::to_value(written).unwrap();
            let context = world.context(move |_| written.clone());
            write_status(&context, &world.job, &status).await.unwrap();
            let found = context.remember(&world.job, |memory| memory.replaced.clone());
            assert_eq!(found.as_deref(), replaced, "written as version {version}");
        }
    }
}
