//! The objects of one try: a Job with one pod, or with one for each rank, which find each other
//! through a headless Service. Pure and infallible.
//!
//! What the trainer is told travels as an annotation of the pod and reaches it as a file: one
//! object to create, which cannot disagree with itself.

use std::collections::BTreeMap;

use finetune_contract::{
    ObjectUri, Parallelism, Role, Scheme, TrainerArgs, TrainerCommand,
    process::{
        METRICS_PORT, POD_ADDRESS, PVC_ROOT,
        environment::{
            ALLOWED_ENDPOINTS, GOMP_SPINCOUNT, MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS,
            WORLD_SIZE,
        },
    },
};
use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec},
        core::v1::{
            Capabilities, ConfigMapKeySelector, Container, ContainerPort, DownwardAPIVolumeFile,
            DownwardAPIVolumeSource, EmptyDirVolumeSource, EnvFromSource, EnvVar, EnvVarSource,
            LocalObjectReference, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, PodSpec,
            PodTemplateSpec, ResourceRequirements, SeccompProfile, SecretEnvSource,
            SecretKeySelector, SecurityContext, Service, ServiceSpec, Toleration, Volume,
            VolumeMount,
        },
        networking::v1::{
            NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicySpec,
        },
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference},
    },
};
use kube::Resource;

use super::settings::Settings;
use crate::{
    api::{self, FineTuneJob, FineTuneJobSpec, GIB, SecretRef, Step},
    plan::{accelerators::Accelerator, placement::PodSize},
};

/// The name of the one container that counts.
pub const CONTAINER: &str = "trainer";
/// Where rank 0 brings the ranks together; torch's own default.
const RENDEZVOUS_PORT: u16 = 29500;
/// The label that names the FineTuneJob.
pub const JOB_LABEL: &str = "finetune.dev/job";
/// The label that names the step.
pub const STEP_LABEL: &str = "finetune.dev/step";
/// The label all children carry.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "finetune-operator");
/// The label by which Kueue knows the queue of a workload.
pub const QUEUE_LABEL: &str = "kueue.x-k8s.io/queue-name";

/// The label by which the coscheduling plugin knows the members of a gang.
const GANG_LABEL: &str = "scheduling.x-k8s.io/pod-group";
/// The annotation of a Job by which Volcano knows how many of its pods start together or not at all.
const GANG_SIZE_ANNOTATION: &str = "scheduling.volcano.sh/group-min-member";
const CONFIG_ANNOTATION: &str = "finetune.dev/config";
const CONFIG_DIRECTORY: &str = "/etc/finetune";
const CONFIG_FILE: &str = "config.json";
/// The kubelet keeps what is written there as the termination message.
const TERMINATION_MESSAGE_PATH: &str = "/dev/termination-log";
const WORK_DIRECTORY: &str = "/work";
/// The user of the image; any number but 0 does.
const USER: i64 = 65532;

/// One try of one step.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// The step.
    pub step: Step,
    /// Which try, from 0.
    pub number: i32,
    /// What the program is told, as JSON.
    pub config: &'a str,
    /// Where it runs; absent for a preflight.
    pub place: Option<(&'a Accelerator, PodSize)>,
    /// How the run is divided over pods and over the processes of each.
    pub parallelism: Parallelism,
}

/// Returns the name of a try's Job: at most 11 characters longer than the FineTuneJob's.
pub fn job_name(name: &str, step: Step, number: i32) -> String {
    match step {
        Step::Preflight => format!("{name}-check-{number}"),
        Step::Training => format!("{name}-{number}"),
    }
}

/// Returns the name of what the ranks of a job share, in all its tries. A Service's name starts with
/// a letter; a job's need not.
fn ranks_name(name: &str) -> String {
    format!("ranks-{name}")
}

