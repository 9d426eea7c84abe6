//! Resolves the names and patterns of an adapter's settings to modules.
//!
//! # Source
//! `check_target_module_exists` and `_maybe_include_all_linear_layers` of
//! `peft/tuners/tuners_utils.py`, and `_set_trainable` of `peft/utils/other.py`, 0.21.2.

use fancy_regex::Regex;
use finetune_contract::{LoraSettings, ModuleNames, TargetModules};

use crate::{
    architecture::{
        config::ModelConfig,
        modules::{self, Kind, Module},
        names,
    },
    lora::Error,
};

/// The modules that settings select, in the order of the model.
#[derive(Debug)]
pub struct Resolved {
    /// The modules that get an adapter.
    pub targets: Vec<Module>,
    /// The modules that are trained in full.
    pub modules_to_save: Vec<Module>,
    /// Names that match no module, with their fields.
    pub unmatched: Vec<(&'static str, String)>,
}

// The fields of `loraConfig`.
const TARGET_MODULES: &str = "loraConfig.targetModules";
const MODULES_TO_SAVE: &str = "loraConfig.modulesToSave";
pub(crate) const EXCLUDE_MODULES: &str = "loraConfig.excludeModules";

/// Finds the modules that `settings` select. A module that is trained in full gets no adapter, as
/// with PEFT.
///
/// # Errors
/// [`Error`] if a pattern cannot be parsed, matches nothing, or matches a module that cannot have
/// an adapter.
pub fn resolve(config: &ModelConfig, settings: &LoraSettings) -> Result<Resolved, Error> {
    let modules = modules::modules(config);
    let mut unmatched = Vec::new();
    let modules_to_save =
        named(&settings.modules_to_save, &modules, MODULES_TO_SAVE, &mut unmatched);

    // A pattern can also match containers, which have no weights of their own.
    let mut unadaptable = Vec::new();
    let mut targets = match &settings.target_modules {
        TargetModules::AllLinear => {
            modules.iter().filter(|module| module.kind == Kind::Linear).cloned().collect()
        }
        TargetModules::List(list) => named(list, &modules, TARGET_MODULES, &mut unmatched),
        TargetModules::Pattern(pattern) => {
            unadaptable = matching(TARGET_MODULES, pattern, &modules::containers(config))?;
            let found = matching(TARGET_MODULES, pattern, &paths(&modules))?;
            if found.is_empty() && unadaptable.is_empty() {
                return Err(Error::NoMatch { pattern: pattern.clone() });
            }
            modules.iter().filter(|module| found.contains(&module.path)).cloned().collect()
        }
    };
    if let Some(names) = &settings.exclude_modules {
        let excluded = match names {
            ModuleNames::List(list) => {
                unadaptable.retain(|path| !list.iter().any(|name| names::matches(name, path)));
                paths(&named(list, &targets, EXCLUDE_MODULES, &mut unmatched))
            }
            ModuleNames::Pattern(pattern) => {
                let excluded = matching(EXCLUDE_MODULES, pattern, &paths(&targets))?;
                let others = matching(EXCLUDE_MODULES, pattern, &unadaptable)?;
                unadaptable.retain(|path| !others.contains(path));
                if excluded.is_empty() {
                    unmatched.push((EXCLUDE_MODULES, pattern.clone()));
                }
                excluded
            }
        };
        targets.retain(|module| !excluded.contains(&module.path));
    }
    if !settings.layers_to_transform.is_empty() {
        retain_layers(config, settings, &mut targets)?;
    }
    targets.retain(|module| !modules_to_save.contains(module));
    let norms = targets.iter().filter(|module| !module.is_adaptable());
    if let Some(path) = unadaptable.into_iter().chain(norms.map(|norm| norm.path.clone())).next() {
        return Err(Error::NotAdaptable { path });
    }
    Ok(Resolved { targets, modules_to_save, unmatched })
}

/// Returns the modules that any of `names` matches; names without a match go to `unmatched`.
fn named(
    names: &[String],
    modules: &[Module],
    field: &'static str,
    unmatched: &mut Vec<(&'static str, String)>,
) -> Vec<Module> {
    let matches = |name: &String, module: &Module| names::matches(name, &module.path);
    for name in names {
        if !modules.iter().any(|module| matches(name, module)) {
            unmatched.push((field, name.clone()));
        }
    }
    let is_named = |module: &&Module| names.iter().any(|name| matches(name, module));
    modules.iter().filter(is_named).cloned().collect()
}

/// Retains the targets in `layersToTransform`; modules outside the blocks have no layer and go.
fn retain_layers(
    config: &ModelConfig,
    settings: &LoraSettings,
    targets: &mut Vec<Module>,
) -> Result<(), Error> {
    let layers = &settings.layers_to_transform;
    if matches!(settings.target_modules, TargetModules::Pattern(_)) {
        return Err(Error::LayersOfPattern);
    }
    let count = config.num_hidden_layers;
    if let Some(&layer) = layers.iter().find(|&&layer| layer as usize >= count) {
        return Err(Error::UnknownLayer { layer, count });
    }
    let full_paths = match &settings.target_modules {
        TargetModules::List(list) => list.as_slice(),
        TargetModules::AllLinear | TargetModules::Pattern(_) => &[],
    };
    targets.retain(|module| {
        let layer = names::layer(&module.path);
        // As in PEFT, a full path selects its module whatever the layer.
        full_paths.contains(&module.path)
            || layer.is_some_and(|layer| layers.contains(&(layer as u32)))
    });
    Ok(())
}

/// Returns the paths that a pattern matches from end to end.
fn matching(field: &'static str, pattern: &str, paths: &[String]) -> Result<Vec<String>, Error> {
    let refused = |error: fancy_regex::Error| Error::Pattern {
        field,
        pattern: pattern.to_owned(),
        reason: error.to_string(),
    };
    let regex = Regex::new(&format!(r"\A(?:{pattern})\z")).map_err(refused)?;
    let mut found = Vec::new();
    for path in paths {
        if regex.is_match(path).map_err(refused)? {
            found.push(path.clone());
        }
    }
    Ok(found)
}

fn paths(modules: &[Module]) -> Vec<String> {
    modules.iter().map(|module| module.path.clone()).collect()
}

/// Returns the shortest list of names by which PEFT finds exactly `chosen` among all modules.
///
/// These are leaf names where all modules of that name are chosen, as inference servers expect,
/// else full paths. `matches` compares a name with a path.
pub fn shortest_names(
    config: &ModelConfig,
    chosen: &[String],
    matches: impl Fn(&str, &str) -> bool,
) -> Vec<String> {
    let all = modules::modules(config);
    let is_exact = |name: &str| {
        all.iter()
            .filter(|module| matches(name, &module.path))
            .all(|module| chosen.contains(&module.path))
    };
    let name = |path: &String| {
        let leaf = names::leaf(path);
        if is_exact(leaf) { leaf.to_owned() } else { path.clone() }
    };
    let mut names: Vec<String> = chosen.iter().map(name).collect();
    names.sort();
    names.dedup();
    names
}
