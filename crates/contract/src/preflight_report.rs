//! What the preflight found: the model's shape, the dataset's census, and every problem.

use serde::{Deserialize, Serialize};

use crate::{
    artifact::PublishedResult,
    cost::CostFacts,
    document::{Document, TERMINATION_MESSAGE_LIMIT, render},
    exit_code::ExitCode,
    settings::{DatasetFormat, RunId},
};

/// The whole output of `finetune-trainer preflight`.
///
/// # Guarantees
/// After [`PreflightReport::fit`], its JSON has at most [`TERMINATION_MESSAGE_LIMIT`] bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PreflightReport {
    /// [`crate::CONTRACT_VERSION`].
    pub version: u32,
    /// The run this belongs to.
    pub run_id: RunId,
    /// What makes the run impossible; the first few. Empty means the run can be planned.
    pub problems: Vec<Problem>,
    /// How many problems there are, shown or not; a bad line counts as one.
    pub problems_total: u64,
    /// What the user should know but may ignore.
    pub warnings: Vec<Problem>,
    /// The base model, if it could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelFacts>,
    /// What `loraConfig` means on the base model, if it means anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraFacts>,
    /// The training rows, if they could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<DatasetCensus>,
    /// The held-out rows, if given and readable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<DatasetCensus>,
    /// How many validation rows also occur in the training rows; a lower bound as
    /// [`DatasetCensus::duplicate_rows`] is.
    pub overlapping_rows: u64,
    /// The day it was for the chat template, as `2026-01-31`; absent if the template does not ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_date: Option<String>,
    /// What lies at the output, if it could be reached and written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputState>,
    /// The result there, if it was made from the same rows, model and start. Whether its settings are
    /// the same too is known once the run is planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published: Option<PublishedResult>,
    /// The machine the preflight ran on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineFacts>,
}

impl Document for PreflightReport {
    const NAME: &'static str = "preflight report";
}

impl PreflightReport {
    /// Drops shown problems, then warnings, then length points, from the end of each, until the
    /// JSON fits the termination message. The totals stay.
    #[must_use]
    pub fn fit(mut self) -> Self {
        while render(&self).len() > TERMINATION_MESSAGE_LIMIT {
            if self.problems.len() > 1 {
                self.problems.pop();
            } else if self.warnings.pop().is_some() {
            } else if [&mut self.validation, &mut self.train]
                .into_iter()
                .flatten()
                .any(|census| census.file_names.pop().is_some() || census.lengths.pop().is_some())
            {
                // One name or point was dropped.
            } else if let Some(problem) =
                self.problems.first_mut().filter(|problem| problem.message.len() > 200)
            {
                let end = problem.message.floor_char_boundary(problem.message.len() / 2);
                problem.message.truncate(end);
                problem.message.push('…');
            } else {
                break;
            }
        }
        self
    }
}

/// One thing the user must change, or should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Problem {
    /// The kind, for code and metrics.
    pub reason: ProblemReason,
    /// Where: a field path (`spec.loraConfig.r`), a file and line (`train.jsonl:17`), a tensor.
    pub location: String,
    /// What is wrong, the value seen, what is allowed, how to fix it.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { reason: _, location, message } = self;
        write!(formatter, "{location}: {message}")
    }
}

/// The kinds of [`Problem`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ProblemReason {
    /// A field of the manifest has a value that cannot work.
    InvalidSpec,
    /// Nothing is at a URI.
    NotFound,
    /// A store or hub refuses the credentials, or wants some.
    PermissionDenied,
    /// A store or hub does not answer; a retry may help.
    Unavailable,
    /// The model's architecture or a key of its config is not one the trainer knows.
    UnsupportedModel,
    /// The model's files are damaged, unsafe or contradict each other.
    InvalidModel,
    /// The tokenizer or its chat template is missing or cannot be used.
    InvalidTokenizer,
    /// A row or file of the dataset cannot be used.
    InvalidDataset,
    /// Nothing in the dataset can be trained on.
    NothingToTrain,
    /// Rows are longer than the context.
    Overflow,
    /// Rows occur more than once, or in both splits.
    DuplicateRows,
    /// A result of different inputs is at the output.
    OutputExists,
    /// A consumer such as vLLM refuses what the run would publish.
    Servability,
}

impl ProblemReason {
    /// Returns the process exit status that goes with the reason.
    pub const fn exit_code(self) -> ExitCode {
        match self {
            Self::InvalidSpec | Self::NotFound | Self::OutputExists | Self::Servability => {
                ExitCode::BadConfiguration
            }
            Self::UnsupportedModel
            | Self::InvalidModel
            | Self::InvalidTokenizer
            | Self::InvalidDataset
            | Self::NothingToTrain
            | Self::Overflow
            | Self::DuplicateRows => ExitCode::BadData,
            Self::PermissionDenied => ExitCode::PermissionDenied,
            Self::Unavailable => ExitCode::StoreUnavailable,
        }
    }
}

/// One of the two sets of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Split {
    /// The rows trained on.
    Train,
    /// The rows held out.
    Validation,
}

