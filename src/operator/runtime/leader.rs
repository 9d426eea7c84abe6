//! One replica acts: who holds the Lease `finetune-operator`.
//!
//! Every write of the Lease names the version it replaces, so of two writers at once one loses. A
//! holder that cannot renew in time ends its process, before another may take over.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::{SignedDuration, Timestamp},
};
use kube::{Api, Client, api::PostParams};
use tracing::{info, warn};

/// The Lease's name.
pub const LEASE: &str = "finetune-operator";
/// For how long a holder is believed to be alive after its last word.
const LEASE_DURATION: Duration = Duration::from_secs(15);
/// How often a holder says it is alive, and the others look.
const RENEW_INTERVAL: Duration = Duration::from_secs(4);
/// After how long without a renewal a holder gives up.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);

/// A candidate for leadership.
pub struct Candidate {
    leases: Api<Lease>,
    identity: String,
}

impl Candidate {
    /// Creates a candidate.
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        Self { leases: Api::namespaced(client, namespace), identity }
    }

    /// Waits until this candidate holds the Lease.
    pub async fn acquire(&self) {
        loop {
            match tokio::time::timeout(RENEW_DEADLINE, self.try_hold()).await {
                Ok(Ok(true)) => {
                    info!(identity = self.identity, "this replica is the leader now");
                    return;
                }
                Ok(Ok(false)) => {}
                Ok(Err(error)) => warn!(%error, "the lease could not be read or written"),
                Err(_) => warn!("the apiserver did not answer in time about the lease"),
            }
            tokio::time::sleep(RENEW_INTERVAL).await;
        }
    }

    /// Keeps the Lease; returns when it is lost.
    pub async fn keep(&self) {
        let mut renewed = tokio::time::Instant::now();
        loop {
            tokio::time::sleep(RENEW_INTERVAL).await;
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(left, self.try_hold()).await {
                Ok(Ok(true)) => renewed = tokio::time::Instant::now(),
                Ok(Ok(false)) => return warn!("another replica holds the lease"),
                Ok(Err(error)) => warn!(%error, "the lease could not be renewed"),
                Err(_) => return warn!("the lease could not be renewed in time"),
            }
            if renewed.elapsed() >= RENEW_DEADLINE {
                return warn!("the lease could not be renewed in time");
            }
        }
    }

    /// Gives the Lease back, so that another replica need not wait for its end.
    pub async fn release(&self) {
        let released = async {
            let Some(mut lease) = self.leases.get_opt(LEASE).await? else { return Ok(()) };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_ref() == Some(&self.identity) {
                spec.holder_identity = None;
                self.leases.replace(LEASE, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        if let Ok(Err(error)) = tokio::time::timeout(RENEW_INTERVAL, released).await {
            warn!(%error, "the lease could not be released");
        }
    }

    /// Takes or renews the Lease if it is free or ours; tells whether it is ours now.
    async fn try_hold(&self) -> kube::Result<bool> {
        let now = Timestamp::now();
        let written = match self.leases.get_opt(LEASE).await? {
            None => {
                let mut lease = Lease {
                    metadata: ObjectMeta { name: Some(LEASE.to_owned()), ..ObjectMeta::default() },
                    ..Lease::default()
                };
                self.claim(&mut lease, now);
                self.leases.create(&PostParams::default(), &lease).await
            }
            Some(lease) if !may_take(lease.spec.as_ref(), &self.identity, now) => return Ok(false),
            Some(mut lease) => {
                self.claim(&mut lease, now);
                // The lease carries the version that was read: a faster writer makes this fail.
                self.leases.replace(LEASE, &PostParams::default(), &lease).await
            }
        };
        match written {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn claim(&self, lease: &mut Lease, now: Timestamp) {
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_ref() != Some(&self.identity) {
            spec.holder_identity = Some(self.identity.clone());
            spec.acquire_time = Some(MicroTime(now));
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
        }
        spec.lease_duration_seconds = Some(LEASE_DURATION.as_secs() as i32);
        spec.renew_time = Some(MicroTime(now));
    }
}

/// Returns whether `identity` may write its name into a lease.
fn may_take(spec: Option<&LeaseSpec>, identity: &str, now: Timestamp) -> bool {
    let Some(spec) = spec else { return true };
    let holder = spec.holder_identity.as_deref().filter(|holder| !holder.is_empty());
    let Some(holder) = holder.filter(|holder| *holder != identity) else { return true };
    let Some(renewed) = &spec.renew_time else { return true };
    let seconds = spec.lease_duration_seconds.unwrap_or(0);
    let is_over = now > renewed.0 + SignedDuration::from_secs(i64::from(seconds));
    if is_over {
        info!(holder, "the lease of another replica has expired");
    }
    is_over
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::coordination::v1::LeaseSpec,
        apimachinery::pkg::apis::meta::v1::MicroTime,
        jiff::{SignedDuration, Timestamp},
    };

    use super::may_take;

    #[test]
    fn a_lease_is_taken_when_it_is_free_over_or_ours() {
        let now = Timestamp::now();
        let lease = |holder: &str, age: i64| LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            renew_time: Some(MicroTime(now - SignedDuration::from_secs(age))),
            ..LeaseSpec::default()
        };
        assert!(may_take(None, "a", now));
        assert!(may_take(Some(&lease("", 1)), "a", now));
        assert!(may_take(Some(&lease("a", 1)), "a", now));
        assert!(!may_take(Some(&lease("b", 14)), "a", now));
        assert!(may_take(Some(&lease("b", 16)), "a", now));
    }
}
