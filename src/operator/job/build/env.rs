//! The environment of a trainer, and the Secrets it has.

use finetune_api::{FineTuneJob, FineTuneJobSpec, SecretRef};
use finetune_contract::{
    Parallelism, Role,
    process::environment::{
        ALLOWED_ENDPOINTS, GOMP_SPINCOUNT, MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS, WORLD_SIZE,
    },
};
use finetune_plan::accelerators::Accelerator;
use k8s_openapi::api::core::v1::{
    ConfigMapKeySelector, EnvFromSource, EnvVar, EnvVarSource, SecretEnvSource, SecretKeySelector,
};

use super::{
    Attempt,
    names::{WORK_DIRECTORY, job_name, ranks_name},
};
use crate::operator::settings::Settings;

/// Where rank 0 brings the ranks together; torch's own default.
const RENDEZVOUS_PORT: u16 = 29500;

/// The environment: the administrator's, then the user's, then what must be as it is.
pub(super) fn variables(
    job: &FineTuneJob,
    settings: &Settings,
    attempt: &Attempt<'_>,
    template: &finetune_api::PodTemplate,
) -> Vec<EnvVar> {
    let plain = |name: &str, value: &str| EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        value_from: None,
    };
    let Parallelism { world_size, local_world_size, .. } = attempt.parallelism;
    let cpu_millis = attempt.pod_size(settings).cpu_millis as u64;
    let cores = cpu_millis.div_ceil(1000 * u64::from(local_world_size));
    let mut own = vec![
        plain("HOME", WORK_DIRECTORY),
        plain(OMP_NUM_THREADS, &cores.to_string()),
        plain(GOMP_SPINCOUNT.0, GOMP_SPINCOUNT.1),
    ];
    if attempt.accelerator().is_some_and(Accelerator::is_device) {
        // Avoids fragmentation when the sizes of micro-batches vary.
        own.push(plain("PYTORCH_ALLOC_CONF", "expandable_segments:True"));
    }
    if attempt.parallelism.places() > 1 {
        // Kubernetes tells a pod of an Indexed Job which rank it is.
        own.push(plain(WORLD_SIZE, &world_size.to_string()));
        own.push(plain(MASTER_ADDR, &first_rank(job, attempt)));
        own.push(plain(MASTER_PORT, &RENDEZVOUS_PORT.to_string()));
    }
    if !settings.allowed_endpoints.is_empty() {
        own.push(plain(ALLOWED_ENDPOINTS, &settings.allowed_endpoints.join(",")));
    }
    let administrators =
        settings.environment.iter().map(|(name, value)| plain(name, value)).collect::<Vec<_>>();
    let users = template.env.iter().flatten().map(|variable| EnvVar {
        name: variable.name.clone(),
        value: variable.value.clone(),
        value_from: (variable.value.is_none()).then(|| EnvVarSource {
            secret_key_ref: variable.secret_key_ref.as_ref().map(|key| SecretKeySelector {
                name: key.name.clone(),
                key: key.key.clone(),
                optional: None,
            }),
            config_map_key_ref: variable.config_map_key_ref.as_ref().map(|key| {
                ConfigMapKeySelector {
                    name: key.name.clone(),
                    key: key.key.clone(),
                    optional: None,
                }
            }),
            ..EnvVarSource::default()
        }),
    });
    // One value a name: what comes later wins.
    let mut variables: Vec<EnvVar> = Vec::new();
    for variable in administrators.into_iter().chain(users).chain(own) {
        variables.retain(|other| other.name != variable.name);
        variables.push(variable);
    }
    variables
}

/// Returns the name in DNS of an attempt's rank 0.
fn first_rank(job: &FineTuneJob, attempt: &Attempt<'_>) -> String {
    let name = job.metadata.name.as_deref().unwrap_or_default();
    let namespace = job.metadata.namespace.as_deref().unwrap_or_default();
    let pod = job_name(name, attempt.step, attempt.number);
    format!("{pod}-0.{}.{namespace}.svc", ranks_name(name))
}

/// Each Secret's keys, under the prefix of what they are for.
pub(super) fn secrets(job: &FineTuneJob) -> Vec<EnvFromSource> {
    let source = |role: Role| {
        let secret = secret_of(&job.spec, role)?;
        Some(EnvFromSource {
            prefix: Some(role.prefix().to_owned()),
            secret_ref: Some(SecretEnvSource { name: secret.name.clone(), optional: None }),
            config_map_ref: None,
        })
    };
    Role::ALL.into_iter().filter_map(source).collect()
}

fn secret_of(spec: &FineTuneJobSpec, role: Role) -> Option<&SecretRef> {
    match role {
        Role::Model => spec.model.secret_ref.as_ref(),
        Role::Adapter => spec.initial_adapter.as_ref()?.secret_ref.as_ref(),
        Role::Checkpoint => spec.initial_checkpoint.as_ref()?.secret_ref.as_ref(),
        Role::Dataset => spec.dataset.secret_ref.as_ref(),
        Role::Output => spec.output.secret_ref.as_ref(),
    }
}
