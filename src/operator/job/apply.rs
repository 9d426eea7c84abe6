//! Carries out the actions of a decision.

use finetune_api::FineTuneJob;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, Resource, ResourceExt,
    api::{DeleteParams, PostParams, Preconditions},
    core::NamespaceResourceScope,
    runtime::watcher,
};
use tracing::{info, warn};

use super::{
    build::names::JOB_LABEL,
    context::{Context, ReconcileError},
    decide::Action,
    observe::controller,
};

/// Answers by which the apiserver refuses an object.
const REFUSALS: [u16; 3] = [400, 403, 422];

/// Carries out one action.
pub(super) async fn apply(
    context: &Context,
    parent: &FineTuneJob,
    action: Action,
) -> Result<(), ReconcileError> {
    let namespace = parent.namespace().unwrap_or_default();
    match action {
        Action::CreateService(service) => {
            create(context, parent, &*service, "create the Service of ranks").await?;
        }
        Action::CreateNetworkPolicy(policy) => {
            create(context, parent, &*policy, "create the NetworkPolicy of ranks").await?;
        }
        Action::CreateJob(job) => {
            let name = job.name_any();
            let found = create(context, parent, &*job, "create a Job").await?;
            let created = found.is_new.then(|| found.object.uid()).flatten();
            context.remember(parent, |memory| {
                memory.refusal = None;
                memory.created = created.or(memory.created.take());
            });
            if found.is_new {
                info!(namespace, name, "created the Job of an attempt");
            }
            context.children.take_job(watcher::Event::Apply(found.object));
        }
        Action::DeleteJob { name, uid } => {
            // In the foreground: the Job stays in sight until its pods are gone.
            let parameters = DeleteParams::foreground();
            delete::<Job>(context, &namespace, &name, Some(uid), parameters, "delete a Job")
                .await?;
            info!(namespace, name, "deleting the Job of an attempt");
        }
        Action::DeletePod { name, uid } => {
            let parameters = DeleteParams::default();
            delete::<Pod>(context, &namespace, &name, Some(uid), parameters, "delete a pod")
                .await?;
            info!(namespace, name, "deleting a pod that has no Job, or waits for a lost rank");
        }
        Action::ForceDeletePod { name, uid } => {
            let parameters = DeleteParams::default().grace_period(0);
            let action = "delete a pod of a lost node";
            delete::<Pod>(context, &namespace, &name, Some(uid), parameters, action).await?;
            warn!(namespace, name, "deleted a pod by force, because its node does not answer");
        }
        Action::DeleteSelf => {
            let (name, uid) = (parent.name_any(), parent.metadata.uid.clone());
            let parameters = DeleteParams::background();
            let action = "delete the job after its time";
            delete::<FineTuneJob>(context, &namespace, &name, uid, parameters, action).await?;
            info!(namespace, name, "deleting a finished job after its ttlSecondsAfterFinished");
        }
    }
    Ok(())
}

/// An object that was created, or that existed.
struct Found<K> {
    object: K,
    is_new: bool,
}

/// Creates an object of a job, or finds the one created before.
async fn create<K>(
    context: &Context,
    parent: &FineTuneJob,
    object: &K,
    action: &'static str,
) -> Result<Found<K>, ReconcileError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + serde::Serialize
        + serde::de::DeserializeOwned
        + Clone
        + std::fmt::Debug,
{
    let namespace = parent.namespace().unwrap_or_default();
    let api: Api<K> = Api::namespaced(context.client.clone(), &namespace);
    let name = object.name_any();
    let mut is_new = true;
    let created = match api.create(&PostParams::default(), object).await {
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
            is_new = false;
            api.get(&name).await
        }
        created => created,
    };
    if let Err(kube::Error::Api(status)) = &created
        && REFUSALS.contains(&status.code)
    {
        // The next reconciliation writes it into the status.
        let refusal = Some(status.message.clone());
        context.remember(parent, |memory| memory.refusal = refusal);
    }
    let created = created.map_err(ReconcileError::api(action))?;
    let owner = controller(created.owner_references()).map(|owner| &owner.uid);
    // Without the label, no watch would bring what becomes of it.
    let is_labelled = created.labels().get(JOB_LABEL) == Some(&parent.name_any());
    if owner != parent.metadata.uid.as_ref() || !is_labelled {
        let error = ReconcileError::NameTaken { kind: K::kind(&()).into_owned(), name };
        let refusal = Some(error.to_string());
        context.remember(parent, |memory| memory.refusal = refusal);
        return Err(error);
    }
    Ok(Found { object: created, is_new })
}

/// Deletes the object with that UID; if there is none, it is deleted already.
async fn delete<K>(
    context: &Context,
    namespace: &str,
    name: &str,
    uid: Option<String>,
    parameters: DeleteParams,
    action: &'static str,
) -> Result<(), ReconcileError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + serde::de::DeserializeOwned
        + Clone
        + std::fmt::Debug,
{
    let api: Api<K> = Api::namespaced(context.client.clone(), namespace);
    let parameters = parameters.preconditions(Preconditions { uid, resource_version: None });
    match api.delete(name, &parameters).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        // Another object has that name: ours is gone.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(ReconcileError::api(action)(error)),
    }
}
