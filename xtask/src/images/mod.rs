//! The images: each binary with its library closure, CA certificates and an ordinary user.
//!
//! `images/*/Containerfile` says the same for people with a container tool: the directories made
//! here are their build contexts.

pub(crate) mod oci;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    build::{self, Binaries},
    images::oci::Image,
    tools::{libtorch, shell},
};

/// The operator image's name, where no registry is meant.
pub(crate) const OPERATOR: &str = "localhost/finetune-operator:dev";
/// The trainer image's name.
pub(crate) const TRAINER: &str = "localhost/finetune-trainer:dev";
/// The name of the trainer's image for GPUs.
const TRAINER_CUDA: &str = "localhost/finetune-trainer-cuda:dev";
/// Where the container toolkit puts the driver's libraries, which no image holds.
const DRIVER_LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu:/usr/lib64:/usr/local/nvidia/lib64";
/// An image of a few of this machine's programs, for tests that look at a cluster from inside.
pub(crate) const PROBE: &str = "localhost/finetune-probe:dev";
const PROBE_PROGRAMS: [&str; 3] = ["bash", "getent", "sleep"];
/// The largest operator image, compressed.
const OPERATOR_BYTES_MAX: usize = 30_000_000;
const USER: u32 = 65532;
/// Where distributions keep the certificates of authorities.
const CERTIFICATES: [&str; 2] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// The archives.
pub(crate) struct Archives {
    /// The operator's.
    pub(crate) operator: PathBuf,
    /// The trainer's.
    pub(crate) trainer: PathBuf,
}

/// Builds both images.
pub(crate) fn run() -> Result<Archives> {
    let binaries = build::run()?;
    let archives = write(&binaries)?;
    for archive in [&archives.operator, &archives.trainer] {
        let size = std::fs::metadata(archive)?.len() as f64;
        println!("{}: {:.1} MB", archive.display(), size / 1e6);
    }
    Ok(archives)
}

/// Writes the images of built binaries.
pub(crate) fn write(binaries: &Binaries) -> Result<Archives> {
    let cpu = libtorch::directory()?;
    let (operator, size) = image("operator", OPERATOR, &binaries.finetune, &cpu, true)?;
    ensure!(
        size <= OPERATOR_BYTES_MAX,
        "the operator's image has {size} bytes, more than {OPERATOR_BYTES_MAX}"
    );
    let (trainer, _) = image("trainer", TRAINER, &binaries.trainer, &cpu, false)?;
    Ok(Archives { operator, trainer })
}

/// Builds the image of the trainer that computes on GPUs.
pub(crate) fn run_cuda() -> Result<()> {
    let binary = build::run_cuda()?;
    let (archive, size) =
        image("trainer-cuda", TRAINER_CUDA, &binary, &libtorch::with_cuda()?, false)?;
    println!("{}: {:.1} MB", archive.display(), size as f64 / 1e6);
    Ok(())
}

/// Writes the image for tests: a shell, and what asks for names as every program does.
pub(crate) fn write_probe() -> Result<PathBuf> {
    let context = shell::root().join("target/images/probe");
    let root = context.join("rootfs");
    let _ = std::fs::remove_dir_all(&root);
    for directory in ["bin/lib", "etc", "lib64", "tmp"] {
        std::fs::create_dir_all(root.join(directory))?;
    }
    for name in PROBE_PROGRAMS {
        let program = Path::new("/usr/bin").join(name);
        std::fs::copy(&program, root.join("bin").join(name))
            .with_context(|| format!("{} is needed", program.display()))?;
        copy_libraries(&program, &libtorch::directory()?, &root)?;
    }
    write_etc(&root)?;
    let archive = context.with_extension("tar");
    let config = json!({
        "User": format!("{USER}:{USER}"),
        "Env": ["PATH=/bin", "LD_LIBRARY_PATH=/bin/lib"],
    });
    oci::write(&Image { name: PROBE, root: &root, config, is_compressed: false }, &archive)?;
    Ok(archive)
}

