//! The pod of an attempt: restricted, without a token of the apiserver, and with its configuration
//! as a file.

use std::collections::BTreeMap;

use finetune_api::{FineTuneJob, Step};
use finetune_contract::{
    ObjectUri, Scheme, TrainerArgs, TrainerCommand,
    process::{METRICS_PORT, POD_ADDRESS, PVC_ROOT},
};
use k8s_openapi::{
    api::core::v1::{
        Capabilities, Container, ContainerPort, DownwardAPIVolumeFile, DownwardAPIVolumeSource,
        EmptyDirVolumeSource, LocalObjectReference, ObjectFieldSelector,
        PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec,
        SeccompProfile, SecurityContext, Toleration, Volume, VolumeMount,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{
    Attempt, env,
    names::{CONTAINER, WORK_DIRECTORY, ranks_name},
    resources::{self, mebibytes},
};
use crate::operator::settings::Settings;

pub(super) const CONFIG_ANNOTATION: &str = "finetune.dev/config";
const CONFIG_DIRECTORY: &str = "/etc/finetune";
const CONFIG_FILE: &str = "config.json";
/// The kubelet keeps what is written there as the termination message.
const TERMINATION_MESSAGE_PATH: &str = "/dev/termination-log";
/// The user of the image; any number but 0 does.
const USER: i64 = 65532;

/// Builds the pod of an attempt.
pub(super) fn pod_template(
    job: &FineTuneJob,
    settings: &Settings,
    attempt: &Attempt<'_>,
    labels: BTreeMap<String, String>,
) -> PodTemplateSpec {
    let template = job.spec.pod_template.clone().unwrap_or_default();
    let accelerator = attempt.accelerator();
    let node_selector: BTreeMap<String, String> = accelerator
        .map(|accelerator| accelerator.node_selector.clone())
        .into_iter()
        .chain(template.node_selector.clone())
        .flatten()
        .collect();
    let tolerations: Vec<Toleration> = accelerator
        .map(|accelerator| accelerator.tolerations.clone())
        .into_iter()
        .chain(template.tolerations.clone())
        .flatten()
        .map(toleration)
        .collect();
    let secrets = settings.image_pull_secrets.iter();
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: Some(BTreeMap::from([(
                CONFIG_ANNOTATION.to_owned(),
                attempt.config.to_owned(),
            )])),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            restart_policy: Some("Never".to_owned()),
            subdomain: (attempt.parallelism.places() > 1)
                .then(|| ranks_name(job.metadata.name.as_deref().unwrap_or_default())),
            termination_grace_period_seconds: Some(settings.termination_grace_period_seconds),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            service_account_name: template.service_account_name.clone(),
            priority_class_name: template.priority_class_name.clone(),
            runtime_class_name: template.runtime_class_name.clone(),
            scheduler_name: template.scheduler_name.clone(),
            image_pull_secrets: Some(
                secrets.map(|name| LocalObjectReference { name: name.clone() }).collect(),
            ),
            node_selector: Some(node_selector),
            tolerations: Some(tolerations),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(USER),
                run_as_group: Some(USER),
                fs_group: Some(USER),
                fs_group_change_policy: Some("OnRootMismatch".to_owned()),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".to_owned(),
                    ..SeccompProfile::default()
                }),
                ..Default::default()
            }),
            containers: vec![container(job, settings, attempt, &template)],
            volumes: Some(volumes(job, settings, attempt)),
            ..PodSpec::default()
        }),
    }
}

fn toleration(toleration: finetune_api::Toleration) -> Toleration {
    let finetune_api::Toleration { key, operator, value, effect, toleration_seconds } = toleration;
    Toleration {
        key,
        operator: operator.map(|operator| operator.as_str().to_owned()),
        value,
        effect: effect.map(|effect| effect.as_str().to_owned()),
        toleration_seconds,
    }
}

