//! The kind FineTuneJob: from a manifest to a published result.
//!
//! In reading order: `controller` has the watches and the queue; `reconcile` is one reconciliation of
//! one job, on one screen; `observe` reads its children, which `child_cache` keeps; [`decide`] says
//! what happens next, without I/O, and [`build`] makes the objects of one attempt; `apply` and `events`
//! carry it out, and `accounting` counts.

mod accounting;
mod apply;
pub mod build;
pub mod child_cache;
pub mod conditions;
pub mod context;
pub mod controller;
pub mod decide;
mod events;
pub mod invalid_object;
mod late_pods;
pub mod observe;
mod pod_refusals;
mod progress_client;
mod reconcile;
#[cfg(test)]
pub(crate) mod testing;
