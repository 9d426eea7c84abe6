//! What the administrator decides, read once from a file that the Helm chart writes.

use std::collections::BTreeMap;

use finetune_plan::accelerators::Accelerator;
use serde::{Deserialize, Serialize};

/// The operator's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Settings {
    /// The image of preflights, and of training where the accelerator names none of its own; users
    /// cannot choose one.
    pub trainer_image: String,
    /// When the kubelet pulls it: `Always`, `IfNotPresent` or `Never`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<String>,
    /// Names of Secrets of the job's namespace that the kubelet pulls it with.
    #[serde(default)]
    pub image_pull_secrets: Vec<String>,
    /// The namespaces watched; empty for all.
    #[serde(default)]
    pub namespaces: Vec<String>,
    /// The namespaces whose trainer pods are confined by a NetworkPolicy: there a run of several ranks
    /// gets one of its own.
    #[serde(default)]
    pub confined_namespaces: Vec<String>,
    /// What a run may be placed on, in order of preference.
    pub accelerators: Vec<Accelerator>,
    /// What a preflight's pod asks for.
    #[serde(default)]
    pub preflight: PreflightSize,
    /// How often a failed attempt is retried, for each of preflight and training.
    #[serde(default = "default_retries")]
    pub retries: i32,
    /// How often an attempt that the cluster ended is retried.
    #[serde(default = "default_disruptions")]
    pub disruptions: i32,
    /// Grace period of pods, in seconds between SIGTERM and SIGKILL: time to save a checkpoint.
    #[serde(default = "default_grace")]
    pub termination_grace_period_seconds: i64,
    /// Seconds a pod may be unable to start because its image, a Secret or a ConfigMap is missing.
    #[serde(default = "default_start")]
    pub startup_deadline_seconds: i64,
    /// Seconds after which a pod that should be gone, but whose node does not answer, is deleted by force, so
    /// that the run resumes elsewhere; 0: never. A pod that still trains on such a node could then write to the
    /// same output.
    #[serde(default)]
    pub lost_node_timeout_seconds: i64,
    /// Seconds without progress after which a training attempt whose trainer still answers is restarted from
    /// its newest checkpoint; 0: never.
    #[serde(default = "default_stall_timeout")]
    pub stall_timeout_seconds: i64,
    /// Hosts, or host:port, that variables of a store may name, the administrator's own included; the
    /// trainer refuses others. Empty: any.
    #[serde(default)]
    pub allowed_endpoints: Vec<String>,
    /// Environment variables of every pod, such as an endpoint; no secrets.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

/// What a preflight's pod asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PreflightSize {
    /// CPU cores.
    pub cpu: f64,
    /// The most CPU cores it may use; without a limit if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_limit: Option<f64>,
    /// Memory, in GiB.
    pub memory_gi_b: f64,
    /// Ephemeral storage, in GiB: what is fetched of the model, and the tokens.
    pub storage_gi_b: f64,
}

impl Default for PreflightSize {
    fn default() -> Self {
        Self { cpu: 1.0, cpu_limit: None, memory_gi_b: 2.0, storage_gi_b: 8.0 }
    }
}

const fn default_retries() -> i32 {
    3
}

const fn default_disruptions() -> i32 {
    20
}

const fn default_grace() -> i64 {
    120
}

const fn default_start() -> i64 {
    600
}

