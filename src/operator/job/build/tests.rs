//! The objects of attempts, as YAML.

use finetune_api::{NAME_LIMIT, Step, manifest};
use finetune_contract::{Parallelism, Strategy};
use finetune_plan::pod::PodSize;
use k8s_openapi::api::batch::v1::Job;

use super::{
    Attempt, digest, job,
    names::{job_name, ranks_name},
    ranks,
};
use crate::operator::settings::Settings;

const SETTINGS: &str = "trainerImage: trainer:1\naccelerators:\n- {name: a100, resourceName: nvidia.com/gpu, image: 'trainer-cuda:1', gpusPerNode: 4, memoryGiB: 80, bf16Tflops: 312, fp32Tflops: 19, hasBf16: true, nodeSelector: {gpu: a100}, tolerations: [{key: gpu, operator: Exists, effect: NoSchedule}]}\nenvironment: {AWS_REGION: eu-1, LOG: x}\nallowedEndpoints: [s3.acme.com]\n";

fn build(lines: &str, step: Step) -> String {
    let [job, ..] = build_over([1, 1], lines, step);
    job
}

/// The Job, and what its ranks share.
fn build_over([pods, local_world_size]: [u32; 2], lines: &str, step: Step) -> [String; 3] {
    let text = format!("{}{lines}", include_str!("../../../../examples/minimal.yaml"));
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
        serde_saphyr::to_string(&ranks::service(&manifest)).unwrap(),
        serde_saphyr::to_string(&ranks::policy(&manifest)).unwrap(),
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
    let lines = "  podTemplate: {labels: {scheduling.x-k8s.io/pod-group: gang, team: search}}\n";
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

#[test]
fn a_preflight_has_a_cpu_limit_where_the_settings_give_one() {
    let text = include_str!("../../../../examples/minimal.yaml");
    let manifest = manifest::parse(text).unwrap();
    let limits = |lines: &str, step| {
        let settings = Settings::parse(&format!("{SETTINGS}{lines}")).unwrap();
        let parallelism = Parallelism::SINGLE;
        let attempt = Attempt { step, number: 0, config: "{}", place: None, parallelism };
        let pod = job(&manifest, &settings, &attempt).spec.unwrap().template.spec.unwrap();
        let limits = pod.containers[0].resources.clone().unwrap().limits.unwrap();
        limits.get("cpu").map(|quantity| quantity.0.clone())
    };
    let limited = "preflight: {cpu: 0.5, cpuLimit: 1.5}\n";
    assert_eq!(limits(limited, Step::Preflight).as_deref(), Some("1500m"));
    assert_eq!(limits(limited, Step::Training), None);
    assert_eq!(limits("", Step::Preflight), None);
}

#[test]
fn the_digest_of_pods_is_of_what_they_run() {
    let built =
        |lines: &str| -> Job { serde_saphyr::from_str(&build(lines, Step::Training)).unwrap() };
    let ours = built("  podTemplate: {env: [{name: A, value: b}, {name: B, value: ''}]}\n");
    let digest = digest::of_pods(&ours);
    // As an apiserver returns it.
    let mut stored = serde_json::to_value(&ours).unwrap();
    let pod = &mut stored["spec"]["template"]["spec"];
    pod["dnsPolicy"] = "ClusterFirst".into();
    pod["volumes"][0]["downwardAPI"]["defaultMode"] = 420.into();
    pod["volumes"][0]["downwardAPI"]["items"][0]["fieldRef"]["apiVersion"] = "v1".into();
    let container = &mut pod["containers"][0];
    container["terminationMessagePath"] = "/dev/termination-log".into();
    container["terminationMessagePolicy"] = "File".into();
    container["imagePullPolicy"] = "IfNotPresent".into();
    container["ports"][0]["protocol"] = "TCP".into();
    container["env"].as_array_mut().unwrap().iter_mut().for_each(|variable| {
        if variable["value"] == "" {
            variable.as_object_mut().unwrap().remove("value");
        }
    });
    stored["spec"]["suspend"] = true.into();
    let read =
        |stored: &serde_json::Value| -> Job { serde_json::from_value(stored.clone()).unwrap() };
    assert_eq!(digest::of_pods(&read(&stored)), digest);
    for (place, other) in [
        ("/spec/template/spec/containers/0/image", "other:1".into()),
        ("/spec/template/spec/containers/0/args/0", "other".into()),
        ("/spec/template/spec/containers/0/env/0/value", "other".into()),
        ("/spec/template/spec/containers/0/volumeMounts/0/mountPath", "/usr/bin".into()),
        ("/spec/template/spec/volumes/0", serde_json::json!({"name": "config", "emptyDir": {}})),
        ("/spec/template/metadata/annotations/finetune.dev~1config", "{}".into()),
    ] {
        let mut changed = stored.clone();
        *changed.pointer_mut(place).unwrap() = other;
        assert_ne!(digest::of_pods(&read(&changed)), digest, "{place}");
    }
    let mut changed = stored.clone();
    changed["spec"]["template"]["spec"]["initContainers"] =
        serde_json::json!([{"name": "first", "image": "other:1"}]);
    assert_ne!(digest::of_pods(&read(&changed)), digest);
}
