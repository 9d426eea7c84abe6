//! The peak memory of a run: the process's anonymous memory as the kernel counts it, or GPU memory.
//!
//! Mapped base weights are page cache, shared and reclaimable, and are not counted: only memory
//! that cannot be reclaimed decides whether a run fits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tch::Device;

use crate::runtime::device;

/// How often memory is sampled. The peak of a micro-batch lasts longer than this on any model worth
/// planning for; for a tiny model a few megabytes may be missed.
const INTERVAL: Duration = Duration::from_millis(10);

/// Samples the memory of a run until dropped: the anonymous memory of the process, or the memory of
/// its GPU.
#[derive(Debug)]
pub struct PeakMemory {
    device: Device,
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl PeakMemory {
    /// Starts sampling.
    pub fn watch(device: Device) -> Self {
        let (peak, stop) =
            (Arc::new(AtomicU64::new(anonymous_bytes())), Arc::new(AtomicBool::new(false)));
        let watcher = std::thread::Builder::new()
            .name("peak-memory".to_owned())
            .spawn({
                let (peak, stop) = (Arc::clone(&peak), Arc::clone(&stop));
                move || {
                    while !stop.load(Ordering::Relaxed) {
                        peak.fetch_max(anonymous_bytes(), Ordering::Relaxed);
                        std::thread::sleep(INTERVAL);
                    }
                }
            })
            .ok();
        Self { device, peak, stop, watcher }
    }

    /// Returns the peak so far, in bytes.
    pub fn bytes(&self) -> u64 {
        if let Some(peak) = device::peak_memory(self.device) {
            return peak;
        }
        self.peak.fetch_max(anonymous_bytes(), Ordering::Relaxed);
        self.peak.load(Ordering::Relaxed)
    }
}

impl Drop for PeakMemory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

/// Returns the current anonymous memory of this process, in bytes; 0 if the kernel does not report
/// it.
///
/// # Source
/// `RssAnon` of proc_pid_status(5), in kibibytes.
pub fn anonymous_bytes() -> u64 {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return 0 };
    let kibibytes = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.trim().split(' ').next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// Returns the number of OOM kills on this machine; `None` if the kernel does not report it.
///
/// # Source
/// `oom_kill` of `/proc/vmstat`, which includes those of cgroup limits.
pub fn oom_kills() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::PeakMemory;

    #[test]
    fn remembers_memory_that_was_freed() {
        // Other tests of this process allocate too, so only what cannot depend on them is asserted.
        let peak = PeakMemory::watch(Device::Cpu);
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        let with_block = peak.bytes();
        drop(block);
        assert!(with_block >= 64 << 20, "{with_block}");
        assert!(peak.bytes() >= with_block);
    }
}
