//! Checkpoint paths of modules, and how PEFT matches a short name to them.

/// The path of the token embedding.
pub const EMBED_TOKENS: &str = "model.embed_tokens";
/// The name of the token embedding's table.
pub const EMBEDDING_WEIGHT: &str = "model.embed_tokens.weight";
/// The name of the output head's table; absent where the head is the embedding.
pub const HEAD_WEIGHT: &str = "lm_head.weight";
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

/// Returns whether a target name means the module at `path`: it is the path, or ends it at a dot.
///
/// # Source
/// `peft/tuners/tuners_utils.py: check_target_module_exists`, 0.21.2, for a list of names.
pub fn matches(target: &str, path: &str) -> bool {
    path.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Returns whether two linear layers of a block read the same input.
pub fn share_input(one: &str, other: &str) -> bool {
    const READERS: [&[&str]; 2] = [
        &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        &["mlp.gate_proj", "mlp.up_proj"],
    ];
    READERS.iter().any(|readers| {
        let block = |path: &str| {
            readers.iter().find_map(|reader| path.strip_suffix(reader).map(str::to_owned))
        };
        block(one).is_some_and(|found| block(other) == Some(found))
    })
}

#[cfg(test)]
mod tests {
    use super::{matches, share_input};

    #[test]
    fn matches_whole_words_at_the_end_only() {
        assert!(matches("q_proj", "model.layers.0.self_attn.q_proj"));
        assert!(matches("self_attn.q_proj", "model.layers.0.self_attn.q_proj"));
        assert!(matches("lm_head", "lm_head"));
        assert!(!matches("proj", "model.layers.0.self_attn.q_proj"));
        assert!(!matches("norm", "model.layers.0.input_layernorm"));
    }

    #[test]
    fn layers_with_one_input_are_of_one_block() {
        let path = |layer, name: &str| super::in_block(layer, name);
        assert!(share_input(&path(1, "self_attn.q_proj"), &path(1, "self_attn.v_proj")));
        assert!(share_input(&path(1, "mlp.gate_proj"), &path(1, "mlp.up_proj")));
        assert!(!share_input(&path(1, "self_attn.v_proj"), &path(2, "self_attn.q_proj")));
        assert!(!share_input(&path(1, "self_attn.v_proj"), &path(1, "self_attn.o_proj")));
        assert!(!share_input(&path(1, "mlp.up_proj"), &path(1, "mlp.down_proj")));
        assert!(!share_input("lm_head", "lm_head"));
    }
}
