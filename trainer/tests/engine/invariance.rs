//! Packing, accumulation, activation checkpointing and other segments must not change the result.

use finetune_contract::{Dtype, Recompute};
use finetune_trainer::{
    data::sequences::Batch, layers::dropout::Dropout, lora::trainable::Trainable, model::Model,
    objective::causal_lm::CausalLm, runtime::rng::RngKey,
};
use tch::{Device, Tensor};

use crate::fixture::{LLAMA, batch, checkpoint, load, lora};

/// Divides a micro-batch into one per segment.
fn segments(whole: &Batch) -> Vec<Batch> {
    let mut start = 0;
    let mut parts = Vec::new();
    for &length in &whole.segment_lengths {
        let range = start as i64..(start + length) as i64;
        let targets = whole
            .target_positions
            .iter()
            .zip(&whole.labels)
            .filter(|(position, _)| range.contains(position));
        let (target_positions, labels) =
            targets.map(|(position, label)| (position - range.start, label)).unzip();
        let tokens = whole.tokens[start..start + length].to_vec();
        parts.push(Batch { tokens, segment_lengths: vec![length], target_positions, labels });
        start += length;
    }
    parts
}

fn gradients(
    model: &mut Model,
    batches: &[Batch],
    dropout: Option<&Dropout>,
    recompute: Recompute,
) -> (f64, Tensor) {
    let _ = model.trained_mut().grad().shallow_clone().zero_();
    let losses = batches
        .iter()
        .map(|batch| model.accumulate_gradients(batch, &CausalLm, recompute, dropout).loss);
    let loss = losses.sum();
    (loss, model.trained().grad().copy())
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    ((a - b).abs().max() / a.abs().max()).double_value(&[])
}

#[test]
fn packing_and_accumulation_do_not_change_loss_or_gradients() {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let mut model = load(directory.path(), &config, &Trainable::Full);
    let packed = batch(&[9, 4, 17, 2, 9, 9, 1, 30], 61);
    let apart = segments(&packed);
    let (packed_loss, packed) = gradients(&mut model, &[packed], None, Recompute::None);
    let (apart_loss, apart) = gradients(&mut model, &apart, None, Recompute::None);
    assert!((packed_loss - apart_loss).abs() < 1e-6 * packed_loss);
    assert!(largest_difference(&packed, &apart) < 1e-5);
}

#[test]
fn accumulation_does_not_change_the_dropout_masks() {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let trainable =
        Trainable::lora(&config, &lora(&["q_proj", "o_proj", "down_proj", "lm_head"], &[]));
    let mut model = load(directory.path(), &config, &trainable.unwrap());
    let dropout = Dropout::new(0.5, RngKey::from_seed(1)).unwrap();
    let packed = batch(&[9, 4, 17, 2, 9, 9, 1, 30], 61);
    let apart = segments(&packed);
    let (packed_loss, packed) = gradients(&mut model, &[packed], Some(&dropout), Recompute::None);
    let _ = model.trained_mut().grad().shallow_clone().zero_();
    let (mut apart_loss, mut tokens, mut targets) = (0.0, 0, 0);
    for part in &apart {
        let dropout = dropout.at_offset(tokens, targets);
        apart_loss +=
            model.accumulate_gradients(part, &CausalLm, Recompute::Block, Some(&dropout)).loss;
        tokens += part.tokens.len() as u64;
        targets += part.labels.len() as u64;
    }
    assert!((packed_loss - apart_loss).abs() < 1e-6 * packed_loss, "{packed_loss} {apart_loss}");
    assert!(largest_difference(&packed, model.trained().grad()) < 1e-5);
}

