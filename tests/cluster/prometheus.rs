//! A real Prometheus beside the cluster's pods, which finds them as a user's would.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{helm, test_namespace::variable};

const OPERATIONS: &str = include_str!("../../docs/OPERATIONS.md");
const RULES: &str = "charts/finetune-operator/files/rules.yaml";
/// A user's is 15 s or more; the test has less patience.
const INTERVAL: &str = "1s";

/// A server; it ends when this is dropped.
pub struct Prometheus {
    pub name: &'static str,
    child: Child,
    directory: TempDir,
    url: String,
    started: f64,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

impl Prometheus {
    /// Starts a server with the alerts and ways to find pods.
    pub fn start(name: &'static str, port: u16, mut scrapes: Vec<Value>) -> Self {
        for scrape in &mut scrapes {
            // Inside a cluster a Prometheus has an account of its own.
            for way in scrape["kubernetes_sd_configs"].as_array_mut().unwrap() {
                way["kubeconfig_file"] = json!(variable("KUBECONFIG"));
            }
        }
        let config = json!({
            "global": {
                "scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL,
            },
            "rule_files": [Path::new(env!("CARGO_MANIFEST_DIR")).join(RULES)],
            "scrape_configs": scrapes,
        });
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("config.yaml"), config.to_string()).unwrap();
        let log = File::create(path("log")).unwrap();
        let address = format!("127.0.0.1:{port}");
        let child = Command::new(variable("FINETUNE_TEST_PROMETHEUS"))
            .arg(format!("--config.file={}", path("config.yaml").display()))
            .arg(format!("--storage.tsdb.path={}", path("data").display()))
            .args(["--storage.tsdb.retention.size=200MB", "--log.level=warn"])
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { name, child, directory, url: format!("http://{address}"), started: now() }
    }

    /// Returns whether it answers; fails if it has ended.
    pub async fn is_ready(&mut self) -> bool {
        if let Some(status) = self.child.try_wait().unwrap() {
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap();
            panic!("{}: {status}: {log}", self.name);
        }
        let asked = reqwest::get(format!("{}/-/ready", self.url)).await;
        asked.is_ok_and(|answer| answer.status().is_success())
    }

    /// Asks its API; fails if a question is not accepted.
    async fn ask(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let url = format!("{}/api/v1/{path}", self.url);
        let url = reqwest::Url::parse_with_params(&url, parameters).unwrap();
        let answer: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
        assert_eq!(answer["status"], "success", "{}: {parameters:?}: {answer}", self.name);
        answer["data"].clone()
    }

    /// Returns the numbers an expression had since the start, as a panel would draw them.
    pub async fn numbers(&self, expression: &str) -> Vec<f64> {
        let series = self.series(expression).await;
        let values = series.iter().flat_map(|series| series["values"].as_array().unwrap());
        values.map(|value| value[1].as_str().unwrap().parse().unwrap()).collect()
    }

    /// Returns the labels of the series an expression had since the start.
    pub async fn labels(&self, expression: &str) -> Vec<Value> {
        self.series(expression)
            .await
            .into_iter()
            .map(|mut series| series["metric"].take())
            .collect()
    }

    async fn series(&self, expression: &str) -> Vec<Value> {
        let (start, end) = (self.started.to_string(), now().to_string());
        let parameters = [("query", expression), ("start", &start), ("end", &end), ("step", "2")];
        let mut data = self.ask("query_range", &parameters).await;
        serde_json::from_value(data["result"].take()).unwrap()
    }

    /// Returns the values of a label, as a dashboard's variable would list them.
    pub async fn label_values(&self, label: &str, selector: &str) -> Vec<String> {
        let data = self.ask(&format!("label/{label}/values"), &[("match[]", selector)]).await;
        serde_json::from_value(data).unwrap()
    }

    /// Returns every alert's name, expression and what went wrong with it.
    pub async fn alerts(&self) -> Vec<(String, String, String)> {
        let data = self.ask("rules", &[("type", "alert")]).await;
        let groups = data["groups"].as_array().unwrap();
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        rules
            .map(|rule| (text(&rule["name"]), text(&rule["query"]), text(&rule["lastError"])))
            .collect()
    }
}

/// Reads the scrapes that the document tells people without the Prometheus operator to write.
pub fn documented() -> Vec<Value> {
    let (_, metrics) = OPERATIONS.split_once("## Metrics").unwrap();
    let (_, block) = metrics.split_once("```yaml\n").unwrap();
    let (block, _) = block.split_once("```").unwrap();
    let config: Value = serde_saphyr::from_str(block).unwrap();
    config["scrape_configs"].as_array().unwrap().clone()
}