/// Builds what gives the pods of a job's ranks names that can be resolved.
pub fn ranks_service(job: &FineTuneJob) -> Service {
    let metadata = ranks_metadata(job);
    Service {
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            // Ranks meet before any is ready.
            publish_not_ready_addresses: Some(true),
            selector: Some(ranks_selector(job)),
            ..ServiceSpec::default()
        }),
        metadata,
        status: None,
    }
}

/// Builds what lets the ranks of a job reach each other, on ports they choose, and nobody else them,
/// where a policy of the namespace closes all ports of trainers but that of their progress.
pub fn ranks_policy(job: &FineTuneJob) -> NetworkPolicy {
    let ranks =
        || LabelSelector { match_labels: Some(ranks_selector(job)), match_expressions: None };
    let peer = NetworkPolicyPeer { pod_selector: Some(ranks()), ..NetworkPolicyPeer::default() };
    NetworkPolicy {
        metadata: ranks_metadata(job),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(ranks()),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![NetworkPolicyIngressRule { from: Some(vec![peer]), ports: None }]),
            egress: None,
        }),
    }
}

fn ranks_metadata(job: &FineTuneJob) -> ObjectMeta {
    let name = job.metadata.name.clone().unwrap_or_default();
    ObjectMeta {
        name: Some(ranks_name(&name)),
        namespace: job.metadata.namespace.clone(),
        labels: Some(ranks_selector(job)),
        owner_references: Some(owner(job).into_iter().collect()),
        ..ObjectMeta::default()
    }
}

fn ranks_selector(job: &FineTuneJob) -> BTreeMap<String, String> {
    let name = job.metadata.name.clone().unwrap_or_default();
    own_labels(&name, Step::Training).into_iter().collect()
}