#[test]
fn segments_do_not_attend_to_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let model = load(directory.path(), &config, &Trainable::Full);
    let whole = batch(&[9, 7], 61);
    let only_second = |mut whole: Batch| {
        let second: Vec<bool> =
            whole.target_positions.iter().map(|&position| position >= 9).collect();
        let mut keep = second.iter();
        whole.target_positions.retain(|_| *keep.next().unwrap());
        let mut keep = second.iter();
        whole.labels.retain(|_| *keep.next().unwrap());
        whole
    };
    let mut disturbed = batch(&[9, 7], 61);
    disturbed.tokens[..9].iter_mut().for_each(|token| *token = (*token + 11) % 61);
    let [before, after] =
        [whole, disturbed].map(|batch| model.loss(&only_second(batch), &CausalLm).loss);
    assert_eq!(before.to_bits(), after.to_bits());
}

#[test]
fn activation_checkpointing_replays_dropout_bit_for_bit() {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let trainable = Trainable::lora(&config, &lora(&["all-linear", "lm_head"][..1], &[])).unwrap();
    let mut model = load(directory.path(), &config, &trainable);
    let batches = [batch(&[9, 7], 61)];
    let dropout = |seed| Dropout::new(0.5, RngKey::from_seed(seed)).unwrap();
    let (saved_loss, saved) = gradients(&mut model, &batches, Some(&dropout(1)), Recompute::None);
    let (recomputed_loss, recomputed) =
        gradients(&mut model, &batches, Some(&dropout(1)), Recompute::Block);
    let (other_loss, _) = gradients(&mut model, &batches, Some(&dropout(2)), Recompute::None);
    assert_eq!(saved_loss.to_bits(), recomputed_loss.to_bits());
    assert!(saved.equal(&recomputed));
    assert_ne!(saved_loss.to_bits(), other_loss.to_bits());
}

#[test]
fn gradients_under_dropout_equal_finite_differences() {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let trainable =
        Trainable::lora(&config, &lora(&["q_proj", "down_proj", "lm_head"], &[])).unwrap();
    let mut model = load(directory.path(), &config, &trainable);
    let batches = [batch(&[9, 7], 61)];
    let dropout = Dropout::new(0.3, RngKey::from_seed(1)).unwrap();
    let (_, gradient) = gradients(&mut model, &batches, Some(&dropout), Recompute::None);
    let direction = RngKey::from_seed(5).normal_tensor(&gradient.size(), Device::Cpu);
    let slope = (&gradient * &direction).sum(tch::Kind::Double).double_value(&[]);
    let step = 1e-3;
    let mut loss_at = |distance: f64| {
        let mut master = model.trained().master().shallow_clone();
        let _ = master.g_add_(&(&direction * distance));
        let loss = gradients(&mut model, &batches, Some(&dropout), Recompute::None).0;
        let _ = master.g_sub_(&(&direction * distance));
        loss
    };
    let measured = (loss_at(step) - loss_at(-step)) / (2.0 * step);
    assert!((measured - slope).abs() < 2e-3 * slope.abs(), "measured {measured}, computed {slope}");
}

#[test]
fn bf16_stays_near_fp32() {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let batches = [batch(&[9, 7, 20], 61)];
    let load = |dtype| {
        let seed = RngKey::from_seed(3);
        let mut model = Model::load(
            directory.path(),
            config.clone(),
            Trainable::Full,
            dtype,
            Device::Cpu,
            seed,
        )
        .unwrap();
        gradients(&mut model, &batches, None, Recompute::None)
    };
    let (exact_loss, exact) = load(Dtype::Fp32);
    let (rounded_loss, rounded) = load(Dtype::Bf16);
    // bf16 has 8 bits: one rounding is 0.4 %, and three blocks chain about thirty of them.
    assert!((exact_loss - rounded_loss).abs() < 0.01 * exact_loss, "{exact_loss} {rounded_loss}");
    let norm = |x: &Tensor| x.norm().double_value(&[]);
    let error = norm(&(&exact - &rounded)) / norm(&exact);
    // `operators` tests each operator with a tighter bound.
    assert!(error < 0.05, "{error}");
}
