//! Checkpoint paths of modules, and how PEFT matches a short name to them.

/// The path of the token embedding.
pub const EMBED_TOKENS: &str = "model.embed_tokens";
/// The path of the last norm.
pub const NORM: &str = "model.norm";
/// The path of the output head.
pub const LM_HEAD: &str = "lm_head";

/// Returns the path of a module inside a block.
pub fn in_block(layer: usize, path: &str) -> String {
    format!("model.layers.{layer}.{path}")
}

/// Returns the block a path is in; `None` outside the blocks.
pub fn layer(path: &str) -> Option<usize> {
    path.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Returns the last word of a path.
pub fn leaf(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Tells whether a target name means the module at `path`: it is the path, or ends it at a dot.
///
/// # Source
/// `peft/tuners/tuners_utils.py: check_target_module_exists`, 0.21.2, for a list of names.
pub fn matches(target: &str, path: &str) -> bool {
    path.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn matches_whole_words_at_the_end_only() {
        assert!(matches("q_proj", "model.layers.0.self_attn.q_proj"));
        assert!(matches("self_attn.q_proj", "model.layers.0.self_attn.q_proj"));
        assert!(matches("lm_head", "lm_head"));
        assert!(!matches("proj", "model.layers.0.self_attn.q_proj"));
        assert!(!matches("norm", "model.layers.0.input_layernorm"));
    }
}