fn container(
    job: &FineTuneJob,
    settings: &Settings,
    attempt: &Attempt<'_>,
    template: &finetune_api::PodTemplate,
) -> Container {
    let port = ContainerPort {
        name: Some("metrics".to_owned()),
        container_port: i32::from(METRICS_PORT),
        ..ContainerPort::default()
    };
    let mount = |name: &str, path: String, read_only: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path,
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    let mut mounts = vec![
        mount("config", CONFIG_DIRECTORY.to_owned(), true),
        mount("work", WORK_DIRECTORY.to_owned(), false),
        mount("tmp", "/tmp".to_owned(), false),
    ];
    if attempt.pod_size(settings).shared_memory_bytes > 0 {
        mounts.push(mount("shm", "/dev/shm".to_owned(), false));
    }
    for claim in claims(job) {
        mounts.push(mount(&format!("pvc-{claim}"), format!("{PVC_ROOT}/{claim}"), false));
    }
    Container {
        name: CONTAINER.to_owned(),
        image: Some(attempt.image(settings).to_owned()),
        image_pull_policy: settings.image_pull_policy.clone(),
        args: Some(arguments(attempt.step)),
        env: Some(env::variables(job, settings, attempt, template)),
        env_from: Some(env::secrets(job)),
        ports: (attempt.step == Step::Training).then(|| vec![port]),
        resources: Some(resources::resources(job, settings, attempt)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".to_owned()]),
                ..Capabilities::default()
            }),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

/// Returns the trainer's command line.
fn arguments(step: Step) -> Vec<String> {
    let (command, listen) = match step {
        Step::Preflight => (TrainerCommand::Preflight, None),
        Step::Training => (TrainerCommand::Train, Some(POD_ADDRESS)),
    };
    let config = format!("{CONFIG_DIRECTORY}/{CONFIG_FILE}");
    let args = TrainerArgs {
        listen,
        ..TrainerArgs::new(command, config, TERMINATION_MESSAGE_PATH, WORK_DIRECTORY)
    };
    // Its paths are Unicode: they are the constants above.
    args.to_args().iter().map(|arg| arg.to_string_lossy().into_owned()).collect()
}

fn volumes(job: &FineTuneJob, settings: &Settings, attempt: &Attempt<'_>) -> Vec<Volume> {
    let size = attempt.pod_size(settings);
    let empty = |name: &str, medium: Option<&str>, bytes: u64| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: medium.map(str::to_owned),
            size_limit: Some(mebibytes(bytes)),
        }),
        ..Volume::default()
    };
    let config = DownwardAPIVolumeFile {
        path: CONFIG_FILE.to_owned(),
        field_ref: Some(ObjectFieldSelector {
            field_path: format!("metadata.annotations['{CONFIG_ANNOTATION}']"),
            api_version: None,
        }),
        ..DownwardAPIVolumeFile::default()
    };
    let mut volumes = vec![
        Volume {
            name: "config".to_owned(),
            downward_api: Some(DownwardAPIVolumeSource {
                items: Some(vec![config]),
                default_mode: None,
            }),
            ..Volume::default()
        },
        empty("work", None, size.storage_bytes),
        empty("tmp", None, 64 << 20),
    ];
    if size.shared_memory_bytes > 0 {
        volumes.push(empty("shm", Some("Memory"), size.shared_memory_bytes));
    }
    for claim in claims(job) {
        volumes.push(Volume {
            name: format!("pvc-{claim}"),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim,
                read_only: None,
            }),
            ..Volume::default()
        });
    }
    volumes
}

/// Returns the volume claims that URIs of the job name, each once.
fn claims(job: &FineTuneJob) -> Vec<String> {
    let mut claims: Vec<String> = job
        .spec
        .uris()
        .filter_map(|(_, uri)| uri.parse::<ObjectUri>().ok())
        .filter(|uri| uri.scheme == Scheme::Pvc)
        .map(|uri| uri.authority)
        .collect();
    claims.sort();
    claims.dedup();
    claims
}
