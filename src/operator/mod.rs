//! The operator of a cluster.
//!
//! Each kind has a folder: `job` is the FineTuneJob. `runtime` is what all of them share, and `settings`
//! are the administrator's.

pub mod job;
pub mod runtime;
pub mod settings;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result, bail};
use tokio::{signal::unix::SignalKind, sync::watch, task::JoinSet};
use tracing::info;

use job::controller::Operator;
use runtime::{client, leader::Candidate, metrics::Metrics, server};
use settings::Settings;

/// Who and where this process is.
#[derive(Debug, Clone)]
pub struct Host {
    /// Where `/metrics` and the probes are served.
    pub listen: SocketAddr,
    /// The namespace of the Lease.
    pub namespace: String,
    /// What tells this replica from others.
    pub identity: String,
}

/// Runs the operator until it is told to stop, or loses the Lease.
///
/// # Errors
/// If the apiserver's address is not known, the port is taken, or the Lease was lost: the process
/// must end, and start again as one that waits.
pub async fn run(settings: Settings, host: Host) -> Result<()> {
    let metrics = Metrics::new()?;
    let client = client::connect(metrics.clone()).await.context("cannot find a cluster")?;
    let is_ready = Arc::new(AtomicBool::new(false));
    let ready = Arc::clone(&is_ready);
    let server = server::serve(host.listen, metrics.clone(), move || ready.load(Ordering::Relaxed));
    let server = tokio::spawn(server);
    let (stop, stopped) = watch::channel(false);
    let mut signals = [SignalKind::terminate(), SignalKind::interrupt()]
        .map(tokio::signal::unix::signal)
        .into_iter()
        .collect::<std::io::Result<Vec<_>>>()?;
    let [terminate, interrupt] = signals.as_mut_slice() else {
        bail!("two signals were asked for")
    };

    // Ready means able to reach the apiserver: a replica that waits is ready to take over.
    tokio::select! {
        version = client.apiserver_version() => {
            version.context("cannot reach the apiserver")?;
        }
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    is_ready.store(true, Ordering::Relaxed);
    let candidate = Candidate::new(client.clone(), &host.namespace, host.identity.clone());
    tokio::select! {
        () = candidate.acquire() => {}
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
        ended = server => bail!("cannot serve on {}: {}", host.listen, describe(ended)),
    }
    metrics.leader.set(1.0);
    let namespaces: Vec<Option<String>> = match settings.namespaces.as_slice() {
        [] => vec![None],
        names => names.iter().cloned().map(Some).collect(),
    };
    let mut operators = JoinSet::new();
    for namespace in namespaces {
        let (client, settings, metrics) = (client.clone(), settings.clone(), metrics.clone());
        let operator = Operator::new(client, settings, metrics, &host.identity, namespace)?;
        let mut stopped = stopped.clone();
        operators.spawn(Arc::new(operator).run(async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }));
    }
    let is_lost = tokio::select! {
        () = candidate.keep() => true,
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        // One that does nothing must not keep the Lease.
        Some(ended) = operators.join_next() => {
            bail!("a controller ended: {}", ended.err().map_or("it was not told to".to_owned(), |error| error.to_string()))
        }
    };
    if is_lost {
        // Another may act already: not one more write.
        bail!("the lease was lost");
    }
    info!("stopping: reconciliations in progress are finished first");
    stop.send_replace(true);
    tokio::select! {
        _ = operators.join_all() => {}
        // The Lease is kept until the last write.
        () = candidate.keep() => bail!("the lease was lost"),
    }
    candidate.release().await;
    Ok(())
}

fn describe(ended: Result<std::io::Result<()>, tokio::task::JoinError>) -> String {
    match ended {
        Ok(Ok(())) => "the server ended".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    }
}
