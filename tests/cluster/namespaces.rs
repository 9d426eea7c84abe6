//! An operator of some namespaces: it carries out their jobs, and has no right in any other.

use std::process::Command;

use kube::ResourceExt;

use crate::{
    bed::{Bed, variable},
    helm,
};

const RELEASE: &str = "teams";
const ITS_NAMESPACE: &str = "e2e-teams-operator";

#[tokio::test]
async fn an_operator_of_two_namespaces_leaves_a_third_alone() {
    let Some(first) = Bed::new("team-a").await else { return };
    let second = Bed::new("team-b").await.unwrap();
    let third = Bed::new("team-c").await.unwrap();
    let namespaces = format!("settings.namespaces={{{},{}}}", first.namespace, second.namespace);
    helm::install(
        RELEASE,
        ITS_NAMESPACE,
        // The CRD is there already, of somebody else.
        &["--set", &namespaces, "--set", "crds.enabled=false", "--set", "replicas=1"],
    );
    let untouched = third.apply(&third.job("job")).await;
    for bed in [&first, &second] {
        bed.apply(&bed.job("job")).await;
    }
    for bed in [&first, &second] {
        bed.wait("job", "True Succeeded").await;
        bed.verify("job");
    }
    let after = third.jobs.get("job").await.unwrap();
    assert_eq!(after.resource_version(), untouched.resource_version(), "nobody has written it");

    let account = format!("--as=system:serviceaccount:{ITS_NAMESPACE}:{RELEASE}-finetune-operator");
    for right in [
        &["watch", "finetunejobs.finetune.dev"][..],
        &["update", "finetunejobs.finetune.dev", "--subresource=status"],
        &["create", "jobs.batch"],
        &["delete", "pods"],
    ] {
        for (bed, expected) in [(&first, "yes"), (&second, "yes"), (&third, "no")] {
            let mut kubectl = Command::new(variable("FINETUNE_TEST_KUBECTL"));
            kubectl.args(["auth", "can-i", "--namespace", &bed.namespace, &account]).args(right);
            let answer = kubectl.output().unwrap();
            let said = String::from_utf8_lossy(&answer.stdout);
            assert_eq!(said.trim(), expected, "{right:?} in {}", bed.namespace);
        }
    }
    helm::run(&["uninstall", RELEASE, "--namespace", ITS_NAMESPACE, "--wait"]);
}
