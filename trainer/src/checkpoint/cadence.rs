//! When to save: so that little work can be lost, and little time is spent on it.

/// Seconds of work that may be lost, where the next bound allows it.
const LOSS_SECONDS: f64 = 30.0;
/// The share of the time that training may stand still for checkpoints.
const STALL_SHARE: f64 = 0.01;
/// The longest write that is made up for by saving earlier; a slow store would else be written to
/// without a pause.
const LONGEST_WRITE_SECONDS: f64 = LOSS_SECONDS / 2.0;

/// When the last checkpoint was taken and what it cost; times are seconds since any one moment.
///
/// What it decides depends on the speed of the machine, so nothing but the checkpoints may depend
/// on it.
#[derive(Debug, Clone)]
pub struct Pace {
    every_steps: Option<u64>,
    taken_step: u64,
    taken_at: f64,
    stall_seconds: f64,
    write_seconds: f64,
}

impl Pace {
    /// Starts a pace: every so many steps, where 0 means never, or as time and cost allow.
    pub fn new(every_steps: Option<u64>) -> Self {
        Self { every_steps, taken_step: 0, taken_at: 0.0, stall_seconds: 0.0, write_seconds: 0.0 }
    }

    /// Notes that nothing is lost of what was done up to `step`.
    pub fn safe(&mut self, step: u64, now: f64) {
        self.taken_step = step;
        self.taken_at = now;
    }

    /// Notes how long training stood still for the last checkpoint.
    pub fn stalled(&mut self, seconds: f64) {
        self.stall_seconds = seconds;
    }

    /// Notes how long writing it took beside training.
    pub fn written(&mut self, seconds: f64) {
        self.write_seconds = seconds;
    }

    /// Tells whether to save after `step`, of which the last took `step_seconds`.
    pub fn is_due(&self, step: u64, now: f64, step_seconds: f64) -> bool {
        match self.every_steps {
            Some(0) => false,
            // One that was passed over because another was being written is made up for.
            Some(every) => step / every > self.taken_step / every,
            None => {
                let unsaved = now - self.taken_at;
                let at_the_next = unsaved + step_seconds;
                let write = self.write_seconds.min(LONGEST_WRITE_SECONDS);
                let is_cheap = self.stall_seconds <= STALL_SHARE * (unsaved + self.stall_seconds);
                step > self.taken_step && at_the_next + write > LOSS_SECONDS && is_cheap
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pace;

    /// Trains `steps` steps of so many seconds; returns the times of the checkpoints.
    fn times(pace: &mut Pace, steps: u64, step_seconds: f64, [stall, write]: [f64; 2]) -> Vec<f64> {
        let (mut now, mut times) = (0.0, Vec::new());
        for step in 1..=steps {
            now += step_seconds;
            if pace.is_due(step, now, step_seconds) {
                times.push(now);
                now += stall;
                pace.safe(step, now);
                pace.stalled(stall);
                pace.written(write);
            }
        }
        times
    }

    #[test]
    fn at_most_half_a_minute_of_work_is_lost() {
        for (step_seconds, write) in [(0.01, 0.05), (0.5, 0.1), (2.0, 3.0), (7.0, 0.0)] {
            let times = times(&mut Pace::new(None), 3000, step_seconds, [0.01, write]);
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
    fn steps_longer_than_that_are_each_saved() {
        let times = times(&mut Pace::new(None), 4, 60.0, [0.0, 1.0]);
        assert_eq!(times, [60.0, 120.0, 180.0, 240.0]);
    }

    #[test]
    fn at_most_a_hundredth_of_the_time_is_spent() {
        let stall = 4.0;
        let times = times(&mut Pace::new(None), 2000, 1.0, [stall, 20.0]);
        assert!(times[0] < 31.0, "the first one is to measure it");
        for pair in times.windows(2) {
            let apart = pair[1] - pair[0];
            assert!(stall / apart <= 0.01 && apart < 402.0, "{apart}");
        }
        assert!(times.len() >= 5);
    }

    #[test]
    fn a_slow_store_is_not_written_to_without_a_pause() {
        let times = times(&mut Pace::new(None), 600, 1.0, [0.0, 1000.0]);
        assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= 14.0), "{times:?}");
    }

    #[test]
    fn steps_that_are_asked_for_are_kept() {
        let mut pace = Pace::new(Some(3));
        let due = |pace: &Pace, steps: std::ops::RangeInclusive<u64>| {
            steps.filter(|&step| pace.is_due(step, 0.0, 0.0)).collect::<Vec<_>>()
        };
        assert_eq!(due(&pace, 1..=5), [3, 4, 5], "3 until it is taken");
        pace.safe(5, 0.0);
        assert_eq!(due(&pace, 5..=7), [6, 7], "taken late, it moves no other");
        assert!(due(&Pace::new(Some(0)), 1..=9).is_empty());
    }
}
