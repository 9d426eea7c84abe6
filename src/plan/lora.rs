//! Counts what is trained, and checks an adapter against the model's modules.

use finetune_contract::{LoraSettings, ModelFacts, ModuleShape, Problem, TargetModules};

use super::{Decisions, invalid};

/// Returns how many parameters are trained; a name the model does not have is a problem.
pub(super) fn trained_parameters(
    model: &ModelFacts,
    lora: Option<&LoraSettings>,
    decisions: &mut Decisions,
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
    let with_input = || model.modules.iter().filter(|module| module.in_features > 0);
    let targets: Vec<&ModuleShape> = match &lora.target_modules {
        TargetModules::AllLinear => with_input()
            .filter(|module| !["embed_tokens", "lm_head"].contains(&module.name.as_str()))
            .collect(),
        TargetModules::List(names) => {
            let known: Vec<&str> = with_input().map(|module| module.name.as_str()).collect();
            missing("targetModules", names, &known, problems);
            with_input().filter(|module| names.contains(&module.name)).collect()
        }
    };
    let known: Vec<&str> = model.modules.iter().map(|module| module.name.as_str()).collect();
    missing("modulesToSave", &lora.modules_to_save, &known, problems);
    let narrow = targets.iter().map(|module| module.in_features.min(module.out_features)).min();
    if let Some(width) = narrow.filter(|width| lora.r > *width) {
        problems.push(invalid("spec.loraConfig.r", format!("is {}, but the narrowest target has only {width} features: a larger rank adds nothing, lower it", lora.r)));
    }
    let adapters: u64 = targets.iter().map(|module| module.lora_parameters(lora.r)).sum();
    let saved: u64 = model
        .modules
        .iter()
        .filter(|module| lora.modules_to_save.contains(&module.name))
        .map(ModuleShape::parameters)
        .sum();
    let trained = adapters + saved;
    let share = 100.0 * trained as f64 / model.parameters.max(1) as f64;
    decisions.add(
        "method",
        "LoRA",
        format!("loraConfig is given: {trained} trained parameters, {share:.2} % of the model"),
    );
    decisions.add("r", lora.r, format!("updates are scaled by {}", lora.scaling()));
    let names: Vec<&str> = targets.iter().map(|module| module.name.as_str()).collect();
    let value = match &lora.target_modules {
        TargetModules::AllLinear => "all-linear",
        TargetModules::List(_) => "a list",
    };
    decisions.add("targetModules", value, names.join(", "));
    trained
}

fn missing(field: &str, names: &[String], known: &[&str], problems: &mut Vec<Problem>) {
    for name in names.iter().filter(|name| !known.contains(&name.as_str())) {
        problems.push(invalid(
            &format!("spec.loraConfig.{field}"),
            format!("names {name:?}, which the model does not have; it has {}", known.join(", ")),
        ));
    }
}
