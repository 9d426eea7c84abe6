//! AdamW over flat parameters, clipping, and the learning-rate schedule.

use finetune_contract::{LrScheduler, Optimizer, TrainingSettings};
use tch::Tensor;

use crate::{
    ops::{self, QuantizedState},
    params::flat::{FlatParams, FlatState},
    runtime::rng::RngKey,
};

/// AdamW's decay rate of the first moment; the default everywhere.
const BETA1: f64 = 0.9;
/// AdamW's decay rate of the second moment.
const BETA2: f64 = 0.999;
/// AdamW's guard against division by zero.
const EPSILON: f64 = 1e-8;

/// AdamW with decoupled weight decay.
///
/// # Source
/// arXiv 1711.05101, algorithm 2; the order of operations is `torch.optim.AdamW`'s, 2.13.
#[derive(Debug)]
pub struct AdamW {
    moments: Moments,
    weight_decay: f64,
    /// (first element, length, decays); adjacent spans with the same decay are merged.
    spans: Vec<(i64, i64, bool)>,
}

/// The first and the second moment of each parameter, flat.
#[derive(Debug)]
enum Moments {
    Fp32([Tensor; 2]),
    Quantized([QuantizedState; 2]),
}

impl AdamW {
    /// Creates an optimizer with zero moments.
    pub fn new(params: &FlatParams, optimizer: Optimizer, weight_decay: f64) -> Self {
        let master = params.master();
        let moments = match optimizer {
            Optimizer::Adamw => Moments::Fp32([master.zeros_like(), master.zeros_like()]),
            Optimizer::Adamw8bit => Moments::Quantized([true, false].map(|is_signed| {
                QuantizedState::zeros(master.numel() as i64, is_signed, master.device())
            })),
        };
        let mut spans: Vec<(i64, i64, bool)> = Vec::new();
        for (start, length, decays) in params.decay_spans() {
            let (start, end) = (start as i64, (start + length) as i64);
            match spans.last_mut() {
                Some((first, merged, same)) if *same == decays => *merged = end - *first,
                _ => spans.push((start, end - start, decays)),
            }
        }
        Self { moments, weight_decay, spans }
    }

    /// Returns both moments, to be stored or restored.
    pub fn moments(&self) -> [FlatState<'_>; 2] {
        match &self.moments {
            Moments::Fp32(moments) => moments.each_ref().map(FlatState::Fp32),
            Moments::Quantized(moments) => moments.each_ref().map(FlatState::Quantized),
        }
    }

    /// Updates the masters from the gradients times `scale`; `step` starts at 1.
    pub fn step(&mut self, params: &mut FlatParams, scale: f64, learning_rate: f64, step: u64) {
        let correction = |beta: f64| 1.0 - beta.powi(i32::try_from(step).unwrap_or(i32::MAX));
        let weight_decay_factor = |decays| {
            let weight_decay = if decays { self.weight_decay } else { 0.0 };
            (1.0 - learning_rate * weight_decay) as f32
        };
        let factors = |weight_decay_factor| ops::AdamWStep {
            grad_scale: scale as f32,
            beta1: BETA1 as f32,
            beta2: BETA2 as f32,
            epsilon: EPSILON as f32,
            weight_decay_factor,
            step_size: (learning_rate / correction(BETA1)) as f32,
            bias_correction2_sqrt: correction(BETA2).sqrt() as f32,
        };
        match &self.moments {
            Moments::Fp32([exp_avg, exp_avg_sq]) => {
                for &(first, length, decays) in &self.spans {
                    let part = |flat: &Tensor| flat.narrow(0, first, length);
                    let state = [params.master(), exp_avg, exp_avg_sq].map(part);
                    let factors = factors(weight_decay_factor(decays));
                    ops::adamw(factors, &part(params.grad()), state, part(params.compute()));
                }
            }
            // Quantization blocks can cross spans, so weight decay is a pass of its own.
            Moments::Quantized(moments) => {
                for &(first, length, decays) in &self.spans {
                    let factor = weight_decay_factor(decays);
                    if factor < 1.0 {
                        let mut master = params.master().narrow(0, first, length);
                        let _ = master.g_mul_scalar_(f64::from(factor));
                    }
                }
                let key = RngKey::from_seed(step).to_bits();
                let [master, compute] =
                    [params.master(), params.compute()].map(Tensor::shallow_clone);
                let moments = moments.each_ref();
                ops::adamw_8bit(factors(1.0), key, params.grad(), master, moments, compute);
            }
        }
    }
}

