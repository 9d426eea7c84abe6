//! Images of one static program, written as OCI archives without a registry or a container tool.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::shell;

/// Writes an image whose only file is a program, which it runs.
pub(crate) fn write(name: &str, program: &Path, archive: &Path) -> Result<()> {
    let layout = archive.with_extension("layout");
    let _ = std::fs::remove_dir_all(&layout);
    std::fs::create_dir_all(layout.join("blobs/sha256"))?;

    let file = program.file_name().context("a program has a name")?.to_string_lossy();
    let layer_tar = archive.with_extension("layer");
    tar(&layer_tar, program.parent().unwrap_or(Path::new(".")), &[&file])?;
    let layer = std::fs::read(&layer_tar)?;
    let layer = blob(&layout, "application/vnd.oci.image.layer.v1.tar", &layer)?;
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {"Entrypoint": [format!("/{file}")]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let config =
        blob(&layout, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer],
    });
    let mut manifest = blob(&layout, media_type, manifest.to_string().as_bytes())?;
    manifest["annotations"] = json!({"io.containerd.image.name": name});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(layout.join("index.json"), index.to_string())?;
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#)?;

    tar(archive, &layout, &["oci-layout", "index.json", "blobs"])?;
    std::fs::remove_file(&layer_tar)?;
    Ok(std::fs::remove_dir_all(&layout)?)
}

/// Stores bytes under their digest and returns what refers to them.
fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Result<Value> {
    let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(layout.join("blobs/sha256").join(&digest), bytes)?;
    let digest = format!("sha256:{digest}");
    Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
}

/// Packs files without what differs from one run to the next.
fn tar(archive: &Path, directory: &Path, names: &[&str]) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]);
    shell::run(command.arg("-cf").arg(archive).arg("-C").arg(directory).args(names))
}

/// The word that images have for this machine's processor.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
