//! Tells what is trained: what the trainer found `loraConfig` to mean on the model.

use finetune_contract::{
    LoraFacts, LoraSettings, ModelFacts, ModuleNames, ModuleShape, Problem, TargetModules,
};

use super::{choices::Choices, problems::invalid};

/// Returns how many parameters are trained.
pub(super) fn trained_parameters(
    model: &ModelFacts,
    lora: Option<&LoraSettings>,
    facts: Option<&LoraFacts>,
    decisions: &mut Choices,
    problems: &mut Vec<Problem>,
) -> u64 {
    let Some(lora) = lora else {
        decisions.add(
            "method",
            "full-parameter",
            format!("no loraConfig: all {} parameters are trained", model.parameters),
        );
        return model.parameters;
    };
    let Some(LoraFacts { targets, saved, unties }) = facts else {
        // The preflight says what it means, or why it means nothing.
        problems.push(invalid("spec.loraConfig", "could not be resolved on the model".to_owned()));
        return 0;
    };
    let adapters: u64 = targets.iter().map(|module| module.lora_parameters(lora.r)).sum();
    let trained = adapters + saved.iter().map(ModuleShape::parameters).sum::<u64>();
    let share = 100.0 * trained as f64 / model.parameters.max(1) as f64;
    decisions.add(
        "method",
        "LoRA",
        format!("loraConfig is given: {trained} trained parameters, {share:.2} % of the model"),
    );
    decisions.add("r", lora.r, format!("updates are scaled by {}", lora.scaling()));
    let value = match &lora.target_modules {
        TargetModules::AllLinear => "all-linear",
        TargetModules::List(_) => "a list",
        TargetModules::Pattern(_) => "a pattern",
    };
    decisions.add("targetModules", value, listed(targets, model));
    if let Some(excluded) = &lora.exclude_modules {
        let (value, reason) = match excluded {
            ModuleNames::List(names) => ("a list", names.join(", ")),
            ModuleNames::Pattern(pattern) => ("a pattern", pattern.clone()),
        };
        decisions.add("excludeModules", value, reason);
    }
    if !saved.is_empty() {
        let why = format!("trained whole: {}", listed(saved, model));
        decisions.add("modulesToSave", saved.len(), why);
    }
    if *unties {
        decisions.add(
            "tieWordEmbeddings",
            "untied when merged",
            "embedding and head of the model are one tensor, and what is trained of one is not of the other",
        );
    }
    trained
}

/// Lists modules by name, with their number where it is not one in each block.
fn listed(modules: &[ModuleShape], model: &ModelFacts) -> String {
    let one = |module: &ModuleShape| {
        let is_usual = module.count == model.num_hidden_layers
            || ["embed_tokens", "lm_head", "norm"].contains(&module.name.as_str());
        if is_usual { module.name.clone() } else { format!("{} ({})", module.name, module.count) }
    };
    modules.iter().map(one).collect::<Vec<_>>().join(", ")
}