/// The norm of a step's mean gradient, and the factor that turns the summed gradient into the
/// clipped mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clipped {
    /// The 2-norm of the mean gradient before clipping.
    pub norm: f64,
    /// The factor on the summed gradient.
    pub scale: f64,
}

/// Clips the mean gradient, given the squared norm of the summed one; a `max_grad_norm` of 0 never
/// clips.
///
/// Gradients are not written: [`AdamW::step`] applies the factor when it reads them.
///
/// # Source
/// `torch.nn.utils.clip_grad_norm_`, whose divisor has 1e-6 added.
pub fn clip(square: f64, target_tokens: u64, max_grad_norm: f64) -> Clipped {
    let targets = target_tokens as f64;
    let norm = square.sqrt() / targets;
    let is_clipped = max_grad_norm > 0.0 && norm > max_grad_norm;
    let scale = if is_clipped { max_grad_norm / (norm + 1e-6) } else { 1.0 };
    Clipped { norm, scale: scale / targets }
}

/// Returns the learning rate of a step; the first step is 0.
///
/// # Source
/// `transformers/optimization.py: get_{cosine,linear,constant}_schedule_with_warmup` and, with a
/// least share of the peak, `get_cosine_with_min_lr_schedule_with_warmup`. Differs: the
/// warm-up's first step has `1 / num_warmup_steps` of the rate, not zero, so no step is wasted.
pub fn learning_rate(settings: &TrainingSettings, step: u64) -> f64 {
    let warmup = settings.num_warmup_steps;
    if step < warmup {
        return settings.learning_rate * (step + 1) as f64 / warmup as f64;
    }
    let span = settings.total_steps.saturating_sub(warmup).max(1) as f64;
    let done = ((step - warmup) as f64 / span).min(1.0);
    let factor = match settings.lr_scheduler_type {
        LrScheduler::Constant => 1.0,
        LrScheduler::Linear => 1.0 - done,
        LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
    };
    let least = settings.min_learning_rate_ratio.unwrap_or(0.0);
    settings.learning_rate * (least + (1.0 - least) * factor)
}

#[cfg(test)]
mod tests {
    use finetune_contract::{Dtype, testing::training_settings};
    use tch::{Device, Kind};

    use super::*;
    use crate::{architecture::modules::TensorSpec, runtime::rng::RngKey};

    fn settings(lr_scheduler_type: LrScheduler) -> TrainingSettings {
        TrainingSettings {
            total_steps: 10,
            learning_rate: 1.0,
            lr_scheduler_type,
            num_warmup_steps: 4,
            weight_decay: 0.0,
            ..training_settings()
        }
    }

    #[test]
    fn schedules_rise_and_fall() {
        let rates = |kind| {
            let settings = settings(kind);
            (0..10)
                .map(|step| format!("{:.3}", learning_rate(&settings, step)))
                .collect::<Vec<_>>()
                .join(" ")
        };
        insta::assert_snapshot!(rates(LrScheduler::Constant), @"0.250 0.500 0.750 1.000 1.000 1.000 1.000 1.000 1.000 1.000");
        insta::assert_snapshot!(rates(LrScheduler::Linear), @"0.250 0.500 0.750 1.000 1.000 0.833 0.667 0.500 0.333 0.167");
        insta::assert_snapshot!(rates(LrScheduler::Cosine), @"0.250 0.500 0.750 1.000 1.000 0.933 0.750 0.500 0.250 0.067");
    }

