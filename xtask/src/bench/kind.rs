//! Kinds of CPU that speeds are compared on: what multiplies bf16 fastest there, and whose it is.

use anyhow::{Context, Result};

/// Returns the kind of this machine's CPU as part of a file name, such as `amd-avx512-bf16`.
pub(crate) fn here() -> Result<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    Ok(of(&text))
}

fn of(cpuinfo: &str) -> String {
    let value = |key: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
    };
    let vendor = match value("vendor_id") {
        "GenuineIntel" => "intel",
        "AuthenticAMD" => "amd",
        _ => "other",
    };
    let flags: Vec<&str> = value("flags").split(' ').collect();
    let known = [
        ("amx_bf16", "amx"),
        ("avx512_bf16", "avx512-bf16"),
        ("avx512f", "avx512"),
        ("avx2", "avx2"),
    ];
    let best = known.iter().find(|(flag, _)| flags.contains(flag));
    format!("{vendor}-{}", best.map_or("none", |(_, name)| name))
}

#[cfg(test)]
mod tests {
    use super::of;

    #[test]
    fn a_kind_is_a_vendor_and_the_best_instructions() {
        let cpu = |vendor: &str, flags: &str| {
            of(&format!("processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n"))
        };
        assert_eq!(cpu("GenuineIntel", "avx2 avx512f avx512_bf16 amx_bf16"), "intel-amx");
        assert_eq!(cpu("AuthenticAMD", "avx2 avx512f avx512_bf16"), "amd-avx512-bf16");
        assert_eq!(cpu("GenuineIntel", "avx2 avx512f"), "intel-avx512");
        assert_eq!(cpu("Acme", "fpu"), "other-none");
    }
}