fn image(
    what: &str,
    name: &str,
    binary: &Path,
    libtorch: &Path,
    is_compressed: bool,
) -> Result<(PathBuf, usize)> {
    let context = shell::root().join("target/images").join(what);
    let root = context.join("rootfs");
    let _ = std::fs::remove_dir_all(&root);
    for directory in ["bin", "etc/ssl/certs", "lib64", "tmp"] {
        std::fs::create_dir_all(root.join(directory))?;
    }
    std::fs::copy(
        shell::root().join("images").join(what).join("Containerfile"),
        context.join("Containerfile"),
    )?;
    let file = binary.file_name().context("a binary has a name")?;
    let installed = root.join("bin").join(file);
    shell::run(Command::new("strip").arg("-o").arg(&installed).arg(binary))?;
    std::fs::create_dir_all(root.join("bin/lib"))?;
    copy_libraries(binary, libtorch, &root)?;
    let certificates = CERTIFICATES.iter().find(|path| Path::new(path).exists());
    let certificates = certificates.context("this machine has no CA certificates to put in")?;
    std::fs::copy(certificates, root.join("etc/ssl/certs/ca-certificates.crt"))?;
    write_etc(&root)?;

    let archive = context.with_extension("tar");
    let mut variables = vec!["PATH=/bin".to_owned(), "LD_LIBRARY_PATH=/bin/lib".to_owned()];
    if name == TRAINER_CUDA {
        // What the container toolkit reads, and where it puts what it brings.
        variables[1].push_str(&format!(":{DRIVER_LIBRARIES}"));
        variables.extend(
            ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]
                .map(str::to_owned),
        );
    }
    let config = json!({
        "User": format!("{USER}:{USER}"),
        "Env": variables,
        "Entrypoint": [format!("/bin/{}", file.to_string_lossy())],
        "Labels": {
            "org.opencontainers.image.source": env!("CARGO_PKG_REPOSITORY"),
            "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
            "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
        },
    });
    let size = oci::write(&Image { name, root: &root, config, is_compressed }, &archive)?;
    Ok((archive, size))
}

/// Copies libraries beside the binary, where its search path begins; the loader where the binary
/// names it.
fn copy_libraries(binary: &Path, libtorch: &Path, root: &Path) -> Result<()> {
    for library in closure(binary, libtorch)? {
        let name = library.file_name().context("a library has a name")?;
        let is_loader = name.to_string_lossy().starts_with("ld-linux");
        std::fs::copy(&library, root.join(if is_loader { "lib64" } else { "bin/lib" }).join(name))?;
    }
    Ok(())
}

fn write_etc(root: &Path) -> Result<()> {
    let passwd = format!("finetune:x:{USER}:{USER}::/tmp:/bin/false\n");
    std::fs::write(root.join("etc/passwd"), passwd)?;
    std::fs::write(root.join("etc/group"), format!("finetune:x:{USER}:\n"))?;
    Ok(std::fs::write(root.join("etc/nsswitch.conf"), "hosts: files dns\n")?)
}

/// Returns every library a binary loads, by asking the loader.
fn closure(binary: &Path, libtorch: &Path) -> Result<Vec<PathBuf>> {
    let libraries = libtorch.join("lib");
    let said = shell::output(Command::new("ldd").arg(binary).env("LD_LIBRARY_PATH", libraries))?;
    let mut found = Vec::new();
    for line in said.lines() {
        ensure!(!line.contains("not found"), "a library is missing: {}", line.trim());
        // `libm.so.6 => /lib/… (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)` or `linux-vdso.so.1 (0x…)`.
        let path = line.split("=>").last().and_then(|rest| rest.split_whitespace().next());
        found.extend(path.filter(|path| path.starts_with('/')).map(PathBuf::from));
    }
    Ok(found)
}
