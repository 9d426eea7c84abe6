//! Resolves a spec into the words of the contract, with the defaults that need no facts.

use finetune_api::{Dataset, FineTuneJob, FineTuneJobSpec, Names, is_all_linear};
use finetune_contract::{
    CONTRACT_VERSION, DatasetSource, LoraSettings, ModelSource, ModuleNames, ObjectUri,
    OutputTarget, PreflightConfig, Problem, ProblemReason, RenderingSettings, RowSource, RunId,
    TargetModules,
};
use sha2::{Digest, Sha256};

/// The seed unless one is set: fixed, so that a run can be repeated.
pub(super) const DEFAULT_SEED: u64 = 42;

/// What a run reads and writes, in the words of the contract.
#[derive(Debug, Clone)]
pub(super) struct Sources {
    pub(super) model: ModelSource,
    pub(super) dataset: DatasetSource,
    pub(super) initial_adapter: Option<ObjectUri>,
    pub(super) initial_checkpoint: Option<ObjectUri>,
    pub(super) output: OutputTarget,
}

impl Sources {
    /// Parses the URIs of a spec.
    ///
    /// # Errors
    /// A [`Problem`] for each that is no object URI: a CRD's pattern sees only its scheme.
    pub(super) fn of(spec: &FineTuneJobSpec) -> Result<Self, Vec<Problem>> {
        let problems = unusable_uris(spec);
        if !problems.is_empty() {
            return Err(problems);
        }
        let parse = |uri: &String| uri.parse().expect("every URI of the spec can be parsed");
        let sources = dataset(spec, parse);
        Ok(Self {
            model: ModelSource {
                uri: parse(&spec.model.uri),
                revision: spec.model.revision.clone(),
                added_tokens: spec.model.added_tokens.clone().unwrap_or_default(),
            },
            dataset: sources,
            initial_adapter: spec.initial_adapter.as_ref().map(|adapter| parse(&adapter.uri)),
            initial_checkpoint: spec
                .initial_checkpoint
                .as_ref()
                .map(|checkpoint| parse(&checkpoint.uri)),
            output: OutputTarget {
                uri: parse(&spec.output.uri),
                merge: spec.output.merge.unwrap_or(false),
                overwrite: spec.output.overwrite.unwrap_or(false),
                base_model_name: spec.output.base_model_name.clone(),
            },
        })
    }
}

/// Lists the URIs of a spec that cannot be parsed, each with what is wrong with it.
pub fn unusable_uris(spec: &FineTuneJobSpec) -> Vec<Problem> {
    let problem = |(location, uri): (String, &str)| {
        let error = ObjectUri::parse(uri).err()?;
        Some(Problem { reason: ProblemReason::InvalidSpec, location, message: error.to_string() })
    };
    spec.uris().filter_map(problem).collect()
}

/// Returns the configuration of the preflight of `job`.
///
/// # Errors
/// A [`Problem`] for each URI that cannot be parsed.
pub fn preflight_config(
    job: &FineTuneJob,
    measure_machine: bool,
) -> Result<PreflightConfig, Vec<Problem>> {
    let training = job.spec.training.as_ref();
    let Sources { model, mut dataset, initial_adapter, initial_checkpoint, output } =
        Sources::of(&job.spec)?;
    let day = &mut dataset.rendering.template_date;
    *day = day.take().or_else(|| creation_day(job));
    Ok(PreflightConfig {
        version: CONTRACT_VERSION,
        run_id: run_id(job),
        model,
        dataset,
        lora: lora(&job.spec),
        initial_adapter,
        initial_checkpoint,
        context_length: training
            .and_then(|training| training.context_length)
            .map(i32::unsigned_abs),
        output,
        measure_machine,
    })
}

/// Names the run: the job's name and eight digits.
///
/// In a cluster the digits stand for the very object: its namespace, name and UID. A FineTuneJob that
/// is deleted and created again is another run, and never shares checkpoints or results with the first
/// or with a namesake in another namespace. A manifest on disk has no UID: there the digits stand for
/// what the manifest says, so that the same command resumes the run it began.
pub fn run_id(job: &FineTuneJob) -> RunId {
    let name = job.metadata.name.as_deref().unwrap_or("job");
    let text = match &job.metadata.uid {
        // No part can hold a slash.
        Some(uid) => {
            let namespace = job.metadata.namespace.as_deref().unwrap_or_default();
            format!("{namespace}/{name}/{uid}")
        }
        None => canonical_spec(job),
    };
    let digest = Sha256::digest(text.as_bytes());
    let digits = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
    RunId(format!("{name}-{digits:08x}"))
}

