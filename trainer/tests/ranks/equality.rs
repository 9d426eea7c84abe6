//! The mathematics does not depend on how many ranks there are.

use std::{path::Path, time::Duration};

use finetune_contract::{Optimizer, Recompute, Strategy};
use finetune_trainer::{
    architecture::config::ModelConfig,
    data::sequences::Batch,
    distributed::{
        Ranks,
        rank::{RankInfo, Timeouts},
    },
    layers::dropout::Dropout,
    lora::trainable::{LoraAdapters, Trainable},
    model::{DataParallel, Model, master::Masters},
    objective::causal_lm::CausalLm,
    optim::{self, AdamW},
    runtime::rng::RngKey,
};
use tch::{Device, Kind, Tensor};

use crate::fixture::{LLAMA, batch, checkpoint, lora, randomize_adapters};

const STEPS: u64 = 4;
/// Micro-batches of one step over all ranks, with different numbers of segments, tokens and
/// targets.
const MICRO_BATCHES: u64 = 4;

/// The results of a run.
struct Trained {
    losses: Vec<f64>,
    norms: Vec<f64>,
    weights: Vec<(String, Tensor)>,
    sent_bytes_per_step: u64,
}

/// Trains with `world_size` ranks; returns the results of rank 0.
fn train(
    directory: &Path,
    config: &ModelConfig,
    trainable: &Trainable,
    world_size: u32,
    strategy: Strategy,
    recompute: Recompute,
) -> Trained {
    tch::set_num_threads(1);
    let port = free_port();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                scope.spawn(move || {
                    let ranks = join(rank, world_size, port);
                    let data_parallel =
                        DataParallel { ranks: ranks.clone(), strategy, bucket_bytes: 4096 };
                    let trained = run(directory, config, trainable, data_parallel, recompute);
                    ranks.done();
                    trained
                })
            })
            .collect();
        let mut trained: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        for other in &trained[1..] {
            assert_eq!(other.losses, trained[0].losses, "ranks must agree bit for bit");
            for ((name, left), (_, right)) in other.weights.iter().zip(&trained[0].weights) {
                assert!(left.equal(right), "{name} differs between ranks");
            }
        }
        trained.swap_remove(0)
    })
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn join(rank: u32, world_size: u32, port: u16) -> Ranks {
    if world_size == 1 {
        return Ranks::alone();
    }
    let info = rank_info(rank, world_size, port);
    // A rank that is lost here has panicked, which fails the test.
    let on_lost = Box::new(|_: &str| {});
    Ranks::join(&info, "test", Device::Cpu, Timeouts::default(), on_lost).unwrap()
}

fn rank_info(rank: u32, world_size: u32, port: u16) -> RankInfo {
    RankInfo {
        rank,
        world_size,
        master_address: "127.0.0.1".to_owned(),
        master_port: port,
        interface: None,
    }
}

fn run(
    directory: &Path,
    config: &ModelConfig,
    trainable: &Trainable,
    data_parallel: DataParallel,
    recompute: Recompute,
) -> Trained {
    let ranks = data_parallel.ranks.clone();
    let seed = RngKey::from_seed(3);
    let mut model = Model::load_data_parallel(
        directory,
        config.clone(),
        trainable.clone(),
        finetune_contract::Dtype::Fp32,
        Device::Cpu,
        seed,
        data_parallel,
    )
    .unwrap();
    randomize_adapters(&mut model, seed);
    let mut adamw = AdamW::new(model.trained(), Optimizer::Adamw, 0.1);
    let (mut losses, mut norms, mut sent) = (Vec::new(), Vec::new(), 0);
    for step in 0..STEPS {
        let before = ranks.sent_bytes();
        model.trained().zero_grad();
        let (mut loss, mut targets) = (0.0, 0);
        for micro in (0..MICRO_BATCHES)
            .filter(|micro| micro % u64::from(ranks.world_size()) == u64::from(ranks.rank()))
        {
            let batch = micro_batch(step, micro);
            let dropout = Dropout::new(0.1, seed.fold_in(step).fold_in(micro));
            if micro + u64::from(ranks.world_size()) >= MICRO_BATCHES {
                model.mark_last_backward();
            }
            loss += model.accumulate_gradients(&batch, &CausalLm, recompute, dropout.as_ref()).loss;
            targets += batch.labels.len();
        }
        model.reduce_gradients().unwrap();
        let [loss, targets] = ranks.sum([loss, targets as f64]).unwrap();
        let clipped = optim::clip(model.gradient_square().unwrap(), targets as u64, 0.5);
        adamw.step(model.trained_mut(), clipped.scale, 1e-3, step + 1);
        losses.push(loss / targets);
        norms.push(clipped.norm);
        sent = ranks.sent_bytes() - before;
    }
    let names: Vec<_> =
        trainable.trained_tensors(config).into_iter().map(|spec| spec.name).collect();
    let mut masters = Masters::of(&model);
    let weights = names
        .into_iter()
        .map(|name| {
            let master = masters.get(&name).unwrap().unwrap().copy();
            (name, master)
        })
        .collect();
    Trained { losses, norms, weights, sent_bytes_per_step: sent }
}

fn micro_batch(step: u64, micro: u64) -> Batch {
    let lengths: &[usize] = match micro {
        0 => &[30, 2, 9],
        1 => &[3],
        2 => &[17, 17, 17, 17],
        _ => &[2, 45],
    };
    let mut batch = batch(lengths, 61);
    let shift = (step * MICRO_BATCHES + micro) as i64;
    batch.tokens.iter_mut().for_each(|token| *token = (*token + shift) % 61);
    for (label, position) in batch.labels.iter_mut().zip(&batch.target_positions) {
        *label = batch.tokens[*position as usize + 1];
    }
    batch
}

