//! Images as OCI archives, written without a registry, a container tool or root: one layer, and the
//! same bytes for the same files.

use std::{path::Path, process::Command};

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::tools::shell;

/// An image to write.
pub(crate) struct Image<'a> {
    /// Its name with a tag.
    pub(crate) name: &'a str,
    /// The directory whose content is its file system.
    pub(crate) root: &'a Path,
    /// What runs in it and how: the `config` of an OCI image.
    pub(crate) config: Value,
    /// Whether the layer is compressed; large ones are faster without.
    pub(crate) is_compressed: bool,
}

/// Writes an image; returns the bytes of its layer.
pub(crate) fn write(image: &Image<'_>, archive: &Path) -> Result<usize> {
    let layout = archive.with_extension("layout");
    let _ = std::fs::remove_dir_all(&layout);
    std::fs::create_dir_all(layout.join("blobs/sha256"))?;

    let layer_tar = archive.with_extension("layer");
    tar(&layer_tar, image.root, &["."])?;
    let layer = std::fs::read(&layer_tar)?;
    let diff_id = digest(&layer);
    let (layer, media_type) = if image.is_compressed {
        let mut gzip = Command::new("gzip");
        shell::run(gzip.args(["--no-name", "--force"]).arg(&layer_tar))?;
        let packed = archive.with_extension("layer.gz");
        let bytes = std::fs::read(&packed)?;
        std::fs::remove_file(packed)?;
        (bytes, "application/vnd.oci.image.layer.v1.tar+gzip")
    } else {
        std::fs::remove_file(&layer_tar)?;
        (layer, "application/vnd.oci.image.layer.v1.tar")
    };
    let size = layer.len();
    let layer = blob(&layout, media_type, &layer)?;
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": image.config,
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    });
    let config =
        blob(&layout, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer],
    });
    let mut manifest = blob(&layout, media_type, manifest.to_string().as_bytes())?;
    manifest["annotations"] = json!({"io.containerd.image.name": image.name});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(layout.join("index.json"), index.to_string())?;
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#)?;

    tar(archive, &layout, &["oci-layout", "index.json", "blobs"])?;
    std::fs::remove_dir_all(&layout)?;
    Ok(size)
}

fn digest(bytes: &[u8]) -> String {
    let digits: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

/// Stores bytes under their digest and returns what refers to them.
fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Result<Value> {
    let digest = digest(bytes);
    std::fs::write(layout.join("blobs").join(digest.replace(':', "/")), bytes)?;
    Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
}

/// Packs files without what differs from one run to the next.
fn tar(archive: &Path, directory: &Path, names: &[&str]) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]);
    shell::run(command.arg("-cf").arg(archive).arg("-C").arg(directory).args(names))
}

/// The word that images have for this machine's CPU.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
