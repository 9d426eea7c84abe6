//! The losses and gradients of the engine equal those of autograd.

use finetune_contract::Recompute;
use finetune_trainer::{
    architecture::config::ModelConfig, hf::weights::WeightFiles, lora::trainable::Trainable,
    objective::causal_lm::CausalLm,
};

use crate::{
    fixture::{FAMILIES, LLAMA, batch, checkpoint, load, lora},
    reference::Reference,
};

/// The largest allowed difference, relative to the largest gradient of the tensor, in fp32.
const TOLERANCE: f64 = 1e-5;

fn check(what: &str, config_json: &str, attach: impl Fn(&ModelConfig) -> Trainable) {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), config_json);
    let trainable = attach(&config);
    let mut model = load(directory.path(), &config, &trainable);
    let batch = batch(&[7, 12, 12, 1, 3], config.vocab_size as u64);
    let stored = WeightFiles::open(directory.path()).unwrap();
    let (expected_loss, expected) = Reference::of(&model, &stored).loss_and_gradients(&batch);
    for recompute in [Recompute::None, Recompute::Block] {
        let _ = model.trained_mut().grad().shallow_clone().zero_();
        let loss = model.accumulate_gradients(&batch, &CausalLm, recompute, None).loss;
        assert!(
            (loss - expected_loss).abs() < 1e-5 * expected_loss,
            "{what}: loss {loss}, autograd {expected_loss}"
        );
        assert!(
            (model.loss(&batch, &CausalLm).loss - loss).abs() < 1e-6 * loss,
            "{what}: evaluation differs from training"
        );
        for (name, expected) in &expected {
            let found = model.trained().grad_of(name).unwrap();
            let largest = expected.abs().max().double_value(&[]);
            let difference = (found - expected).abs().max().double_value(&[]);
            assert!(
                largest > 0.0,
                "{what}: autograd finds no gradient of {name}, so nothing is compared"
            );
            assert!(
                difference <= TOLERANCE * largest.max(1.0),
                "{what}, {recompute:?}: gradient of {name} is off by {difference:e} of {largest:e}"
            );
        }
    }
}

#[test]
fn full_parameter_gradients_equal_autograd_in_every_family() {
    for (family, config) in FAMILIES {
        check(family, config, |_| Trainable::Full);
    }
}

#[test]
fn lora_gradients_equal_autograd_in_every_family() {
    for (family, config) in FAMILIES {
        check(family, config, |config| {
            Trainable::lora(config, &lora(&["all-linear"], &[])).unwrap()
        });
    }
}

#[test]
fn gradients_equal_autograd_for_every_set_of_targets_tied_and_untied() {
    let untied = LLAMA.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    let sets: [(&[&str], &[&str]); 7] = [
        (&["embed_tokens"], &[]),
        (&["lm_head"], &[]),
        (&["embed_tokens", "lm_head", "q_proj"], &[]),
        (&["down_proj"], &["lm_head"]),
        (&["v_proj"], &["embed_tokens"]),
        (&["o_proj"], &["embed_tokens", "lm_head"]),
        (&["model.layers.2.self_attn.k_proj"], &["model.norm", "layers.1.input_layernorm"]),
    ];
    for config in [LLAMA, &untied] {
        for (targets, saved) in sets {
            check(&format!("{targets:?} {saved:?}"), config, |config| {
                Trainable::lora(config, &lora(targets, saved)).unwrap()
            });
        }
    }
}