/// Checks 2 and 4 ranks against one, whole and sharded.
fn check(trainable: impl Fn(&ModelConfig) -> Trainable, recompute: Recompute) {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let trainable = trainable(&config);
    let one = train(directory.path(), &config, &trainable, 1, Strategy::None, recompute);
    assert!(one.losses[3] < one.losses[0], "{:?}", one.losses);
    let alone = [(1, Strategy::Zero1), (1, Strategy::Zero2), (1, Strategy::Zero3)];
    let together = [2, 4].map(|ranks| {
        [Strategy::Ddp, Strategy::Zero1, Strategy::Zero2, Strategy::Zero3]
            .map(|strategy| (ranks, strategy))
    });
    for (world_size, strategy) in alone.into_iter().chain(together.into_iter().flatten()) {
        let many = train(directory.path(), &config, &trainable, world_size, strategy, recompute);
        let what = format!("{world_size} ranks, {strategy:?}");
        for (many, one) in [(&many.losses, &one.losses), (&many.norms, &one.norms)] {
            for (many, one) in many.iter().zip(one) {
                assert!((many - one).abs() < 1e-6 * one.abs().max(1.0), "{what}: {many} {one}");
            }
        }
        assert_eq!(many.weights.len(), one.weights.len());
        for ((name, many), (_, one)) in many.weights.iter().zip(&one.weights) {
            let difference = (many - one).abs().max().to_kind(Kind::Double).double_value(&[]);
            assert!(difference < 1e-6, "{what}: {name} differs by {difference:e}");
        }
    }
}

#[test]
fn full_parameter_training_does_not_depend_on_the_number_of_ranks() {
    check(|_| Trainable::Full, Recompute::None);
}

#[test]
fn activation_checkpointing_does_not_depend_on_the_number_of_ranks() {
    check(|_| Trainable::Full, Recompute::Block);
}

#[test]
fn adapters_do_not_depend_on_the_number_of_ranks() {
    check(|config| Trainable::lora(config, &lora(&["all-linear"], &[])).unwrap(), Recompute::None);
}

#[test]
fn modules_to_save_do_not_depend_on_the_number_of_ranks() {
    let lora = |config: &ModelConfig| {
        let settings = lora(&["q_proj", "embed_tokens"], &["layers.1.mlp.up_proj", "lm_head"]);
        let trainable = Trainable::lora(config, &settings).unwrap();
        assert!(
            matches!(&trainable, Trainable::Lora(LoraAdapters { modules_to_save, .. }) if modules_to_save.len() == 2)
        );
        trainable
    };
    check(lora, Recompute::None);
}

#[test]
fn ranks_that_do_not_connect_are_named() {
    let port = free_port();
    let timeouts = Timeouts { rendezvous: Duration::from_secs(3), ..Timeouts::default() };
    let joined = std::thread::scope(|scope| {
        let present = [0, 2].map(|rank| {
            scope.spawn(move || {
                let info = rank_info(rank, 4, port);
                let on_lost = Box::new(|_: &str| {});
                Ranks::join(&info, "test", Device::Cpu, timeouts, on_lost).map(drop)
            })
        });
        present.map(|rank| rank.join().unwrap())
    });
    let message = joined[0].as_ref().unwrap_err().to_string();
    let message = message.replace(&port.to_string(), "PORT");
    insta::assert_snapshot!(message, @"ranks 1, 3 of 4 did not connect to 127.0.0.1:PORT within 3 s: see why in their log");
    assert!(joined[1].is_err());
}

/// The formulas of `finetune_plan::sizing`, written out for the fixture.
#[test]
fn each_strategy_sends_the_predicted_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let sent = |world_size, strategy| {
        let trainable = Trainable::Full;
        train(directory.path(), &config, &trainable, world_size, strategy, Recompute::None)
            .sent_bytes_per_step
    };
    // fp32; each tensor of the fixture is a multiple of 16 elements but the embedding, 61 x 32.
    let root = (61 * 32 + 32) * 4_u64;
    let block = (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) * 4_u64;
    // Per step: the sums of loss and targets (2 f64); if sharded, also the squared norm.
    let numbers = |world: u64, count: u64| 2 * (count * 8) * (world - 1) / world;
    for world in [2, 4] {
        let share = |bytes: u64| bytes * (world - 1) / world;
        let whole = 2 * share(root + 3 * block) + numbers(world, 2);
        assert_eq!(sent(world as u32, Strategy::Ddp), whole);
        let micro_batches = MICRO_BATCHES / world;
        // Weights are gathered once, and gradients reduced once or once a micro-batch. With zero3,
        // two of the three blocks are still gathered when the backward pass starts: 3 + 1 gathers
        // in the first micro-batch, 1 + 1 in each later one.
        let units = |gathers: u64, sums: u64| {
            share(root) * 2
                + share(block) * (gathers + sums)
                + numbers(world, 2)
                + numbers(world, 1)
        };
        for (strategy, expected) in [
            (Strategy::Zero1, units(3, 3)),
            (Strategy::Zero2, units(3, 3 * micro_batches)),
            (Strategy::Zero3, units(4 + 2 * (micro_batches - 1), 3 * micro_batches)),
        ] {
            let found = sent(world as u32, strategy);
            // Units are padded to a multiple of 16 elements for each rank.
            assert!(found.abs_diff(expected) < expected / 100, "{strategy:?}: {found} {expected}");
        }
    }
}