const fn default_stall_timeout() -> i64 {
    7200
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Not YAML, an unknown word, or a word without a value.
    #[error("the settings are not valid: {0}")]
    Syntax(String),
    /// A value out of bounds.
    #[error("{field} of the settings is {value}, must be {allowed}")]
    Value {
        /// Which.
        field: String,
        /// The value.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
}

impl Settings {
    /// Reads settings.
    ///
    /// # Errors
    /// [`SettingsError`] for the first thing wrong with them.
    pub fn parse(text: &str) -> Result<Self, SettingsError> {
        let settings: Self = serde_saphyr::from_str(text)
            .map_err(|error| SettingsError::Syntax(error.to_string()))?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<(), SettingsError> {
        let refuse = |field: &str, value: String, allowed| {
            Err(SettingsError::Value { field: field.to_owned(), value, allowed })
        };
        if self.trainer_image.trim().is_empty() {
            return refuse("trainerImage", "empty".to_owned(), "an image reference");
        }
        for (field, value, range) in [
            ("retries", i64::from(self.retries), 0..=100),
            ("disruptions", i64::from(self.disruptions), 0..=1000),
            ("terminationGracePeriodSeconds", self.termination_grace_period_seconds, 1..=86_400),
            ("startupDeadlineSeconds", self.startup_deadline_seconds, 10..=86_400),
            ("lostNodeTimeoutSeconds", self.lost_node_timeout_seconds, 0..=604_800),
            ("stallTimeoutSeconds", self.stall_timeout_seconds, 0..=604_800),
        ] {
            if !range.contains(&value) {
                return refuse(field, value.to_string(), "in the bounds of values.schema.json");
            }
        }
        let PreflightSize { cpu, cpu_limit, memory_gi_b, storage_gi_b } = self.preflight;
        for (field, value) in [
            ("preflight.cpu", cpu),
            ("preflight.memoryGiB", memory_gi_b),
            ("preflight.storageGiB", storage_gi_b),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return refuse(field, value.to_string(), "a number above 0");
            }
        }
        if let Some(limit) = cpu_limit.filter(|limit| !(limit.is_finite() && *limit >= cpu)) {
            let allowed = "a number of cores, at least preflight.cpu";
            return refuse("preflight.cpuLimit", limit.to_string(), allowed);
        }
        for (index, accelerator) in self.accelerators.iter().enumerate() {
            let is_second =
                self.accelerators[..index].iter().any(|other| other.name == accelerator.name);
            if is_second {
                return refuse("name of an accelerator", accelerator.name.clone(), "used once");
            }
            if let Some((field, value)) = accelerator.fault() {
                let field = format!("{field} of accelerator {:?}", accelerator.name);
                return refuse(&field, value.to_string(), "a number above 0");
            }
        }
        Ok(())
    }

    /// Finds an accelerator by name.
    pub fn accelerator(&self, name: &str) -> Option<&Accelerator> {
        self.accelerators.iter().find(|accelerator| accelerator.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::Settings;

    const MINIMAL: &str = "trainerImage: trainer:1\naccelerators:\n- {name: cpu, memoryGiB: 8, bf16Tflops: 0.5, fp32Tflops: 0.2, hasBf16: true}\n";

    fn check(text: &str) -> String {
        Settings::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn have_defaults() {
        let settings = Settings::parse(MINIMAL).unwrap();
        assert_eq!((settings.retries, settings.disruptions), (3, 20));
        assert!(settings.accelerator("cpu").is_some());
        assert!(settings.accelerator("gpu").is_none());
    }

    #[test]
    fn are_refused_with_the_reason() {
        insta::assert_snapshot!(check(&MINIMAL.replace("trainer:1", "''")), @"trainerImage of the settings is empty, must be an image reference");
        insta::assert_snapshot!(check(&format!("{MINIMAL}retries: -1\n")), @"retries of the settings is -1, must be in the bounds of values.schema.json");
        insta::assert_snapshot!(check(&MINIMAL.replace("GiB: 8", "GiB: 0")), @r#"memoryGiB of accelerator "cpu" of the settings is 0, must be a number above 0"#);
        let cpu = MINIMAL.lines().last().unwrap_or_default();
        insta::assert_snapshot!(check(&format!("{MINIMAL}{cpu}\n")), @"name of an accelerator of the settings is cpu, must be used once");
        insta::assert_snapshot!(check(&format!("{MINIMAL}preflight: {{cpu: 1, cpuLimit: 0.5}}\n")), @"preflight.cpuLimit of the settings is 0.5, must be a number of cores, at least preflight.cpu");
        insta::assert_snapshot!(check(&format!("{MINIMAL}preflight: {{cpu: 0}}\n")), @"preflight.cpu of the settings is 0, must be a number above 0");
        assert!(check(&format!("{MINIMAL}retry: 1\n")).contains("retry"));
    }
}