    #[test]
    fn a_schedule_ends_at_the_least_share_of_its_peak() {
        for kind in [LrScheduler::Linear, LrScheduler::Cosine] {
            let to_zero = settings(kind);
            let to_a_tenth =
                TrainingSettings { min_learning_rate_ratio: Some(0.1), ..to_zero.clone() };
            let rates = |step| (learning_rate(&to_zero, step), learning_rate(&to_a_tenth, step));
            let (without, with) = rates(2);
            assert!((with - without).abs() < 1e-12, "{kind:?}: the warm-up is the same");
            for step in 4..10 {
                let (without, with) = rates(step);
                assert!((with - (0.1 + 0.9 * without)).abs() < 1e-12, "{kind:?} {step}: {with}");
            }
            assert!((rates(10).1 - 0.1).abs() < 1e-12, "{kind:?}: after the last step");
        }
    }

    fn params() -> FlatParams {
        let spec = |name: &str, shape: &[usize]| TensorSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
        };
        let params = FlatParams::new(
            &[spec("matrix", &[300, 301]), spec("vector", &[7])],
            Dtype::Fp32,
            Device::Cpu,
        );
        let seed = RngKey::from_seed(1);
        params
            .master()
            .shallow_clone()
            .copy_(&seed.normal_tensor(&params.master().size(), Device::Cpu));
        params
    }

    #[test]
    fn steps_equal_the_textbook_formula_in_f64() {
        let mut params = params();
        let mut optimizer = AdamW::new(&params, Optimizer::Adamw, 0.1);
        let wide = |tensor: &Tensor| tensor.to_kind(Kind::Double).copy();
        let decay = Tensor::zeros_like(params.master()).to_kind(Kind::Double);
        let _ = decay.narrow(0, 0, 300 * 301).fill_(0.1);
        let mut value = wide(params.master());
        let (mut m, mut v) = (value.zeros_like(), value.zeros_like());
        for step in 1..=10_i32 {
            let grad =
                RngKey::from_seed(100 + step as u64).normal_tensor(&value.size(), Device::Cpu);
            // The gradient is a sum over four targets.
            params.grad().shallow_clone().copy_(&(&grad * 4.0));
            let (g, rate) = (wide(&grad), 1e-2 / f64::from(step));
            m = m * 0.9 + &g * 0.1;
            v = v * 0.999 + g.square() * 0.001;
            let (m_hat, v_hat) =
                (&m / (1.0 - 0.9_f64.powi(step)), &v / (1.0 - 0.999_f64.powi(step)));
            value = &value - (&value * &decay) * rate - m_hat / (v_hat.sqrt() + 1e-8) * rate;
            optimizer.step(&mut params, 0.25, rate, step as u64);
        }
        let split = |flat: &Tensor| (flat.narrow(0, 0, 90_300), flat.narrow(0, 90_300, 7));
        let (found, expected) = (split(&wide(params.master())), split(&value));
        for (found, expected) in [(found.0, expected.0), (found.1, expected.1)] {
            let difference = (found - expected).abs().max().double_value(&[]);
            assert!(difference < 2e-6, "{difference:e}");
        }
    }

    #[test]
    fn clips_to_the_norm_and_only_above_it() {
        // A sum over 4 targets of norm 8, whose mean has norm 2.
        let clipped = clip(64.0, 4, 1.0);
        assert_eq!(clipped, Clipped { norm: 2.0, scale: clipped.scale });
        assert!((8.0 * clipped.scale - 1.0).abs() < 1e-6, "{clipped:?}");
        for never in [clip(64.0, 4, 0.0), clip(64.0, 4, 2.0)] {
            assert_eq!(never, Clipped { norm: 2.0, scale: 0.25 });
        }
    }
}