/// The base model's exact shape; all the plan needs to size a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelFacts {
    /// `model_type` of config.json.
    pub model_type: String,
    /// The commit a hub revision resolved to; absent for other stores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved_revision: Option<String>,
    /// Elements of all tensors, a tied head counted once.
    pub parameters: u64,
    /// Bytes of the weight files.
    pub weight_bytes: u64,
    /// The widest element type of the weights on disk, as safetensors names it (`BF16`).
    pub weight_dtype: String,
    /// Model width.
    pub hidden_size: u32,
    /// Feed-forward width.
    pub intermediate_size: u32,
    /// Number of blocks.
    pub num_hidden_layers: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key/value heads.
    pub num_key_value_heads: u32,
    /// Width of one head.
    pub head_dim: u32,
    /// Rows of the embedding, those of added tokens included.
    pub vocab_size: u32,
    /// Tokens of `model.addedTokens` that the tokenizer did not have.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub added_tokens: u32,
    /// Longest position the model was made for.
    pub max_position_embeddings: u32,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the tokenizer has a chat template.
    pub has_chat_template: bool,
    /// Every module that holds weights, by leaf name.
    pub modules: Vec<ModuleShape>,
    /// What the model costs to train; read it with [`ModelFacts::cost()`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<CostFacts>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// The modules that `loraConfig` means on the base model; the plan takes them as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoraFacts {
    /// The modules that get an adapter, by leaf name.
    pub targets: Vec<ModuleShape>,
    /// The modules that are trained whole, by leaf name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub saved: Vec<ModuleShape>,
    /// Whether a merged result gets an output head of its own: the base model's is its embedding, and
    /// one of them is trained without the other.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unties: bool,
}

/// The shape of all modules of one leaf name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModuleShape {
    /// The leaf: `q_proj`, `embed_tokens`, `input_layernorm`.
    pub name: String,
    /// Output width (rows of `weight`).
    pub out_features: u32,
    /// Input width (columns of `weight`); 0 for a vector such as a norm's.
    pub in_features: u32,
    /// Whether it has a bias of `out_features`.
    pub bias: bool,
    /// How many there are.
    pub count: u32,
}

impl ModuleShape {
    /// Returns the elements of all modules of this leaf.
    pub fn parameters(&self) -> u64 {
        let (out, width) = (u64::from(self.out_features), u64::from(self.in_features.max(1)));
        u64::from(self.count) * (out * width + if self.bias { out } else { 0 })
    }

    /// Returns the elements of rank-`r` adapters on all modules of this leaf.
    pub fn lora_parameters(&self, r: u32) -> u64 {
        u64::from(self.count)
            * u64::from(r)
            * (u64::from(self.out_features) + u64::from(self.in_features))
    }
}

/// What was counted while reading one split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatasetCensus {
    /// The shape found.
    pub format: DatasetFormat,
    /// Files read.
    pub files: u64,
    /// The names of the first ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub file_names: Vec<String>,
    /// Usable rows.
    pub rows: u64,
    /// Rows that cannot be used: each is a problem, or left out if that was asked for.
    pub bad_rows: u64,
    /// Tokens of all usable rows, before any truncation.
    pub tokens: u64,
    /// Tokens of them that are predicted.
    pub target_tokens: u64,
    /// Rows that repeat an earlier row. A lower bound beyond 4 million distinct rows: only the first
    /// so many are remembered, and a repetition of a later one is not seen.
    pub duplicate_rows: u64,
    /// Tokens of the longest row.
    pub max_tokens: u32,
    /// Half of the rows have at most this many tokens.
    pub p50_tokens: u32,
    /// 95 % of the rows have at most this many tokens.
    pub p95_tokens: u32,
    /// SHA-256 over the lines of all files in order, blank ones left out, white space at both ends of
    /// each taken off and one `\n` put after it: what was trained on, exactly.
    pub sha256: String,
    /// What would happen at each of some context lengths, ascending.
    pub lengths: Vec<LengthPoint>,
}

/// What a context length would do to a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LengthPoint {
    /// The context length, in tokens.
    pub context: u32,
    /// Rows longer than it.
    pub over: u64,
    /// Tokens that would be cut off.
    pub cut: u64,
    /// Rows left without a target once cut.
    pub empty: u64,
    /// Sequences after packing the cut rows that still have a target.
    pub packed: u64,
    /// No row has more targets than this once cut; absent in reports of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_targets: Option<u32>,
    /// No sequence of packed rows has more targets than this; absent in reports of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_packed_targets: Option<u32>,
}

/// What lies at the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OutputState {
    /// Nothing.
    Vacant,
    /// A complete result of the same rows, model and start.
    #[serde(rename = "publishedByThisRun")]
    SameInputs,
    /// A complete result of anything else, or nobody can tell of what.
    #[serde(rename = "publishedByAnotherRun")]
    OtherInputs,
}

/// The machine the preflight ran on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MachineFacts {
    /// The CPU's name.
    pub cpu: String,
    /// CPUs this process may use.
    pub cores: u32,
    /// Bytes of memory this process may use (the cgroup's limit where there is one).
    pub memory_bytes: u64,
    /// Whether the CPU multiplies bf16 natively (AVX512-BF16 or AMX).
    pub native_bf16: bool,
    /// The instructions that multiply bf16 fastest, as measured: `amx`, `avx512-bf16` or `avx512`;
    /// absent where libtorch multiplies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bf16_kernel: Option<String>,
    /// Measured speed of an fp32 matrix product; absent if not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fp32_gflops: Option<f64>,
    /// Measured speed of a bf16 matrix product; absent if not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bf16_gflops: Option<f64>,
}
