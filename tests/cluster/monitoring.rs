//! Dashboards and alerts on a real Prometheus that scrapes the real pods: every query is accepted,
//! and returns data once what it is about has happened.

use std::{collections::BTreeMap, time::Duration};

use finetune_contract::Reason;
use k8s_openapi::api::{
    admissionregistration::v1::ValidatingWebhookConfiguration, core::v1::ResourceQuota,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, EvictParams, PostParams},
};
use serde_json::{Value, json};

use crate::{
    prometheus::{Prometheus, dashboard, documented, of_monitors},
    promql,
    test_namespace::{TestNamespace, rows},
};

/// The job that the job's dashboard shows.
const WATCHED: &str = "watched";
const WEBHOOK: &str = "e2e-webhook-without-a-server";
/// How long what has happened may take to be seen.
const PATIENCE: Duration = Duration::from_mins(2);

/// A question, where it is from, and whether it is for the values of a label.
struct Question {
    place: String,
    expression: String,
    label: Option<String>,
}

/// Replaces a dashboard's variables as Grafana would.
fn substitute(text: &str, variables: &BTreeMap<&str, &str>) -> String {
    let mut text = text.replace("$__rate_interval", "1m");
    for (name, value) in variables {
        text = text.replace(&format!("${name}"), value);
    }
    assert!(!text.contains('$'), "a variable has no value: {text}");
    // What is shown in place of nothing would hide that there is nothing.
    text.replace(" or vector(0)", "")
}