/// Builds the Job of a try.
pub fn job(job: &FineTuneJob, settings: &Settings, attempt: &Attempt<'_>) -> Job {
    let name = job.metadata.name.clone().unwrap_or_default();
    let mut labels = labels(job, &name, attempt.step);
    let pod = pod_template(job, settings, attempt, labels.clone());
    let queue = job.metadata.labels.as_ref().and_then(|labels| labels.get(QUEUE_LABEL));
    let is_queued = queue.is_some() && attempt.step == Step::Training;
    if let Some(queue) = queue.filter(|_| is_queued) {
        labels.insert(QUEUE_LABEL.to_owned(), queue.clone());
    }
    let pods = i32::try_from(attempt.parallelism.places()).unwrap_or(i32::MAX);
    let has_ranks = pods > 1;
    Job {
        metadata: ObjectMeta {
            name: Some(job_name(&name, attempt.step, attempt.number)),
            namespace: job.metadata.namespace.clone(),
            labels: Some(labels),
            annotations: has_ranks
                .then(|| BTreeMap::from([(GANG_SIZE_ANNOTATION.to_owned(), pods.to_string())])),
            owner_references: Some(owner(job).into_iter().collect()),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            // The unit of repetition is the try, which has a Job of its own.
            // Each rank ends by itself when another does, so all of them can be asked why: a Job that
            // failed as a whole would delete the pods that still end.
            backoff_limit: (!has_ranks).then_some(0),
            backoff_limit_per_index: has_ranks.then_some(0),
            completion_mode: has_ranks.then(|| "Indexed".to_owned()),
            completions: has_ranks.then_some(pods),
            parallelism: has_ranks.then_some(pods),
            pod_replacement_policy: Some("Failed".to_owned()),
            // Set once, when it is made; after that it is the queue's.
            suspend: is_queued.then_some(true),
            template: pod,
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// Its children go when it goes. They do not keep it from going: that would need a right over its
/// finalizers where clusters check it.
fn owner(job: &FineTuneJob) -> Option<OwnerReference> {
    let mut owner = job.controller_owner_ref(&())?;
    owner.block_owner_deletion = None;
    Some(owner)
}

fn labels(job: &FineTuneJob, name: &str, step: Step) -> BTreeMap<String, String> {
    let template = job.spec.pod_template.as_ref();
    let mut users = template.and_then(|template| template.labels.clone()).unwrap_or_default();
    if step == Step::Preflight {
        // It runs alone: one more member would let a gang start that is not complete.
        users.remove(GANG_LABEL);
    }
    // Ours last: they are what children are found by.
    users.into_iter().chain(own_labels(name, step)).collect()
}

fn own_labels(name: &str, step: Step) -> [(String, String); 4] {
    [
        ("app.kubernetes.io/name", "finetune-trainer"),
        MANAGED_BY,
        (JOB_LABEL, name),
        (STEP_LABEL, step_word(step)),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
}

fn step_word(step: Step) -> &'static str {
    match step {
        Step::Preflight => "preflight",
        Step::Training => "training",
    }
}

fn pod_template(
    job: &FineTuneJob,
    settings: &Settings,
    attempt: &Attempt<'_>,
    labels: BTreeMap<String, String>,
) -> PodTemplateSpec {
    let template = job.spec.pod_template.clone().unwrap_or_default();
    let accelerator = attempt.place.map(|(accelerator, _)| accelerator);
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
            security_context: Some(k8s_openapi::api::core::v1::PodSecurityContext {
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

fn toleration(toleration: api::Toleration) -> Toleration {
    let api::Toleration { key, operator, value, effect, toleration_seconds } = toleration;
    Toleration {
        key,
        operator: operator.map(|operator| format!("{operator:?}")),
        value,
        effect: effect.map(|effect| format!("{effect:?}")),
        toleration_seconds,
    }
}

fn container(
    job: &FineTuneJob,
    settings: &Settings,
    attempt: &Attempt<'_>,
    template: &api::PodTemplate,
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
    if shared_memory(attempt) > 0 {
        mounts.push(mount("shm", "/dev/shm".to_owned(), false));
    }
    for claim in claims(job) {
        mounts.push(mount(&format!("pvc-{claim}"), format!("{PVC_ROOT}/{claim}"), false));
    }
    Container {
        name: CONTAINER.to_owned(),
        image: Some(image(settings, attempt)),
        image_pull_policy: settings.image_pull_policy.clone(),
        args: Some(arguments(attempt.step)),
        env: Some(variables(job, settings, attempt, template)),
        env_from: Some(secrets(job)),
        ports: (attempt.step == Step::Training).then(|| vec![port]),
        resources: Some(resources(job, settings, attempt)),
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

/// The environment: the administrator's, then the user's, then what must be as it is.
fn variables(
    job: &FineTuneJob,
    settings: &Settings,
    attempt: &Attempt<'_>,
    template: &api::PodTemplate,
) -> Vec<EnvVar> {
    let plain = |name: &str, value: &str| EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        value_from: None,
    };
    let Parallelism { world_size, local_world_size, .. } = attempt.parallelism;
    let cores = match attempt.place {
        Some((_, size)) => (size.cpu_millis as u64).div_ceil(1000 * u64::from(local_world_size)),
        None => settings.preflight.cpu.ceil() as u64,
    };
    let mut own = vec![
        plain("HOME", WORK_DIRECTORY),
        plain(OMP_NUM_THREADS, &cores.to_string()),
        plain(GOMP_SPINCOUNT.0, GOMP_SPINCOUNT.1),
    ];
    if attempt.place.is_some_and(|(accelerator, _)| accelerator.is_device()) {
        // Micro-batches of ever other sizes leave no holes that nothing fits.
        own.push(plain("PYTORCH_ALLOC_CONF", "expandable_segments:True"));
    }
    if attempt.parallelism.places() > 1 {
        // Which rank it is, a pod of an Indexed Job is told by Kubernetes.
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

/// The trainer for the device, else the operator's own.
fn image(settings: &Settings, attempt: &Attempt<'_>) -> String {
    let own = attempt.place.and_then(|(accelerator, _)| accelerator.own_trainer());
    own.unwrap_or(&settings.trainer_image).to_owned()
}

/// Returns the name in DNS of a try's rank 0.
fn first_rank(job: &FineTuneJob, attempt: &Attempt<'_>) -> String {
    let name = job.metadata.name.as_deref().unwrap_or_default();
    let namespace = job.metadata.namespace.as_deref().unwrap_or_default();
    let pod = job_name(name, attempt.step, attempt.number);
    format!("{pod}-0.{}.{namespace}.svc", ranks_name(name))
}

/// Each Secret's keys, under the prefix of what they are for.
fn secrets(job: &FineTuneJob) -> Vec<EnvFromSource> {
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

fn shared_memory(attempt: &Attempt<'_>) -> u64 {
    attempt.place.map_or(0, |(_, size)| size.shared_memory_bytes)
}

fn resources(
    job: &FineTuneJob,
    settings: &Settings,
    attempt: &Attempt<'_>,
) -> ResourceRequirements {
    let preflight = &settings.preflight;
    let (cpu_millis, memory) = attempt.place.map_or_else(
        || ((preflight.cpu * 1000.0) as i64, (preflight.memory_gi_b * GIB) as u64),
        |(_, size)| (size.cpu_millis, size.memory_bytes),
    );
    let device = attempt.place.and_then(|(accelerator, _)| accelerator.resource_name.clone());
    let mut requests = BTreeMap::from([
        ("cpu".to_owned(), Quantity(format!("{cpu_millis}m"))),
        ("memory".to_owned(), mebibytes(memory)),
        ("ephemeral-storage".to_owned(), mebibytes(storage(settings, attempt))),
    ]);
    let mut limits = BTreeMap::from([("memory".to_owned(), mebibytes(memory))]);
    if let Some(device) = device {
        let count = Quantity(attempt.parallelism.local_world_size.to_string());
        requests.insert(device.clone(), count.clone());
        limits.insert(device, count);
    }
    if attempt.step == Step::Training
        && let Some(users) = &job.spec.resources
    {
        let quantity = |(name, value): (&String, &String)| (name.clone(), Quantity(value.clone()));
        // A limit alone is a request too: a request above it would be refused.
        requests.extend(users.limits.iter().flatten().map(quantity));
        requests.extend(users.requests.iter().flatten().map(quantity));
        limits.extend(users.limits.iter().flatten().map(quantity));
    }
    ResourceRequirements { requests: Some(requests), limits: Some(limits), claims: None }
}

/// Returns the memory at which the kernel ends a training pod of `size`, in bytes: the user's limit,
/// if there is one that can be read.
pub fn memory_limit(job: &FineTuneJob, size: &PodSize) -> u64 {
    job.spec.memory_limit().unwrap_or(size.memory_bytes)
}

fn mebibytes(bytes: u64) -> Quantity {
    Quantity(format!("{}Mi", bytes.div_ceil(1 << 20)))
}

fn storage(settings: &Settings, attempt: &Attempt<'_>) -> u64 {
    match attempt.place {
        Some((_, size)) => size.storage_bytes,
        None => (settings.preflight.storage_gi_b * GIB) as u64,
    }
}

fn volumes(job: &FineTuneJob, settings: &Settings, attempt: &Attempt<'_>) -> Vec<Volume> {
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
        empty("work", None, storage(settings, attempt)),
        empty("tmp", None, 64 << 20),
    ];
    if shared_memory(attempt) > 0 {
        volumes.push(empty("shm", Some("Memory"), shared_memory(attempt)));
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

/// The volume claims that URIs of the job name, each once.
fn claims(job: &FineTuneJob) -> Vec<String> {
    let mut claims: Vec<String> = job
        .spec
        .uris()
        .filter_map(|(_, uri)| ObjectUri::parse(uri).ok())
        .filter(|uri| uri.scheme == Scheme::Pvc)
        .map(|uri| uri.authority)
        .collect();
    claims.sort();
    claims.dedup();
    claims
}

#[cfg(test)]
mod tests {
    use finetune_contract::{Parallelism, Strategy};

    use super::{Attempt, job, job_name, ranks_name, ranks_policy, ranks_service};
    use crate::{
        api::{NAME_LIMIT, Step},
        manifest,
        operator::settings::Settings,
        plan::placement::PodSize,
    };

    const SETTINGS: &str = "trainerImage: trainer:1\naccelerators:\n- {name: a100, resourceName: nvidia.com/gpu, image: 'trainer-cuda:1', gpusPerNode: 4, memoryGiB: 80, bf16Tflops: 312, fp32Tflops: 19, hasBf16: true, nodeSelector: {gpu: a100}, tolerations: [{key: gpu, operator: Exists, effect: NoSchedule}]}\nenvironment: {AWS_REGION: eu-1, LOG: x}\nallowedEndpoints: [s3.acme.com]\n";

    fn build(lines: &str, step: Step) -> String {
        let [job, ..] = build_over([1, 1], lines, step);
        job
    }

    /// The Job, and what its ranks share.
    fn build_over([pods, local_world_size]: [u32; 2], lines: &str, step: Step) -> [String; 3] {
        let text = format!("{}{lines}", include_str!("../../examples/minimal.yaml"));
        let mut manifest = manifest::parse(&text).unwrap();
        manifest.metadata.namespace = Some("team".to_owned());
        manifest.metadata.uid = Some("u-1".to_owned());
        let settings = Settings::parse(SETTINGS).unwrap();
        let size = PodSize {
            cpu_millis: 4000,
            memory_bytes: 6 << 30,
            shared_memory_bytes: 1 << 30,
            storage_bytes: 10 << 30,
        };
        let place = (step == Step::Training).then(|| (&settings.accelerators[0], size));
        let parallelism = Parallelism {
            world_size: pods * local_world_size,
            strategy: Strategy::Zero3,
            local_world_size,
        };
        let attempt = Attempt { step, number: 2, config: "{\"version\":1}", place, parallelism };
        [
            serde_saphyr::to_string(&job(&manifest, &settings, &attempt)).unwrap(),
            serde_saphyr::to_string(&ranks_service(&manifest)).unwrap(),
            serde_saphyr::to_string(&ranks_policy(&manifest)).unwrap(),
        ]
    }

    #[test]
    fn a_preflight_is_a_small_pod_without_a_device() {
        insta::assert_snapshot!(build("  loraConfig: {}\n", Step::Preflight));
    }

    #[test]
    fn a_training_pod_has_its_accelerator_and_the_users_words() {
        insta::assert_snapshot!(build(
            "  podTemplate:\n    labels: {team: search, finetune.dev/job: other}\n    priorityClassName: low\n    schedulerName: volcano\n    env: [{name: LOG, value: debug}, {name: KEY, secretKeyRef: {name: s, key: k}}]\n  resources: {limits: {memory: 8Gi}}\n",
            Step::Training
        ));
    }

    #[test]
    fn a_preflight_is_no_member_of_a_gang() {
        let lines =
            "  podTemplate: {labels: {scheduling.x-k8s.io/pod-group: gang, team: search}}\n";
        let labels = |step| {
            let job = build(lines, step);
            let count = |label: &str| job.matches(&format!("{label}\n")).count();
            [count("scheduling.x-k8s.io/pod-group: gang"), count("team: search")]
        };
        // Of the Job and of its pod.
        assert_eq!(labels(Step::Preflight), [0, 2]);
        assert_eq!(labels(Step::Training), [2, 2]);
    }

    #[test]
    fn ranks_are_pods_of_one_job_with_names_and_a_way_to_each_other() {
        let [one, ..] = build_over([1, 1], "", Step::Training);
        let [several, service, policy] = build_over([2, 1], "", Step::Training);
        let is_new = |line: &&str| !one.lines().any(|other| other == *line);
        let added: Vec<&str> = several.lines().filter(is_new).collect();
        let is_gone = |line: &&str| !several.lines().any(|other| other == *line);
        let removed: Vec<&str> = one.lines().filter(is_gone).collect();
        insta::assert_snapshot!(removed.join("\n"), @"  backoffLimit: 0");
        insta::assert_snapshot!(added.join("\n"), @r#"
        annotations:
          scheduling.volcano.sh/group-min-member: "2"
        backoffLimitPerIndex: 0
        completionMode: Indexed
        completions: 2
        parallelism: 2
              - name: WORLD_SIZE
                value: "2"
              - name: MASTER_ADDR
                value: minimal-2-0.ranks-minimal.team.svc
              - name: MASTER_PORT
                value: "29500"
            subdomain: ranks-minimal
        "#);
        insta::assert_snapshot!(service, @r#"
        apiVersion: v1
        kind: Service
        metadata:
          labels:
            app.kubernetes.io/managed-by: finetune-operator
            app.kubernetes.io/name: finetune-trainer
            finetune.dev/job: minimal
            finetune.dev/step: training
          name: ranks-minimal
          namespace: team
          ownerReferences:
          - apiVersion: finetune.dev/v1alpha1
            controller: true
            kind: FineTuneJob
            name: minimal
            uid: u-1
        spec:
          clusterIP: None
          publishNotReadyAddresses: true
          selector:
            app.kubernetes.io/managed-by: finetune-operator
            app.kubernetes.io/name: finetune-trainer
            finetune.dev/job: minimal
            finetune.dev/step: training
        "#);
        insta::assert_snapshot!(policy, @r#"
        apiVersion: networking.k8s.io/v1
        kind: NetworkPolicy
        metadata:
          labels:
            app.kubernetes.io/managed-by: finetune-operator
            app.kubernetes.io/name: finetune-trainer
            finetune.dev/job: minimal
            finetune.dev/step: training
          name: ranks-minimal
          namespace: team
          ownerReferences:
          - apiVersion: finetune.dev/v1alpha1
            controller: true
            kind: FineTuneJob
            name: minimal
            uid: u-1
        spec:
          ingress:
          - from:
            - podSelector:
                matchLabels:
                  app.kubernetes.io/managed-by: finetune-operator
                  app.kubernetes.io/name: finetune-trainer
                  finetune.dev/job: minimal
                  finetune.dev/step: training
          podSelector:
            matchLabels:
              app.kubernetes.io/managed-by: finetune-operator
              app.kubernetes.io/name: finetune-trainer
              finetune.dev/job: minimal
              finetune.dev/step: training
          policyTypes:
          - Ingress
        "#);
    }

    #[test]
    fn ranks_of_one_pod_share_its_devices() {
        let [one, ..] = build_over([1, 1], "", Step::Training);
        let [four, ..] = build_over([1, 4], "", Step::Training);
        let added: Vec<&str> =
            four.lines().filter(|line| !one.lines().any(|other| other == *line)).collect();
        insta::assert_snapshot!(added.join("\n"), @r#"
        value: "1"
          nvidia.com/gpu: "4"
          nvidia.com/gpu: "4"
        "#);
        let [several, ..] = build_over([2, 4], "", Step::Training);
        assert!(several.contains("completions: 2\n") && several.contains("value: \"8\""));
    }

    #[test]
    fn names_fit_a_label() {
        let longest = "a".repeat(NAME_LIMIT);
        for step in [Step::Preflight, Step::Training] {
            assert!(job_name(&longest, step, 999).len() <= 63);
        }
        // A pod of a rank has its number too.
        assert!(format!("{}-63", job_name(&longest, Step::Training, 999)).len() <= 63);
        assert!(ranks_name(&longest).len() <= 63);
    }
}
