//! One forward and backward pass of every family.

use finetune_contract::Recompute;
use finetune_trainer::{
    layers::rope::{Rotary, frequencies},
    lora::trainable::Trainable,
    objective::causal_lm::CausalLm,
};
use tch::{Device, Kind, Tensor};

use crate::golden::{Golden, distance, families};

/// fp32 rounds to 6e-8; the rest is due to the order of summation.
const TOLERANCE: f64 = 1e-5;

#[test]
fn logits_equal_transformers() {
    for family in families() {
        let golden = Golden::open(family);
        let model = golden.load(Trainable::Frozen);
        for (index, row) in golden.facts.rows.iter().enumerate() {
            let expected = golden.tensor(&format!("logits.{index}"));
            let found = distance(&model.logits(&row.tokens), expected);
            assert!(found <= TOLERANCE, "{family}, row {index}: logits differ by {found:e}");
        }
    }
}

#[test]
fn the_loss_and_the_gradient_of_every_parameter_equal_transformers() {
    for family in families() {
        let golden = Golden::open(family);
        let expected = golden.tensors_below("grad.");
        for recompute in [Recompute::None, Recompute::Block] {
            let model = golden.load(Trainable::Full);
            assert_eq!(
                sorted(model.trained().names()),
                expected.keys().copied().collect::<Vec<_>>()
            );
            let batch = golden.batch(0..golden.facts.rows.len());
            let count = batch.labels.len() as f64;
            let loss = model.accumulate_gradients(&batch, &CausalLm, recompute, None).loss / count;
            let difference = (loss / golden.facts.loss - 1.0).abs();
            assert!(difference <= TOLERANCE, "{family}: the loss differs by {difference:e}");
            for (name, expected) in &expected {
                let found = distance(&(model.trained().grad_of(name).unwrap() / count), expected);
                assert!(
                    found <= TOLERANCE,
                    "{family}: the gradient of {name} differs by {found:e}"
                );
            }
        }
    }
}

#[test]
fn angles_of_large_positions_equal_f64() {
    for family in families() {
        let golden = Golden::open(family);
        let config = golden.config();
        let frequencies = frequencies(&config.rope, config.head_dim);
        let positions = &golden.facts.far_positions;
        let rotary = Rotary::new(&frequencies, positions, Kind::Float, Device::Cpu);
        // Rotating (1, 0) gives (cos, sin).
        let half = [positions.len() as i64, 1, config.head_dim as i64 / 2];
        let on_cpu = (Kind::Float, Device::Cpu);
        let unit = Tensor::cat(&[Tensor::ones(half, on_cpu), Tensor::zeros(half, on_cpu)], 2);
        let expected = Tensor::cat(&[golden.tensor("rotary.cos"), golden.tensor("rotary.sin")], 1);
        let found = distance(&rotary.rotate(unit.copy()).squeeze_dim(1), &expected);
        assert!(found <= 1e-7, "{family}: angles differ by {found:e}");
    }
}

fn sorted(names: &[String]) -> Vec<&str> {
    let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
    names.sort_unstable();
    names
}