/// Makes of the chart's monitors the scrapes that the Prometheus operator makes of them.
///
/// Source: <https://github.com/prometheus-operator/prometheus-operator/blob/main/pkg/prometheus/promcfg.go>
pub fn of_monitors() -> Vec<Value> {
    let switches = ["monitoring.serviceMonitor.enabled=true", "monitoring.podMonitor.enabled=true"];
    let objects = helm::template(&["--set", switches[0], "--set", switches[1]]);
    let of_kind = |kind: &str| {
        objects.iter().find(|object| object["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
    };
    vec![service_scrape(of_kind("ServiceMonitor")), pod_scrape(of_kind("PodMonitor"))]
}

fn service_scrape(monitor: &Value) -> Value {
    let endpoint = &monitor["spec"]["endpoints"][0];
    let mut relabel = selected("service", monitor);
    relabel.extend([
        json!({"action": "keep", "source_labels": ["__meta_kubernetes_endpoint_port_name"],
            "regex": endpoint["port"]}),
        copied("__meta_kubernetes_namespace", "namespace"),
        copied("__meta_kubernetes_service_name", "service"),
        copied("__meta_kubernetes_pod_name", "pod"),
        copied("__meta_kubernetes_pod_container_name", "container"),
        json!({"action": "drop", "source_labels": ["__meta_kubernetes_pod_phase"],
            "regex": "(Failed|Succeeded)"}),
        copied("__meta_kubernetes_service_name", "job"),
        json!({"target_label": "endpoint", "replacement": endpoint["port"]}),
    ]);
    scrape("serviceMonitor", "endpoints", monitor, endpoint, relabel)
}

fn pod_scrape(monitor: &Value) -> Value {
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    let mut relabel = selected("pod", monitor);
    let name = format!(
        "{}/{}",
        word(&monitor["metadata"]["namespace"]),
        word(&monitor["metadata"]["name"])
    );
    relabel.extend([
        json!({"action": "drop", "source_labels": ["__meta_kubernetes_pod_phase"],
            "regex": "(Failed|Succeeded)"}),
        json!({"action": "keep", "source_labels": ["__meta_kubernetes_pod_container_port_name"],
            "regex": endpoint["port"]}),
        copied("__meta_kubernetes_namespace", "namespace"),
        copied("__meta_kubernetes_pod_container_name", "container"),
        copied("__meta_kubernetes_pod_name", "pod"),
        json!({"target_label": "job", "replacement": name}),
        json!({"target_label": "endpoint", "replacement": endpoint["port"]}),
    ]);
    scrape("podMonitor", "pod", monitor, endpoint, relabel)
}

fn scrape(
    kind: &str,
    role: &str,
    monitor: &Value,
    endpoint: &Value,
    mut relabel: Vec<Value>,
) -> Value {
    for own in endpoint["relabelings"].as_array().into_iter().flatten() {
        let mut rule = json!({"source_labels": own["sourceLabels"]});
        for (ours, theirs) in
            [("targetLabel", "target_label"), ("regex", "regex"), ("action", "action")]
        {
            if let Some(value) = own.get(ours) {
                rule[theirs] = value.clone();
            }
        }
        relabel.push(rule);
    }
    let (namespace, name) =
        (word(&monitor["metadata"]["namespace"]), word(&monitor["metadata"]["name"]));
    let mut way = json!({"role": role});
    if let Some(namespaces) = monitor["spec"]["namespaceSelector"].get("matchNames") {
        way["namespaces"] = json!({"names": namespaces});
    }
    json!({
        "job_name": format!("{kind}/{namespace}/{name}/0"),
        "honor_labels": endpoint["honorLabels"].as_bool().unwrap_or(false),
        "metrics_path": endpoint["path"],
        "kubernetes_sd_configs": [way],
        "relabel_configs": relabel,
    })
}

/// Keeps what has the labels that the monitor selects by.
fn selected(what: &str, monitor: &Value) -> Vec<Value> {
    let labels = monitor["spec"]["selector"]["matchLabels"].as_object().unwrap();
    let keep = |(key, value): (&String, &Value)| {
        let key: String =
            key.chars().map(|letter| if letter.is_alphanumeric() { letter } else { '_' }).collect();
        let [label, present] =
            ["label", "labelpresent"].map(|kind| format!("__meta_kubernetes_{what}_{kind}_{key}"));
        json!({"action": "keep", "source_labels": [label, present],
            "regex": format!("({});true", word(value))})
    };
    labels.iter().map(keep).collect()
}

fn copied(from: &str, to: &str) -> Value {
    json!({"source_labels": [from], "regex": "(.+)", "target_label": to})
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// Reads a dashboard's file.
pub fn dashboard(name: &str) -> Value {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboards").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
