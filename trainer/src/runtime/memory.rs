//! The process's anonymous memory, as the kernel counts it, or what it holds of a GPU.
//!
//! Mapped base weights are page cache, shared and reclaimable, and are not counted here: what
//! decides whether a run fits is what cannot be given back.

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

/// How often memory is looked at. A micro-batch's peak lasts longer than this on any model worth
/// planning for; a tiny model's may be missed by a few megabytes.
const INTERVAL: Duration = Duration::from_millis(10);

/// Watches the memory a run needs until dropped: the process's anonymous memory, or that of the GPU
/// it computes on.
#[derive(Debug)]
pub struct PeakMemory {
    device: Device,
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl PeakMemory {
    /// Starts watching.
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

    /// Returns the largest amount seen so far, in bytes.
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

/// Returns the anonymous memory of this process now, in bytes; 0 where the kernel does not tell.
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

/// Returns how many processes of this machine the kernel has ended for want of memory; none where it
/// does not tell.
///
/// # Source
/// `oom_kill` of `/proc/vmstat`, which counts those of a cgroup's limit too.
pub fn oom_kills() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::PeakMemory;

    #[test]
    fn remembers_memory_that_was_given_back() {
        // Other tests of this process allocate too, so only what cannot depend on them is asserted.
        let peak = PeakMemory::watch(Device::Cpu);
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        let with_block = peak.bytes();
        drop(block);
        assert!(with_block >= 64 << 20, "{with_block}");
        assert!(peak.bytes() >= with_block);
    }
}
