//! CEL rules that several fields share.

use finetune_contract::Scheme;
use kube::core::Rule;

/// Refuses a change of the field named `field`, which must be there.
pub(super) fn immutable(field: &str) -> Rule {
    Rule::new("self == oldSelf").message(immutable_message(field).as_str())
}

/// Refuses a change of the optional field named `field` of the spec, and adding or removing it.
///
/// A rule at an optional field itself does not see it come or go.
pub(super) fn immutable_option(field: &str) -> Rule {
    Rule::new(format!(
        "has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"
    ))
    .message(immutable_message(field).as_str())
}

fn immutable_message(field: &str) -> String {
    format!("{field} is immutable: create a new FineTuneJob to change it")
}

/// Asks for an object URI that can be read, such as `example`.
pub(super) fn object_uri(example: &str) -> Rule {
    uri(&Scheme::ALL, example)
}

/// Asks for an object URI that a run itself can write, such as `example`.
pub(super) fn writable_uri(example: &str) -> Rule {
    let writable: Vec<Scheme> =
        Scheme::ALL.into_iter().filter(|scheme| *scheme != Scheme::Hf).collect();
    uri(&writable, example)
}

fn uri(schemes: &[Scheme], example: &str) -> Rule {
    let words: Vec<&str> = schemes.iter().map(|scheme| scheme.as_str()).collect();
    let (last, first) = words.split_last().expect("a list of schemes is not empty");
    let message = format!(
        "must be an object URI of scheme {} or {last}, such as {example}",
        first.join(", ")
    );
    Rule::new(format!("self.matches('^({})://')", words.join("|"))).message(message.as_str())
}

/// Asks for a number above zero.
///
/// An apiserver compares whole numbers with the whole part of a bound: 0 would pass `minimum: 1e-9`.
pub(super) fn above_zero() -> Rule {
    Rule::new("self > 0.0").message("must be above 0")
}
