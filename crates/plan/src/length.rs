//! Decides the length of a run: its steps, and the sequences of the last one.

use finetune_api::Training;

use super::choices::Choices;

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Length {
    pub(super) total_steps: u64,
    /// Absent if every step is full.
    pub(super) total_sequences: Option<u64>,
}

/// Takes `maxSteps`, or as many steps as the epochs have; an epoch ends at its last row, so that no
/// row is seen more often than asked for.
pub(super) fn decide(
    training: &Training,
    sequences: u64,
    global: u64,
    decisions: &mut Choices,
) -> Length {
    if let Some(steps) = training.max_steps {
        let steps = steps.unsigned_abs();
        decisions.add(
            "maxSteps",
            steps,
            format!(
                "set in the manifest; {:.1} epochs of {sequences} sequences",
                (steps * global) as f64 / sequences as f64
            ),
        );
        return Length { total_steps: steps, total_sequences: None };
    }
    let per_epoch = sequences.div_ceil(global);
    let default = 100_u64.div_ceil(per_epoch).clamp(1, 10);
    let epochs = decisions.pick(
        "numEpochs",
        training.num_epochs,
        default as f64,
        "as many as give about 100 steps, from 1 to 10",
    );
    let total = ((sequences as f64 * epochs).round() as u64).max(1);
    let steps = total.div_ceil(global);
    let last = total - (steps - 1) * global;
    let rest = match last {
        last if last == global => String::new(),
        1 => "; the last has the 1 that is left".to_owned(),
        last => format!("; the last has the {last} that are left"),
    };
    let reason = format!("{sequences} sequences × {epochs} epochs / {global} a step{rest}");
    decisions.add("steps", steps, reason);
    Length { total_steps: steps, total_sequences: (last < global).then_some(total) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(training: &Training, sequences: u64, global: u64) -> String {
        let mut decisions = Choices::default();
        let Length { total_steps, total_sequences } =
            decide(training, sequences, global, &mut decisions);
        let reason = decisions.0.pop().unwrap().reason;
        format!("{total_steps} steps, {total_sequences:?}: {reason}")
    }

    #[test]
    fn an_epoch_ends_at_its_last_row() {
        let epochs = |epochs| Training { num_epochs: Some(epochs), ..Training::default() };
        assert_eq!(
            check(&epochs(1.0), 5, 4),
            "2 steps, Some(5): 5 sequences × 1 epochs / 4 a step; the last has the 1 that is left"
        );
        assert_eq!(check(&epochs(2.0), 6, 4), "3 steps, None: 6 sequences × 2 epochs / 4 a step");
        assert_eq!(
            check(&epochs(0.5), 100, 16),
            "4 steps, Some(50): 100 sequences × 0.5 epochs / 16 a step; the last has the 2 that are left"
        );
        assert_eq!(
            check(&epochs(0.01), 5, 1),
            "1 steps, None: 5 sequences × 0.01 epochs / 1 a step"
        );
        let steps = Training { max_steps: Some(2), ..Training::default() };
        assert_eq!(
            check(&steps, 5, 4),
            "2 steps, None: set in the manifest; 1.6 epochs of 5 sequences"
        );
    }
}
