//! The S3 server of a cluster, which pods reach at the node's address.

use anyhow::Result;

use crate::{
    cluster::{Cluster, network},
    fixtures::s3,
};

/// The component's name.
pub(crate) const NAME: &str = "s3";
/// Where the server is.
pub(crate) const ENDPOINT: &str = "http://10.88.0.1:8333";
/// Its port.
pub(crate) const PORT: u16 = 8333;
/// S3, master, volume and filer; 10000 more of each are taken too, clear of Kubernetes' own.
const PORTS: [u16; 4] = [PORT, 9333, 8080, 8888];

/// Starts the server.
pub(crate) fn start(cluster: &Cluster) -> Result<()> {
    let directory = cluster.path("data/s3");
    let arguments = s3::arguments(&directory, network::NODE, PORTS)?;
    cluster.processes().start(NAME, &s3::program()?, &arguments)
}

/// Waits until it has its bucket.
pub(crate) fn wait(cluster: &Cluster) -> Result<()> {
    let [s3, _, _, filer] = PORTS;
    cluster.processes().wait(NAME, || {
        let has_bucket = || s3::is_up_with_bucket(network::NODE, s3, filer);
        cluster.namespace.enter(has_bucket).unwrap_or(false)
    })
}