/// Returns the one text of what a manifest says about the result.
fn canonical_spec(job: &FineTuneJob) -> String {
    let spec = &job.spec;
    let mut canonical = serde_json::json!({
        "model": spec.model, "dataset": spec.dataset, "loraConfig": spec.lora_config,
        "training": spec.training, "output": spec.output,
    });
    // What was named before there were these fields keeps its name.
    if let Some(adapter) = &spec.initial_adapter {
        canonical["initialAdapter"] = serde_json::json!(adapter);
    }
    if let Some(checkpoint) = &spec.initial_checkpoint {
        canonical["initialCheckpoint"] = serde_json::json!(checkpoint);
    }
    // Whether maps of serde_json keep the order of insertion is a feature any crate of the build may
    // turn on; the name of a run must not depend on it.
    canonical.sort_all_objects();
    canonical.to_string()
}

/// Returns the SHA-256 of bytes in lower-case hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn dataset(spec: &FineTuneJobSpec, parse: impl Fn(&String) -> ObjectUri) -> DatasetSource {
    let dataset = &spec.dataset;
    let sources: Vec<RowSource> = dataset
        .sources
        .iter()
        .flatten()
        .map(|source| RowSource {
            uri: parse(&source.uri),
            format: source.format.unwrap_or_default(),
            weight: source.weight.unwrap_or(1.0),
        })
        .collect();
    let needs_seed = !sources.is_empty() || dataset.validation_fraction.is_some();
    DatasetSource {
        train: dataset.train.as_ref().map(&parse),
        validation: dataset.validation.as_ref().map(&parse),
        validation_fraction: dataset.validation_fraction,
        format: dataset.format.unwrap_or_default(),
        train_on: dataset.train_on.unwrap_or_default(),
        ignored_keys: dataset.ignored_keys.clone().unwrap_or_default(),
        on_invalid_row: dataset.on_invalid_row.unwrap_or_default(),
        on_overflow: dataset.on_overflow.unwrap_or_default(),
        rendering: rendering(dataset),
        seed: needs_seed.then(|| seed(spec)),
        sources,
    }
}

/// Returns the seed of all randomness.
pub(super) fn seed(spec: &FineTuneJobSpec) -> u64 {
    let seed = spec.training.as_ref().and_then(|training| training.seed);
    seed.map_or(DEFAULT_SEED, i64::unsigned_abs)
}

fn rendering(dataset: &Dataset) -> RenderingSettings {
    RenderingSettings {
        chat_template: dataset.chat_template.clone(),
        reasoning: dataset.reasoning.unwrap_or_default(),
        template_date: dataset.template_date.clone(),
    }
}

/// Returns the day a job was created, as `2026-01-31`; none of a job that no cluster has.
fn creation_day(job: &FineTuneJob) -> Option<String> {
    let created = job.metadata.creation_timestamp.as_ref()?;
    Some(created.0.to_string().chars().take(10).collect())
}

pub(super) fn lora(spec: &FineTuneJobSpec) -> Option<LoraSettings> {
    let lora = spec.lora_config.as_ref()?;
    Some(LoraSettings {
        r: lora.r.unwrap_or(8).unsigned_abs(),
        lora_alpha: lora.lora_alpha.unwrap_or(16.0),
        lora_dropout: lora.lora_dropout.unwrap_or(0.05),
        target_modules: match &lora.target_modules {
            None => TargetModules::AllLinear,
            Some(Names::Text(word)) if is_all_linear(word) => TargetModules::AllLinear,
            Some(Names::Text(pattern)) => TargetModules::Pattern(pattern.clone()),
            // What cannot be used is refused before; no module has such a name.
            Some(Names::Other(value)) => TargetModules::List(vec![value.to_string()]),
            Some(Names::List(list)) => match list.as_slice() {
                [word] if is_all_linear(word) => TargetModules::AllLinear,
                names => TargetModules::List(names.to_vec()),
            },
        },
        exclude_modules: lora.exclude_modules.clone().map(|names| match names {
            Names::List(list) => ModuleNames::List(list),
            Names::Text(pattern) => ModuleNames::Pattern(pattern),
            Names::Other(value) => ModuleNames::List(vec![value.to_string()]),
        }),
        layers_to_transform: lora
            .layers_to_transform
            .iter()
            .flatten()
            .map(|layer| layer.unsigned_abs())
            .collect(),
        modules_to_save: lora.modules_to_save.clone().unwrap_or_default(),
        use_rslora: lora.use_rslora.unwrap_or(false),
    })
}