/// Lists what a dashboard asks: each panel's targets, and its variables.
fn questions(file: &str, variables: &BTreeMap<&str, &str>) -> Vec<Question> {
    fn expressions(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| expressions(item, found)),
            Value::Object(fields) => {
                let own = ["expr", "definition"].into_iter().filter_map(|key| fields.get(key));
                found.extend(own.filter_map(Value::as_str).map(str::to_owned));
                fields.values().for_each(|value| expressions(value, found));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let mut found = Vec::new();
    expressions(&dashboard(file), &mut found);
    assert!(found.len() > 10, "{file} has lost its panels");
    let question = |text: String| {
        let text = substitute(&text, variables);
        let place = format!("{file}: {text}");
        match text.strip_prefix("label_values(").and_then(|rest| rest.rsplit_once(',')) {
            None => Question { place, expression: text, label: None },
            Some((selector, label)) => {
                let label = label.trim_matches([' ', ')']).to_owned();
                Question { place, expression: selector.to_owned(), label: Some(label) }
            }
        }
    };
    found.into_iter().map(question).collect()
}

/// Lists the series that alerts are about: in a healthy cluster their conditions hold for none.
async fn of_alerts(prometheus: &Prometheus) -> Vec<Question> {
    let mut questions = Vec::new();
    for (name, expression, _) in prometheus.alerts().await {
        for selector in promql::read(&expression).selectors {
            questions.push(Question {
                place: format!("{name}: {}", selector.text),
                expression: without_unseen_reasons(selector.text),
                label: None,
            });
        }
    }
    questions
}

/// Reasons that no job of this test gets: it would take a second node, or another release.
const UNSEEN: [Reason; 4] = [
    Reason::NodeUnreachable,
    Reason::PlanUnreadable,
    Reason::AcceleratorMissing,
    Reason::TrainerImageMissing,
];

/// Returns a selector, or its metric alone if it asks for nothing but reasons of [`UNSEEN`].
fn without_unseen_reasons(selector: String) -> String {
    let words = selector.strip_prefix("finetune_jobs{reason=");
    let words = words.map(|words| words.trim_start_matches('~').trim_matches(['"', '}']));
    let is_unseen = |word: &str| UNSEEN.contains(&word.parse().unwrap());
    if words.is_some_and(|words| words.split('|').all(is_unseen)) {
        return "finetune_jobs".to_owned();
    }
    selector
}

async fn has_data(prometheus: &Prometheus, question: &Question) -> bool {
    match &question.label {
        Some(label) => !prometheus.label_values(label, &question.expression).await.is_empty(),
        None => prometheus.numbers(&question.expression).await.iter().any(|n| n.is_finite()),
    }
}

/// A namespace where the apiserver refuses every Job: its quota is used up.
async fn refuse_jobs(test: &TestNamespace) {
    let quotas: Api<ResourceQuota> = Api::namespaced(test.client.clone(), &test.namespace);
    let quota = serde_json::from_value(json!({
        "metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}},
    }))
    .unwrap();
    quotas.create(&PostParams::default(), &quota).await.unwrap();
    // Until it is counted, any Job is refused too, with other words.
    test.until("the quota is counted", || async {
        quotas.get("none").await.unwrap().status?.hard.map(|_| ())
    })
    .await;
}

/// A namespace where the apiserver fails at every Job: it cannot ask the one it must ask.
async fn break_jobs(test: &TestNamespace) -> Api<ValidatingWebhookConfiguration> {
    let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(test.client.clone());
    // Left by an earlier run on the same cluster.
    let _ = webhooks.delete(WEBHOOK, &DeleteParams::default()).await;
    let webhook = serde_json::from_value(json!({
        "metadata": {"name": WEBHOOK},
        "webhooks": [{
            "name": "gone.e2e.finetune.dev", "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "failurePolicy": "Fail", "timeoutSeconds": 2,
            "clientConfig": {"service": {"name": "gone", "namespace": test.namespace}},
            "namespaceSelector": {
                "matchLabels": {"kubernetes.io/metadata.name": test.namespace},
            },
            "rules": [{
                "apiGroups": ["batch"], "apiVersions": ["v1"], "resources": ["jobs"],
                "operations": ["CREATE"],
            }],
        }],
    }))
    .unwrap();
    webhooks.create(&PostParams::default(), &webhook).await.unwrap();
    webhooks
}

#[tokio::test]
async fn every_query_of_dashboards_and_alerts_returns_data() {
    let Some(test) = TestNamespace::new("metrics").await else { return };
    let mut servers = [
        Prometheus::start("by monitors", 9390, of_monitors()),
        Prometheus::start("by the document", 9391, documented()),
    ];
    for server in &mut servers {
        while !server.is_ready().await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let (refused, broken) =
        (TestNamespace::new("quota").await.unwrap(), TestNamespace::new("webhook").await.unwrap());
    refuse_jobs(&refused).await;
    let webhooks = break_jobs(&broken).await;
    for test in [&refused, &broken] {
        test.apply(&test.job("job")).await;
    }
    test.put_text("bad.jsonl", "not json\n");
    let mut failing = test.job("failing");
    failing["spec"]["dataset"]["train"] = json!(test.uri("bad.jsonl"));
    let mut waiting = test.job("waiting");
    waiting["spec"]["approval"] = json!("Manual");
    let mut large = test.job("large");
    large["spec"]["resources"] = json!({"requests": {"cpu": "64"}});
    let mut watched = test.long_job(WATCHED);
    test.put_text("validation.jsonl", &rows(12..16));
    watched["spec"]["dataset"]["validation"] = json!(test.uri("validation.jsonl"));
    watched["spec"]["training"]["maxSteps"] = json!(4000);
    watched["spec"]["training"]["evaluationSteps"] = json!(100);
    for job in [&watched, &failing, &waiting, &large] {
        test.apply(job).await;
    }
    let pod = test.wait_for_training(WATCHED).await;
    // Jobs are counted every ten seconds.
    test.until("a job is counted that trains", || async {
        let counted = r#"finetune_jobs{reason="Training"}"#;
        (!servers[1].numbers(counted).await.is_empty()).then_some(())
    })
    .await;
    test.pods.evict(&pod.name_any(), &EvictParams::default()).await.unwrap();
    test.wait("failing", "False InvalidDataset").await;
    test.wait("waiting", "Unknown AwaitingApproval").await;
    test.wait("large", "Unknown Unschedulable").await;
    refused.wait("job", "Unknown JobRefused").await;
    test.wait(WATCHED, "True Succeeded").await;

    let of_job =
        [("namespace", test.namespace.as_str()), ("finetunejob", WATCHED), ("run_id", ".*")];
    // As with the choice "All".
    let of_operator = [("job", ".*"), ("instance", ".*"), ("namespace", ".*")];
    for server in &servers {
        let mut open = questions("job.json", &of_job.into());
        open.extend(questions("operator.json", &of_operator.into()));
        open.extend(of_alerts(server).await);
        eprintln!("{}: {} queries", server.name, open.len());
        let started = std::time::Instant::now();
        loop {
            let mut unanswered = Vec::new();
            for question in open {
                if !has_data(server, &question).await {
                    unanswered.push(question);
                }
            }
            open = unanswered;
            let places: Vec<&str> = open.iter().map(|question| question.place.as_str()).collect();
            if places.is_empty() {
                break;
            }
            assert!(started.elapsed() < PATIENCE, "{}: no data: {places:#?}", server.name);
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
    for server in &servers {
        let alerts = server.alerts().await;
        assert_eq!(alerts.len(), 17, "{alerts:?}");
        for (name, expression, error) in alerts {
            assert_eq!(error, "", "{name}");
            // A user's quota and policies answer 403 as well: that is no fault of the operator.
            if name == "FineTuneOperatorRequestsRefused" {
                // 401 is what a pod of the operator gets that was deleted by force.
                let refused = server.labels(&expression).await;
                let lasting = refused.iter().filter(|series| series["code"] != "401");
                assert_eq!(lasting.collect::<Vec<_>>(), Vec::<&Value>::new());
            }
        }
        // One job failed and one try was ended: the first of its kind counts too.
        for (place, words) in [("the end", "result=\"failed\"}[1d]"), ("a disruption", "cause")] {
            let panels = questions("operator.json", &of_operator.into());
            let panel = panels.iter().find(|question| question.expression.contains(words)).unwrap();
            let numbers = server.numbers(&panel.expression).await;
            assert!(
                numbers.iter().any(|number| *number >= 1.0),
                "{place} is not counted: {numbers:?}"
            );
        }
    }
    webhooks.delete(WEBHOOK, &DeleteParams::default()).await.unwrap();
}
