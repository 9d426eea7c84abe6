//! What a cluster needs of the system: programs from Debian's (and Ubuntu's) packages.

use std::{path::PathBuf, process::Command};

use anyhow::{Result, bail};

use crate::tools::shell;

/// Where containerd looks for network plugins.
pub(crate) const CNI_PLUGINS: &str = "/usr/lib/cni";

/// Programs, by name or absolute path, and the packages that have them.
const NEEDS: [(&str, &[&str]); 7] = [
    ("runc", &["runc"]),
    ("/usr/lib/cni/bridge", &["containernetworking-plugins"]),
    ("nft", &["nftables"]),
    ("ip", &["iproute2"]),
    ("nsenter", &["util-linux"]),
    ("openssl", &["openssl"]),
    ("cc", &["gcc", "libc6-dev"]),
];

/// Checks that everything is there, and installs it where that was allowed.
pub(crate) fn ensure() -> Result<()> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    let may_install =
        shell::is_ci() || std::env::var("FINETUNE_INSTALL").is_ok_and(|value| value == "1");
    if !may_install {
        bail!(
            "Debian packages are missing: {}; install them, or set FINETUNE_INSTALL=1",
            missing.join(" ")
        );
    }
    shell::run(Command::new("apt-get").args(["update", "--quiet"]))?;
    let mut install = Command::new("apt-get");
    install.args(["install", "--quiet", "--yes", "--no-install-recommends"]).args(missing);
    shell::run(install.env("DEBIAN_FRONTEND", "noninteractive"))?;
    let missing = self::missing();
    if !missing.is_empty() {
        bail!("programs of these packages are missing though they are installed: {missing:?}");
    }
    Ok(())
}

/// Finds a program where the system has them, also those for root that a user's PATH lacks.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    directories.extend(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    directories.iter().map(|directory| directory.join(program)).find(|path| path.is_file())
}

fn missing() -> Vec<&'static str> {
    NEEDS.iter().filter(|need| find(need.0).is_none()).flat_map(|need| need.1).copied().collect()
}
