//! The mathematics does not depend on how many ranks there are.

use std::{path::Path, time::Duration};

use finetune_contract::{Optimizer, Recompute, Strategy};
use finetune_trainer::{
    architecture::config::ModelConfig,
    data::sequences::Batch,
    distributed::{
        Ranks,
        rank::{Patience, Place},
    },
    layers::dropout::Dropout,
    lora::trainable::{Attachment, LoraAttachment},
    model::{Division, Model, master::Masters},
    optim::{self, AdamW},
    runtime::rng::Counter,
};
use tch::{Device, Kind, Tensor};

use crate::fixture::{LLAMA, batch, checkpoint, lora, start_adapters};

const STEPS: u64 = 4;
/// Micro-batches of one step, over all ranks; uneven in segments, tokens and targets.
const MICRO_BATCHES: u64 = 4;

/// What a run came to.
struct Trained {
    losses: Vec<f64>,
    norms: Vec<f64>,
    weights: Vec<(String, Tensor)>,
    sent_bytes_per_step: u64,
}

/// Trains with `world_size` ranks; returns what rank 0 has.
fn train(
    directory: &Path,
    config: &ModelConfig,
    attachment: &Attachment,
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
                    let division = Division { ranks: ranks.clone(), strategy, bucket_bytes: 4096 };
                    let trained = run(directory, config, attachment, division, recompute);
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
    let place = place(rank, world_size, port);
    // A rank that is lost here has panicked, and the test with it.
    let on_lost = Box::new(|_: &str| {});
    Ranks::join(&place, "test", Device::Cpu, Patience::default(), on_lost).unwrap()
}

fn place(rank: u32, world_size: u32, port: u16) -> Place {
    Place {
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
    attachment: &Attachment,
    division: Division,
    recompute: Recompute,
) -> Trained {
    let ranks = division.ranks.clone();
    let seed = Counter::from_seed(3);
    let mut model = Model::load_divided(
        directory,
        config.clone(),
        attachment.clone(),
        finetune_contract::Dtype::Fp32,
        Device::Cpu,
        seed,
        division,
    )
    .unwrap();
    start_adapters(&mut model, seed);
    let mut adamw = AdamW::new(model.trained(), Optimizer::Adamw, 0.1);
    let (mut losses, mut norms, mut sent) = (Vec::new(), Vec::new(), 0);
    for step in 0..STEPS {
        let before = ranks.sent_bytes();
        model.trained().forget_gradients();
        let (mut loss, mut targets) = (0.0, 0);
        for micro in (0..MICRO_BATCHES)
            .filter(|micro| micro % u64::from(ranks.world_size()) == u64::from(ranks.rank()))
        {
            let batch = micro_batch(step, micro);
            let noise = Dropout::new(0.1, seed.fold(step).fold(micro));
            if micro + u64::from(ranks.world_size()) >= MICRO_BATCHES {
                model.expect_last();
            }
            loss += model.accumulate_gradients(&batch, recompute, noise.as_ref());
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
    let names: Vec<_> = attachment.trained(config).into_iter().map(|spec| spec.name).collect();
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
    for (label, position) in batch.labels.iter_mut().zip(&batch.predicting) {
        *label = batch.tokens[*position as usize + 1];
    }
    batch
}

/// Checks 2 and 4 ranks against one, whole and sharded.
fn check(attachment: impl Fn(&ModelConfig) -> Attachment, recompute: Recompute) {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let attachment = attachment(&config);
    let one = train(directory.path(), &config, &attachment, 1, Strategy::None, recompute);
    assert!(one.losses[3] < one.losses[0], "{:?}", one.losses);
    let alone = [(1, Strategy::Zero1), (1, Strategy::Zero2), (1, Strategy::Zero3)];
    let together = [2, 4].map(|ranks| {
        [Strategy::Ddp, Strategy::Zero1, Strategy::Zero2, Strategy::Zero3]
            .map(|strategy| (ranks, strategy))
    });
    for (world_size, strategy) in alone.into_iter().chain(together.into_iter().flatten()) {
        let many = train(directory.path(), &config, &attachment, world_size, strategy, recompute);
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
    check(|_| Attachment::Full, Recompute::None);
}

#[test]
fn recomputation_does_not_either() {
    check(|_| Attachment::Full, Recompute::Block);
}

#[test]
fn adapters_do_not_either() {
    check(|config| Attachment::lora(config, &lora(&["all-linear"], &[])).unwrap(), Recompute::None);
}

#[test]
fn nor_do_modules_trained_whole_beside_adapters() {
    let lora = |config: &ModelConfig| {
        let settings = lora(&["q_proj", "embed_tokens"], &["layers.1.mlp.up_proj", "lm_head"]);
        let attachment = Attachment::lora(config, &settings).unwrap();
        assert!(
            matches!(&attachment, Attachment::Lora(LoraAttachment { saved, .. }) if saved.len() == 2)
        );
        attachment
    };
    check(lora, Recompute::None);
}

#[test]
fn who_does_not_come_is_named() {
    let port = free_port();
    let patience = Patience { rendezvous: Duration::from_secs(3), ..Patience::default() };
    let joined = std::thread::scope(|scope| {
        let coming = [0, 2].map(|rank| {
            scope.spawn(move || {
                let place = place(rank, 4, port);
                let on_lost = Box::new(|_: &str| {});
                Ranks::join(&place, "test", Device::Cpu, patience, on_lost).map(drop)
            })
        });
        coming.map(|rank| rank.join().unwrap())
    });
    let said = joined[0].as_ref().unwrap_err().to_string();
    let said = said.replace(&port.to_string(), "PORT");
    insta::assert_snapshot!(said, @"ranks 1, 3 of 4 did not come to 127.0.0.1:PORT within 3 s: see why in their log");
    assert!(joined[1].is_err());
}

/// The formulas of `src/plan/sizing.rs`, written out for the fixture.
#[test]
fn what_is_sent_is_what_the_strategy_needs() {
    let directory = tempfile::tempdir().unwrap();
    let config = checkpoint(directory.path(), LLAMA);
    let sent = |world_size, strategy| {
        let attachment = Attachment::Full;
        train(directory.path(), &config, &attachment, world_size, strategy, Recompute::None)
            .sent_bytes_per_step
    };
    // fp32; each tensor of the fixture is a multiple of 16 elements but the embedding, 61 x 32.
    let outer = (61 * 32 + 32) * 4_u64;
    let block = (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) * 4_u64;
    // Per step: the sum of loss and targets (2 f64); divided also the norm's square.
    let numbers = |world: u64, count: u64| 2 * (count * 8) * (world - 1) / world;
    for world in [2, 4] {
        let share = |bytes: u64| bytes * (world - 1) / world;
        let whole = 2 * share(outer + 3 * block) + numbers(world, 2);
        assert_eq!(sent(world as u32, Strategy::Ddp), whole);
        let micro_batches = MICRO_BATCHES / world;
        // Weights once, gradients once or once a micro-batch; of zero3 three blocks of which the two
        // last used are still there on the way back: 3 + 1 gathers in the first micro-batch, 1 + 1 in
        // each later one.
        let units = |gathers: u64, sums: u64| {
            share(outer) * 2
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
            // Units are filled up to a multiple of 16 elements for each rank.
            assert!(found.abs_diff(expected) < expected / 100, "{strategy:?}: {found} {expected}");
        }
    }
}
