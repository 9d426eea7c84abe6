//! Resolves the requested adapter against the base model.

use finetune_contract::{LoraFacts, LoraSettings, ProblemReason};

use crate::{
    architecture::{config::ModelConfig, names},
    data::formats::nearest,
    lora::{
        Error,
        trainable::{LoraAdapters, Trainable},
    },
    preflight::findings::Findings,
};

/// The values of `--max-lora-rank` that vLLM supports.
const VLLM_RANKS: [u32; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];

/// Resolves the settings; `None` if they do not fit the model.
pub(super) fn check(
    lora: &LoraSettings,
    model: &ModelConfig,
    findings: &mut Findings,
) -> Option<LoraFacts> {
    match Trainable::lora(model, lora) {
        Ok(Trainable::Lora(adapters)) => {
            warn_about_servability(lora, &adapters, findings);
            Some(adapters.facts(model))
        }
        Ok(Trainable::Frozen | Trainable::Full) => None,
        Err(error) => {
            let hint = match &error {
                Error::UnknownModule { name, known, .. } => {
                    let known: Vec<&str> = known.iter().map(String::as_str).collect();
                    nearest(name, &known)
                        .map_or(String::new(), |near| format!(" (did you mean {near:?}?)"))
                }
                _ => String::new(),
            };
            let location = format!("spec.{}", error.field());
            findings.add_problem(ProblemReason::InvalidSpec, &location, format!("{error}{hint}"));
            None
        }
    }
}

/// Warns about adapters that vLLM does not serve, or only with an option.
///
/// # Source
/// `vllm/lora/peft_helper.py` and `vllm/config/lora.py`, v0.22.
fn warn_about_servability(lora: &LoraSettings, adapters: &LoraAdapters, findings: &mut Findings) {
    let mut warn = |location: &str, message: String| {
        findings.add_warning(ProblemReason::Servability, location, message);
    };
    if !lora.modules_to_save.is_empty() {
        warn(
            "spec.loraConfig.modulesToSave",
            "vLLM rejects adapters with modulesToSave: set output.merge to true to serve the merged model".to_owned(),
        );
    }
    let outer = [names::EMBED_TOKENS, names::LM_HEAD]
        .into_iter()
        .find(|path| adapters.targets.contains_key(*path));
    if let Some(outer) = outer {
        warn(
            "spec.loraConfig.targetModules",
            format!(
                "vLLM does not serve adapters on {} of every model: set output.merge to true to serve the merged model",
                names::leaf(outer)
            ),
        );
    }
    match VLLM_RANKS.into_iter().find(|&rank| rank >= lora.r) {
        None => warn("spec.loraConfig.r", format!("vLLM serves ranks up to 512, not {}", lora.r)),
        Some(rank) if rank > 16 => {
            warn(
                "spec.loraConfig.r",
                format!("vLLM serves rank {} only with --max-lora-rank {rank}", lora.r),
            );
        }
        Some(_) => {}
    }
}
