//! What tells a Job that the operator would create from one that somebody else put in its place.

use finetune_plan::resolve::sha256_hex;
use k8s_openapi::api::batch::v1::Job;
use serde_json::{Value, json};

use super::pod::CONFIG_ANNOTATION;

/// Fields that the apiserver fills in, or writes in another form.
const NOT_COMPARED: [&str; 9] = [
    "apiVersion",
    "defaultMode",
    "imagePullPolicy",
    "procMount",
    "protocol",
    "resources",
    "sizeLimit",
    "terminationMessagePath",
    "terminationMessagePolicy",
];

/// Returns a digest of what the pods of a Job run: their containers, volumes and configuration.
///
/// It is the same for an object before it is created and as the apiserver returns it.
pub fn of_pods(job: &Job) -> String {
    let template = job.spec.as_ref().map(|spec| &spec.template);
    let annotations =
        template.and_then(|template| template.metadata.as_ref()?.annotations.as_ref());
    let pod = template.and_then(|template| template.spec.as_ref());
    let mut compared = json!({
        "config": annotations.and_then(|annotations| annotations.get(CONFIG_ANNOTATION)),
        "initContainers": pod.map(|pod| &pod.init_containers),
        "containers": pod.map(|pod| &pod.containers),
        "volumes": pod.map(|pod| &pod.volumes),
        "sharesProcesses": pod.map(|pod| pod.share_process_namespace),
    });
    normalize(&mut compared);
    sha256_hex(compared.to_string().as_bytes())
}

/// Removes what is not compared, and what is as good as absent.
fn normalize(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, value| {
                normalize(value);
                let is_empty = match value {
                    Value::Null => true,
                    Value::String(text) => text.is_empty(),
                    Value::Array(items) => items.is_empty(),
                    Value::Object(fields) => fields.is_empty() && name != "emptyDir",
                    _ => false,
                };
                !is_empty && !NOT_COMPARED.contains(&name.as_str())
            });
        }
        Value::Array(items) => items.iter_mut().for_each(normalize),
        _ => {}
    }
}
