//! A complete plan.

use finetune_api::Fallback;
use finetune_contract::{Problem, PublishedResult, RunConfig, RunId};
use serde::Serialize;

use super::{accelerators::Estimate, choices::Choice, sizing::Memory};

/// A run with nothing left open, and why.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RunPlan {
    /// The trainer's configuration.
    pub run_config: RunConfig,
    /// Each value with its reason, in reading order.
    pub decisions: Vec<Choice>,
    /// What was considered and not taken.
    pub rejected: Vec<Choice>,
    /// Memory by term.
    pub memory: Memory,
    /// Bytes of a checkpoint.
    #[serde(skip)]
    pub checkpoint_bytes: u64,
    /// What follows if memory runs out, in this order.
    pub fallbacks: Vec<Fallback>,
    /// Where it runs, for people: `here`, or `on one A100-80GB`.
    pub place: String,
    /// Bytes of memory there, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<u64>,
    /// Estimated seconds of training there, if its speed is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The share of the place's matrix speed that is assumed, from 0 to 1.
    pub efficiency: f64,
    /// How the run would do elsewhere.
    pub accelerators: Vec<Estimate>,
    /// What the preflight found worth saying.
    pub warnings: Vec<Problem>,
    /// The result at the output, if it was made from this run's very inputs: there is nothing to train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub already_published: Option<PublishedResult>,
}

impl RunPlan {
    /// Reports that there is nothing to train, if so.
    pub fn nothing_to_train(&self) -> Option<String> {
        let PublishedResult { run_id, .. } = self.already_published.as_ref()?;
        Some(nothing_trained(&self.run_config.output.uri, run_id))
    }
}

/// Reports that a run of the same inputs published their result before.
pub fn nothing_trained(uri: impl std::fmt::Display, by: &RunId) -> String {
    format!("the same inputs are already published at {uri} (by run {by}); nothing was trained")
}
