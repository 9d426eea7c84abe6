//! Whole plans, as they are printed.

use finetune_api::manifest;
use finetune_contract::ModelFacts;

use super::{accelerators::Accelerator, plan, render, sizing, target::Target, testing};

const GB: u64 = 1_000_000_000;

fn check(model: ModelFacts, memory_bytes: u64, lines: &str) -> String {
    let text = format!("{}{lines}", include_str!("../../../examples/minimal.yaml"));
    let job = manifest::parse(&text).unwrap();
    let accelerator = Accelerator {
        name: "Test 80GB".to_owned(),
        memory_gi_b: 80.0,
        bf16_tflops: 300.0,
        fp32_tflops: 20.0,
        has_bf16: true,
        price_per_hour: Some(2.0),
        ..Accelerator::default()
    };
    match plan(&job, &testing::report(model, memory_bytes), Target::Local(&[accelerator]), 1) {
        Ok(plan) => render::text(&plan),
        Err(problems) => problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
    }
}

#[test]
fn plans_lora_on_a_small_model() {
    insta::assert_snapshot!(check(testing::smollm2(), 8 * GB, "  loraConfig: {}\n"), @r"
    Plan of minimal-2598f87e
      method                     LoRA            loraConfig is given: 2442240 trained parameters, 1.82 % of the model
      r                          8               updates are scaled by 2
      targetModules              all-linear      q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
      dtype                      bf16            this CPU multiplies bf16 natively
      packing                    true            rows share sequences, so no position is padding
      contextLength              256             holds 95 % of the rows; 40 of 1000 rows are longer (4000 of 150000 tokens)
      recompute                  none            fits the memory, and computes nothing twice
      trainBatchSizePerDevice    8               as many as fit in memory, at most 8
      gradientAccumulationSteps  2               16 sequences per step
      numEpochs                  3               as many as give about 100 steps, from 1 to 10
      steps                      111             590 sequences × 3 epochs / 16 a step; the last has the 10 that are left
      learningRate               0.0001          usual for LoRA
      lrSchedulerType            cosine          decays smoothly to zero
      numWarmupSteps             10              10 % of the steps, at most 10
      weightDecay                0               fine-tuning is short
      maxGradNorm                1               limits the effect of outlier batches
      seed                       42              fixed, so that a run can be repeated
      checkpointSteps            by time         about every 30 s, less often if it would take more than 1 % of the time

    Memory
      trained state                   44 MB
      activations                    710 MB
      output head                     50 MB
      temporaries                     58 MB
      checkpoint                      29 MB
      runtime                         75 MB
      peak                           967 MB  of 8.00 GB here
      if memory runs out         trainBatchSizePerDevice 4, 2, 1; then recompute block
      weights, mapped                269 MB  memory-mapped, reclaimable

    Time  about 20 min here, at 50 % of its peak FLOPS

    Other accelerators (at 35 % of the stated speed)
      Test 80GB                     2.89 GB  fits, about 2 s, costs 0.00
    ");
}

#[test]
fn computes_blocks_again_when_memory_is_short() {
    insta::assert_snapshot!(check(testing::smollm2(), GB / 2, "  loraConfig: {}\n  training: {contextLength: 1024}\n"), @r"
    Plan of minimal-70ff94e5
      method                     LoRA            loraConfig is given: 2442240 trained parameters, 1.82 % of the model
      r                          8               updates are scaled by 2
      targetModules              all-linear      q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
      dtype                      bf16            this CPU multiplies bf16 natively
      packing                    true            rows share sequences, so no position is padding
      contextLength              1024            set in the manifest; cuts nothing, the longest row has 700 tokens
      recompute                  block           the only way to fit the memory; about a third slower
      trainBatchSizePerDevice    2               as many as fit in memory, at most 8
      gradientAccumulationSteps  8               16 sequences per step
      numEpochs                  10              as many as give about 100 steps, from 1 to 10
      steps                      94              150 sequences × 10 epochs / 16 a step; the last has the 12 that are left
      learningRate               0.0001          usual for LoRA
      lrSchedulerType            cosine          decays smoothly to zero
      numWarmupSteps             9               10 % of the steps, at most 10
      weightDecay                0               fine-tuning is short
      maxGradNorm                1               limits the effect of outlier batches
      seed                       42              fixed, so that a run can be repeated
      checkpointSteps            by time         about every 30 s, less often if it would take more than 1 % of the time

    Alternatives not chosen
      recompute                  none            583 MB does not fit in 450 MB
      trainBatchSizePerDevice    8               714 MB does not fit in 450 MB
      trainBatchSizePerDevice    4               457 MB does not fit in 450 MB

    Memory
      trained state                   44 MB
      activations                     71 MB
      output head                     50 MB
      temporaries                     58 MB
      checkpoint                      29 MB
      runtime                         75 MB
      peak                           328 MB  of 500 MB here
      if memory runs out         trainBatchSizePerDevice 1
      weights, mapped                269 MB  memory-mapped, reclaimable

    Time  about 1.7 h here, at 50 % of its peak FLOPS

    Other accelerators (at 35 % of the stated speed)
      Test 80GB                     2.25 GB  fits, about 12 s, costs 0.01

    Warnings
      memory: 269 MB of weights are read in place, but only 172 MB of memory stay free for them: they will be read from disk again and again, and the run will be slow
    ");
}

#[test]
fn says_by_how_much_a_large_model_does_not_fit() {
    insta::assert_snapshot!(check(testing::llama_8b(), 64 * GB, ""), @"memory: the run needs 145.90 GB, but only 57.60 GB of the 64.00 GB here is available, 88.30 GB short: set loraConfig: {}, or lower training.contextLength below 256, or use a machine with more memory");
    insta::assert_snapshot!(check(testing::smollm2(), 2400 << 20, ""), @"memory: the run needs 2.63 GB, but only 2.26 GB of the 2.52 GB here is available, 363 MB short: set training.optimizer: adamw8bit, with which it is 1.82 GB, or set loraConfig: {}, or lower training.contextLength below 256, or use a machine with more memory");
    let small = check(testing::smollm2(), 2400 << 20, "  training: {optimizer: adamw8bit}\n");
    let lines: Vec<_> = small.lines().filter(|line| line.contains("optimizer")).collect();
    assert_eq!(lines.len(), 1, "{small}");
    assert!(lines[0].contains("adamw8bit       set in the manifest; 8-bit optimizer state"));
}

#[test]
fn plans_lora_on_a_large_model() {
    insta::assert_snapshot!(check(testing::llama_8b(), 64 * GB, "  loraConfig: {r: 16}\n"), @r"
    Plan of minimal-813dde86
      method                     LoRA            loraConfig is given: 41943040 trained parameters, 0.52 % of the model
      r                          16              updates are scaled by 1
      targetModules              all-linear      q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
      dtype                      bf16            this CPU multiplies bf16 natively
      packing                    true            rows share sequences, so no position is padding
      contextLength              256             holds 95 % of the rows; 40 of 1000 rows are longer (4000 of 150000 tokens)
      recompute                  none            fits the memory, and computes nothing twice
      trainBatchSizePerDevice    8               as many as fit in memory, at most 8
      gradientAccumulationSteps  2               16 sequences per step
      numEpochs                  3               as many as give about 100 steps, from 1 to 10
      steps                      111             590 sequences × 3 epochs / 16 a step; the last has the 10 that are left
      learningRate               0.0001          usual for LoRA
      lrSchedulerType            cosine          decays smoothly to zero
      numWarmupSteps             10              10 % of the steps, at most 10
      weightDecay                0               fine-tuning is short
      maxGradNorm                1               limits the effect of outlier batches
      seed                       42              fixed, so that a run can be repeated
      checkpointSteps            by time         about every 30 s, less often if it would take more than 1 % of the time

    Memory
      trained state                  755 MB
      activations                   6.18 GB
      output head                    131 MB
      temporaries                    512 MB
      checkpoint                     503 MB
      runtime                         75 MB
      peak                          8.16 GB  of 64.00 GB here
      if memory runs out         trainBatchSizePerDevice 4, 2, 1; then recompute block
      weights, mapped              16.06 GB  memory-mapped, reclaimable

    Time  about 19.7 h here, at 50 % of its peak FLOPS

    Other accelerators (at 35 % of the stated speed)
      Test 80GB                    26.50 GB  fits, about 2 min, costs 0.08
    ");
}

fn check_ranks(ranks: u32, memory_bytes: u64, lines: &str) -> String {
    let text = format!("{}{lines}", include_str!("../../../examples/minimal.yaml"));
    let job = manifest::parse(&text).unwrap();
    let report = testing::report(testing::smollm2(), memory_bytes);
    match plan(&job, &report, Target::Local(&[]), ranks) {
        Ok(plan) => render::text(&plan)
            .lines()
            .filter(|line| {
                let fields = ["ranks", "strategy", "recompute", "trainBatch", "gradientAcc"];
                let is_field = fields.iter().any(|field| line.trim_start().starts_with(field));
                is_field
                    || ["trained state", "gathered", "peak of each rank", "sent"]
                        .iter()
                        .any(|term| line.contains(term))
            })
            .collect::<Vec<_>>()
            .join("\n"),
        Err(problems) => problems.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn ranks_hold_everything_while_it_fits_each() {
    insta::assert_snapshot!(check_ranks(2, 8 * GB, "  loraConfig: {}\n"), @r"
    ranks                      2               as asked; each has 1/2 of this machine
    strategy                   ddp             each rank holds everything and sends gradients; of what fits, what sends least
    recompute                  none            fits the memory, and computes nothing twice
    trainBatchSizePerDevice    8               as many as fit in memory, at most 8
    gradientAccumulationSteps  1               16 sequences per step over 2 ranks
    strategy                   zero3           sends 208 MB in a step where 10 MB are enough
    trained state                   44 MB
    peak of each rank              967 MB  of 8.00 GB here
    sent in a step                  10 MB  by each rank
    ");
}

#[test]
fn ranks_divide_what_does_not_fit_each() {
    insta::assert_snapshot!(check_ranks(2, 5 * GB, ""), @r"
    ranks                      2               as asked; each has 1/2 of this machine
    strategy                   zero3           divides moments, gradients and weights; of what fits, what sends least
    recompute                  none            fits the memory, and computes nothing twice
    trainBatchSizePerDevice    4               as many as fit in memory, at most 8
    gradientAccumulationSteps  2               16 sequences per step over 2 ranks
    strategy                   zero1           2.42 GB does not fit in 2.25 GB
    strategy                   zero2           sends 1.04 GB in a step where 913 MB are enough
    trainBatchSizePerDevice    8               2.52 GB does not fit in 2.25 GB
    trained state                 1.21 GB
    gathered units                 326 MB
    peak of each rank             2.14 GB  of 5.00 GB here
    sent in a step                 913 MB  by each rank
    ");
}

#[test]
fn says_when_no_division_fits() {
    insta::assert_snapshot!(check_ranks(4, 4 * GB, ""), @"memory: each of 4 ranks needs 1.14 GB, but only 900 MB of the 4.00 GB here is available, 237 MB short: use fewer ranks, which share this machine's memory, or set loraConfig: {}, or lower training.contextLength below 256, or use a machine with more memory");
}

#[test]
fn a_step_has_the_same_sequences_over_any_power_of_two_of_ranks() {
    let job = manifest::parse(include_str!("../../../examples/minimal.yaml")).unwrap();
    let report = testing::report(testing::smollm2(), 64 * GB);
    for ranks in [1, 2, 4, 8, 16] {
        let plan = plan(&job, &report, Target::Local(&[]), ranks).unwrap();
        assert_eq!(plan.run_config.global_batch_size(), 16, "{ranks} ranks");
    }
}

#[test]
fn returns_every_reason_at_once() {
    let lines = "  loraConfig: {}\n  training: {contextLength: 9000, earlyStoppingPatience: 2}\n";
    insta::assert_snapshot!(check(testing::smollm2(), 8 * GB, lines), @r#"
spec.training.contextLength: is 9000, but llama was made for at most 8192 positions: lower it
spec.training.earlyStoppingPatience: needs dataset.validation, which is not set: there is no loss to watch; set it or remove the patience
"#);
}

proptest::proptest! {
    #[test]
    fn never_plans_over_the_memory(
        megabytes in 100_u64..8000, is_lora in proptest::bool::ANY, context in 0_usize..4,
    ) {
        let context = [128, 256, 512, 1024][context];
        let lora = if is_lora { "  loraConfig: {}\n" } else { "" };
        let minimal = include_str!("../../../examples/minimal.yaml");
        let text = format!("{minimal}{lora}  training: {{contextLength: {context}}}\n");
        let job = manifest::parse(&text).unwrap();
        let bytes = megabytes * 1_000_000;
        match plan(&job, &testing::report(testing::smollm2(), bytes), Target::Local(&[]), 1) {
            Ok(plan) => {
                let usable = (bytes as f64 * sizing::USABLE_MEMORY) as u64;
                proptest::prop_assert!(plan.memory.total() <= usable);
                proptest::prop_assert_eq!(plan.memory.total(), plan.run_config.predicted_peak_bytes);
            }
            Err(problems) => {
                proptest::prop_assert!(problems.iter().all(|problem| problem.location == "memory"));
            }
        }
    }
}
