//! An operator of some namespaces: it carries out their jobs, and has no right in any other.

use std::process::Command;

use kube::ResourceExt;

use crate::{
    helm,
    test_namespace::{TestNamespace, variable},
};

const RELEASE: &str = "teams";
const ITS_NAMESPACE: &str = "e2e-teams-operator";

#[tokio::test]
async fn an_operator_of_two_namespaces_leaves_a_third_alone() {
    let Some(first) = TestNamespace::new("team-a").await else { return };
    let second = TestNamespace::new("team-b").await.unwrap();
    let third = TestNamespace::new("team-c").await.unwrap();
    let namespaces = format!("settings.namespaces={{{},{}}}", first.namespace, second.namespace);
    helm::install(
        RELEASE,
        ITS_NAMESPACE,
        // The CRD is there already, of somebody else.
        &["--set", &namespaces, "--set", "crds.enabled=false", "--set", "replicas=1"],
    );
    let untouched = third.apply(&third.job("job")).await;
    for test in [&first, &second] {
        test.apply(&test.job("job")).await;
    }
    for test in [&first, &second] {
        test.wait("job", "True Succeeded").await;
        test.verify("job");
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
        for (test, expected) in [(&first, "yes"), (&second, "yes"), (&third, "no")] {
            let mut kubectl = Command::new(variable("FINETUNE_TEST_KUBECTL"));
            kubectl.args(["auth", "can-i", "--namespace", &test.namespace, &account]).args(right);
            let answer = kubectl.output().unwrap();
            let said = String::from_utf8_lossy(&answer.stdout);
            assert_eq!(said.trim(), expected, "{right:?} in {}", test.namespace);
        }
    }
    helm::run(&["uninstall", RELEASE, "--namespace", ITS_NAMESPACE, "--wait"]);
}
