//! The Jobs and pods of all FineTuneJobs, cached from two watches: what `observe` reads of them, by
//! parent.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

use finetune_api::FineTuneJob;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Resource, ResourceExt,
    runtime::{reflector::ObjectRef, watcher::Event},
};
use tokio::sync::watch;

use super::{
    build::names::JOB_LABEL,
    observe::{Observed, ObservedJob, ObservedPod, observe_job, observe_pod},
};

/// Namespace and name of a FineTuneJob.
type Parent = (String, String);

/// A cache of Jobs and pods.
pub struct ChildCache {
    jobs: Mutex<ChildrenOfKind<ObservedJob>>,
    pods: Mutex<ChildrenOfKind<ObservedPod>>,
    ready: watch::Sender<(bool, bool)>,
}

/// One kind of child.
struct ChildrenOfKind<T> {
    by_parent: HashMap<Parent, BTreeMap<String, T>>,
    /// What a list in progress has brought so far.
    incoming: Option<HashMap<Parent, BTreeMap<String, T>>>,
}

impl<T> Default for ChildrenOfKind<T> {
    fn default() -> Self {
        Self { by_parent: HashMap::new(), incoming: None }
    }
}

impl<T: Clone> ChildrenOfKind<T> {
    /// Takes an event; returns the parents to reconcile, and whether a list is complete.
    fn take<K: Resource>(&mut self, event: Event<K>, read: fn(&K) -> T) -> (Vec<Parent>, bool) {
        match event {
            Event::Init => {
                self.incoming = Some(HashMap::new());
                (Vec::new(), false)
            }
            Event::InitApply(child) => {
                if let Some(parent) = parent(&child) {
                    let name = child.name_any();
                    let incoming = self.incoming.get_or_insert_default();
                    incoming.entry(parent).or_default().insert(name, read(&child));
                }
                (Vec::new(), false)
            }
            Event::InitDone => {
                let before = std::mem::take(&mut self.by_parent);
                self.by_parent = self.incoming.take().unwrap_or_default();
                let gone = before.into_keys().filter(|key| !self.by_parent.contains_key(key));
                (gone.chain(self.by_parent.keys().cloned()).collect(), true)
            }
            Event::Apply(child) => {
                let Some(parent) = parent(&child) else { return (Vec::new(), false) };
                let (name, child) = (child.name_any(), read(&child));
                // Created here while a list is in progress: that list may be older.
                if let Some(incoming) = &mut self.incoming {
                    let children = incoming.entry(parent.clone()).or_default();
                    children.insert(name.clone(), child.clone());
                }
                self.by_parent.entry(parent.clone()).or_default().insert(name, child);
                (vec![parent], false)
            }
            Event::Delete(child) => {
                let Some(parent) = parent(&child) else { return (Vec::new(), false) };
                if let Some(children) = self.by_parent.get_mut(&parent) {
                    children.remove(&child.name_any());
                    if children.is_empty() {
                        self.by_parent.remove(&parent);
                    }
                }
                (vec![parent], false)
            }
        }
    }

    fn of(&self, parent: &Parent) -> Vec<T> {
        let children = self.by_parent.get(parent);
        children.map(|children| children.values().cloned().collect()).unwrap_or_default()
    }
}

fn parent<K: Resource>(child: &K) -> Option<Parent> {
    let name = child.meta().labels.as_ref()?.get(JOB_LABEL)?.clone();
    Some((child.namespace()?, name))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A cache is whole between statements: a panic elsewhere leaves nothing half done in it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refer(parents: Vec<Parent>) -> Vec<ObjectRef<FineTuneJob>> {
    parents.into_iter().map(|(namespace, name)| ObjectRef::new(&name).within(&namespace)).collect()
}

impl Default for ChildCache {
    fn default() -> Self {
        Self {
            jobs: Mutex::default(),
            pods: Mutex::default(),
            ready: watch::Sender::new((false, false)),
        }
    }
}

impl ChildCache {
    /// Takes an event of the Jobs' watch; returns the parents to reconcile.
    pub fn take_job(&self, event: Event<Job>) -> Vec<ObjectRef<FineTuneJob>> {
        let (parents, is_complete) = lock(&self.jobs).take(event, observe_job);
        if is_complete {
            self.ready.send_modify(|ready| ready.0 = true);
        }
        refer(parents)
    }

    /// Takes an event of the pods' watch; returns the parents to reconcile.
    pub fn take_pod(&self, event: Event<Pod>) -> Vec<ObjectRef<FineTuneJob>> {
        let (parents, is_complete) = lock(&self.pods).take(event, observe_pod);
        if is_complete {
            self.ready.send_modify(|ready| ready.1 = true);
        }
        refer(parents)
    }

    /// Waits until both kinds have been listed once: what is not cached then does not exist.
    pub async fn ready(&self) {
        // The sender lives as long as this does.
        let _ = self.ready.subscribe().wait_for(|ready| *ready == (true, true)).await;
    }

    /// Returns what is observed of the job with `uid`.
    pub fn of(&self, namespace: &str, name: &str, uid: &str) -> Observed {
        let parent = (namespace.to_owned(), name.to_owned());
        let mut jobs = lock(&self.jobs).of(&parent);
        jobs.retain(|job| job.owner_uid.as_deref() == Some(uid));
        Observed { jobs, pods: lock(&self.pods).of(&parent), ..Observed::default() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::{
        api::batch::v1::Job,
        apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
    };
    use kube::runtime::watcher::Event;

    use super::{ChildCache, JOB_LABEL};

    fn job(name: &str, parent: &str) -> Job {
        let owner = OwnerReference {
            uid: format!("{parent}-uid"),
            controller: Some(true),
            ..OwnerReference::default()
        };
        Job {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some("team".to_owned()),
                labels: Some(BTreeMap::from([(JOB_LABEL.to_owned(), parent.to_owned())])),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            ..Job::default()
        }
    }

    fn names(children: &ChildCache, parent: &str) -> Vec<String> {
        let observed = children.of("team", parent, &format!("{parent}-uid"));
        observed.jobs.into_iter().map(|job| job.name).collect()
    }

    #[test]
    fn a_new_list_replaces_what_was_known_and_tells_those_who_lost_a_child() {
        let children = ChildCache::default();
        children.take_job(Event::Apply(job("a-0", "a")));
        children.take_job(Event::Apply(job("b-0", "b")));
        children.take_job(Event::Init);
        children.take_job(Event::InitApply(job("b-1", "b")));
        assert_eq!(names(&children, "a"), ["a-0"], "an unfinished list changes nothing");
        let mut parents: Vec<String> =
            children.take_job(Event::InitDone).into_iter().map(|parent| parent.name).collect();
        parents.sort();
        assert_eq!(parents, ["a", "b"]);
        assert_eq!(names(&children, "a"), Vec::<String>::new());
        assert_eq!(names(&children, "b"), ["b-1"]);
    }

    #[test]
    fn what_was_made_during_a_list_outlives_it() {
        let children = ChildCache::default();
        children.take_job(Event::Init);
        children.take_job(Event::Apply(job("a-0", "a")));
        children.take_job(Event::InitDone);
        assert_eq!(names(&children, "a"), ["a-0"]);
    }

    #[test]
    fn children_of_a_namesake_that_is_gone_are_not_ours() {
        let children = ChildCache::default();
        children.take_job(Event::Apply(job("a-0", "a")));
        assert!(children.of("team", "a", "another-uid").jobs.is_empty());
        children.take_job(Event::Delete(job("a-0", "a")));
        assert!(names(&children, "a").is_empty());
    }
}