/// Describes which module names of a job cannot be used, and why: an apiserver lets them pass.
pub fn unusable_names(job: &FineTuneJob) -> Option<String> {
    let lora = job.spec.lora_config.as_ref()?;
    [("targetModules", &lora.target_modules), ("excludeModules", &lora.exclude_modules)]
        .into_iter()
        .find_map(|(field, names)| {
            let fault = names.as_ref()?.fault()?;
            Some(format!("spec.loraConfig.{field} {fault}"))
        })
}

#[cfg(test)]
mod tests {
    use finetune_api::manifest;
    use finetune_contract::TargetModules;

    use super::{lora, preflight_config, run_id};

    #[test]
    fn all_linear_is_a_word_however_it_is_written() {
        for names in ["all-linear", "All-Linear", "[all-linear]"] {
            let minimal = include_str!("../../../examples/minimal.yaml");
            let text = format!("{minimal}  loraConfig: {{targetModules: {names}}}\n");
            let settings = lora(&manifest::parse(&text).unwrap().spec).unwrap();
            assert_eq!(settings.target_modules, TargetModules::AllLinear, "{names}");
        }
    }

    #[test]
    fn every_uri_that_cannot_be_parsed_is_named() {
        let mut job = manifest::parse(include_str!("../../../examples/minimal.yaml")).unwrap();
        job.spec.model.uri = "ftp://models/base".to_owned();
        job.spec.dataset.train = Some("s3://bucket/../rows".to_owned());
        job.spec.dataset.chat_template = Some("s3:///template.jinja".to_owned());
        job.spec.output.uri = "s3://key:secret@bucket/out".to_owned();
        let problems = preflight_config(&job, false).unwrap_err();
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(problems.join("\n"), @r#"
        spec.model.uri: "ftp://models/base" has the unknown scheme "ftp": use hf, s3, gs, az, pvc or file
        spec.dataset.train: "s3://bucket/../rows" contains a relative path segment (`.` or `..`), which an object URI cannot have
        spec.output.uri: "s3://…@bucket" contains credentials before `@` (put them into a Secret), which an object URI cannot have
        spec.dataset.chatTemplate: "s3:///template.jinja" does not name a bucket (s3://bucket/path)
        "#);
    }

    fn check(namespace: &str, name: &str, uid: Option<&str>) -> String {
        let mut job = manifest::parse(include_str!("../../../examples/minimal.yaml")).unwrap();
        job.metadata.namespace = Some(namespace.to_owned());
        job.metadata.name = Some(name.to_owned());
        job.metadata.uid = uid.map(str::to_owned);
        run_id(&job).0
    }

    #[test]
    fn an_object_of_a_cluster_is_one_run_and_no_other_object_is_it() {
        let first = check("team", "bot", Some("u-1"));
        assert_eq!(check("team", "bot", Some("u-1")), first);
        assert_ne!(check("team", "bot", Some("u-2")), first, "created again");
        assert_ne!(check("other", "bot", Some("u-1")), first, "another namespace");
        assert_ne!(check("team", "bot-2", Some("u-1")), first);
        assert!(first.starts_with("bot-") && first.len() == "bot-".len() + 8, "{first}");
    }

    #[test]
    fn a_manifest_on_disk_is_one_run_wherever_it_would_be_created() {
        assert_eq!(check("team", "minimal", None), "minimal-c475808c");
        assert_eq!(check("other", "minimal", None), "minimal-c475808c");
    }

    #[test]
    fn a_manifest_that_was_read_from_a_cluster_is_no_run_of_the_cluster() {
        let text = include_str!("../../../examples/minimal.yaml");
        let read = text.replace("metadata:", "metadata:\n  uid: u-1");
        let read =
            manifest::parse(&read.replace("metadata:\n  uid: u-1 {", "metadata: {uid: u-1, "));
        assert_eq!(run_id(&read.unwrap()).0, "minimal-c475808c");
    }
}
