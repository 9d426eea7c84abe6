//! When to save: often enough that little work is lost, rarely enough that training hardly waits.

/// Seconds of work that may be lost, if [`STALL_SHARE`] allows it.
const MAX_LOSS_SECONDS: f64 = 30.0;
/// The share of the time that training may wait for checkpoints.
const STALL_SHARE: f64 = 0.01;
/// The longest write for which a save is started earlier; otherwise a slow store would be written
/// to without a pause.
const LONGEST_WRITE_SECONDS: f64 = MAX_LOSS_SECONDS / 2.0;

/// Decides when to save, from the time and cost of the last checkpoint. Times are in seconds since
/// an arbitrary start.
///
/// Its decisions depend on the speed of the machine, so only checkpoints may depend on them.
#[derive(Debug, Clone)]
pub struct SaveCadence {
    every_steps: Option<u64>,
    saved_step: u64,
    saved_at: f64,
    stall_seconds: f64,
    write_seconds: f64,
}

impl SaveCadence {
    /// Creates a cadence: every so many steps, where 0 means never, or as time and cost allow.
    pub fn new(every_steps: Option<u64>) -> Self {
        Self { every_steps, saved_step: 0, saved_at: 0.0, stall_seconds: 0.0, write_seconds: 0.0 }
    }

    /// Records that the state after `step` is saved.
    pub fn mark_saved(&mut self, step: u64, now: f64) {
        self.saved_step = step;
        self.saved_at = now;
    }

    /// Records how long training waited for the last checkpoint.
    pub fn record_stall(&mut self, seconds: f64) {
        self.stall_seconds = seconds;
    }

    /// Records how long the last checkpoint was written in the background.
    pub fn record_write(&mut self, seconds: f64) {
        self.write_seconds = seconds;
    }

    /// Reports whether to save after `step`, which took `step_seconds`.
    pub fn is_due(&self, step: u64, now: f64, step_seconds: f64) -> bool {
        match self.every_steps {
            Some(0) => false,
            // A save that was skipped during another write is made up for.
            Some(every) => step / every > self.saved_step / every,
            None => {
                let unsaved = now - self.saved_at;
                let unsaved_after_next = unsaved + step_seconds;
                let write = self.write_seconds.min(LONGEST_WRITE_SECONDS);
                let is_cheap = self.stall_seconds <= STALL_SHARE * (unsaved + self.stall_seconds);
                step > self.saved_step && unsaved_after_next + write > MAX_LOSS_SECONDS && is_cheap
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::SaveCadence;

    /// Simulates `steps` steps of so many seconds; returns the times of the checkpoints.
    fn times(
        cadence: &mut SaveCadence,
        steps: u64,
        step_seconds: f64,
        [stall, write]: [f64; 2],
    ) -> Vec<f64> {
        let (mut now, mut times) = (0.0, Vec::new());
        for step in 1..=steps {
            now += step_seconds;
            if cadence.is_due(step, now, step_seconds) {
                times.push(now);
                now += stall;
                cadence.mark_saved(step, now);
                cadence.record_stall(stall);
                cadence.record_write(write);
            }
        }
        times
    }

    #[test]
    fn at_most_half_a_minute_of_work_is_lost() {
        for (step_seconds, write) in [(0.01, 0.05), (0.5, 0.1), (2.0, 3.0), (7.0, 0.0)] {
            let times = times(&mut SaveCadence::new(None), 3000, step_seconds, [0.01, write]);
            let mut before = 0.0;
            for time in times {
                let lost = time - before + write;
                assert!(lost <= 30.0 + write + 1e-6, "{step_seconds} {lost}");
                assert!(lost > 30.0 - 2.0 * (step_seconds + write), "too often: {lost}");
                before = time;
            }
        }
    }

    #[test]
    fn every_step_longer_than_that_is_saved() {
        let times = times(&mut SaveCadence::new(None), 4, 60.0, [0.0, 1.0]);
        assert_eq!(times, [60.0, 120.0, 180.0, 240.0]);
    }

    #[test]
    fn at_most_a_hundredth_of_the_time_is_spent() {
        let stall = 4.0;
        let times = times(&mut SaveCadence::new(None), 2000, 1.0, [stall, 20.0]);
        assert!(times[0] < 31.0, "the first one is to measure it");
        for pair in times.windows(2) {
            let apart = pair[1] - pair[0];
            assert!(stall / apart <= 0.01 && apart < 402.0, "{apart}");
        }
        assert!(times.len() >= 5);
    }

    #[test]
    fn a_slow_store_is_not_written_to_without_a_pause() {
        let times = times(&mut SaveCadence::new(None), 600, 1.0, [0.0, 1000.0]);
        assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= 14.0), "{times:?}");
    }

    #[test]
    fn requested_steps_are_saved() {
        let mut cadence = SaveCadence::new(Some(3));
        let due = |cadence: &SaveCadence, steps: std::ops::RangeInclusive<u64>| {
            steps.filter(|&step| cadence.is_due(step, 0.0, 0.0)).collect::<Vec<_>>()
        };
        assert_eq!(due(&cadence, 1..=5), [3, 4, 5], "3 until it is saved");
        cadence.mark_saved(5, 0.0);
        assert_eq!(due(&cadence, 5..=7), [6, 7], "taken late, it overlaps no other");
        assert!(due(&SaveCadence::new(Some(0)), 1..=9).is_empty());
    }
}
