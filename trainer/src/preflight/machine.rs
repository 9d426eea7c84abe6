//! Describes the machine: CPU, memory and matrix multiplication speed.

use std::time::Duration;

use finetune_contract::MachineFacts;
use tch::{Device, Kind, Tensor};

use crate::{
    ops::{self, Factor},
    runtime::clock,
};

/// The number of rows and columns of the matrices that are multiplied to measure the speed.
const SIZE: i64 = 1024;
/// Products per measurement; the fastest counts, because disturbances only make a product slower.
const PRODUCTS: usize = 6;
/// No product starts later than this after the first, which bounds the time on slow machines. At most
/// two element types are measured.
const TIME_LIMIT: Duration = Duration::from_millis(250);

/// Describes the machine; with `measure`, multiplies matrices for a fraction of a second.
pub(super) fn facts(measure: bool) -> MachineFacts {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        cpuinfo
            .lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let flags = field("flags");
    let native_bf16 = flags.split(' ').any(|flag| matches!(flag, "avx512_bf16" | "amx_bf16"));
    MachineFacts {
        cpu: field("model name"),
        cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u32,
        memory_bytes: memory_bytes(),
        native_bf16,
        bf16_kernel: ops::bf16_kernel().map(str::to_owned),
        fp32_gflops: measure.then(|| gflops(Kind::Float)),
        bf16_gflops: (measure && native_bf16).then(|| gflops(Kind::BFloat16)),
    }
}

fn gflops(kind: Kind) -> f64 {
    let matrix = Tensor::ones([SIZE, SIZE], (kind, Device::Cpu));
    let product = || {
        let started = clock::now();
        let _ = ops::products(&[(&matrix, Factor::Plain(&matrix))], None);
        started.elapsed().as_secs_f64()
    };
    let started = clock::now();
    // The first product is slow, because it also starts the threads.
    let mut fastest = product();
    for _ in 1..PRODUCTS {
        if started.elapsed() >= TIME_LIMIT {
            break;
        }
        fastest = product().min(fastest);
    }
    2.0 * (SIZE as f64).powi(3) / fastest / 1e9
}

/// Returns the memory limit of this process in bytes: that of its cgroup or the memory of the machine.
fn memory_bytes() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok()
        })
        .map_or(u64::MAX, |kibibytes| kibibytes * 1024);
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok())
        .fold(total, u64::min)
}

#[cfg(test)]
mod tests {
    use super::facts;

    #[test]
    fn describes_the_machine_of_the_test() {
        let facts = facts(true);
        assert!(
            facts.cores >= 1 && facts.memory_bytes > 1 << 28 && facts.fp32_gflops.unwrap() > 0.1
        );
    }
}
