//! Whether a result would be written over, into or around what it is made from.

use crate::{
    settings::{DatasetSource, ModelSource},
    uri::ObjectUri,
};

/// How one place lies to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// They are one place.
    Equal,
    /// The first is a directory that holds the second.
    Above,
    /// The first lies inside the second.
    Below,
}

/// Returns whether two places touch: one place, or one inside the other.
///
/// URIs are compared segment by segment as they are written: two claims of one volume, or two names
/// of one bucket, look apart.
pub fn overlap(first: &ObjectUri, second: &ObjectUri) -> Option<Overlap> {
    if (first.scheme, &first.authority) != (second.scheme, &second.authority) {
        return None;
    }
    let segments = |uri: &ObjectUri| -> Vec<String> {
        uri.path.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect()
    };
    let (first, second) = (segments(first), segments(second));
    match (second.starts_with(&first), first.starts_with(&second)) {
        (true, true) => Some(Overlap::Equal),
        (true, false) => Some(Overlap::Above),
        (false, true) => Some(Overlap::Below),
        (false, false) => None,
    }
}

/// Lists the URIs that a run reads, each with its field of the manifest.
pub fn input_uris(
    model: &ModelSource,
    dataset: &DatasetSource,
    initial_adapter: Option<&ObjectUri>,
    initial_checkpoint: Option<&ObjectUri>,
) -> Vec<(&'static str, ObjectUri)> {
    let mut uris = vec![("spec.model.uri", model.uri.clone())];
    uris.extend(dataset.uris());
    uris.extend(initial_adapter.map(|uri| ("spec.initialAdapter.uri", uri.clone())));
    uris.extend(initial_checkpoint.map(|uri| ("spec.initialCheckpoint.uri", uri.clone())));
    uris
}

/// Describes how an output overlaps each input that it touches; `resolve` gives the place that a URI names
/// in the end, after symbolic links.
pub fn overlaps_with_inputs<F: std::fmt::Display>(
    output: &ObjectUri,
    inputs: impl IntoIterator<Item = (F, ObjectUri)>,
    resolve: impl Fn(ObjectUri) -> ObjectUri,
) -> Vec<String> {
    let written = resolve(output.clone());
    let mut messages = Vec::new();
    for (field, uri) in inputs {
        let Some(overlap) = overlap(&written, &resolve(uri.clone())) else { continue };
        let how = match overlap {
            Overlap::Equal => "is the same place as",
            Overlap::Above => "holds",
            Overlap::Below => "lies inside",
        };
        messages.push(format!(
            "\"{output}\" {how} {field} ({uri}): the output must not be an input, inside one, or a parent of one, with or without output.overwrite; choose another output.uri"
        ));
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::{Overlap, overlap, overlaps_with_inputs};
    use crate::uri::ObjectUri;

    fn check(output: &str, input: &str) -> Option<Overlap> {
        overlap(&ObjectUri::parse(output).unwrap(), &ObjectUri::parse(input).unwrap())
    }

    #[test]
    fn finds_one_place_however_it_is_written() {
        assert_eq!(check("s3://b/base", "s3://b/base/"), Some(Overlap::Equal));
        assert_eq!(check("file:///data/base//", "file:///data/base"), Some(Overlap::Equal));
        assert_eq!(check("pvc://models/qwen", "pvc://models/qwen"), Some(Overlap::Equal));
        assert_eq!(check("gs://b", "gs://b/"), Some(Overlap::Equal));
    }

    #[test]
    fn finds_what_is_above_and_below() {
        assert_eq!(check("s3://b/base/out", "s3://b/base"), Some(Overlap::Below));
        assert_eq!(check("s3://b/data", "s3://b/data/train.jsonl"), Some(Overlap::Above));
        assert_eq!(check("pvc://claim", "pvc://claim/rows/"), Some(Overlap::Above));
        assert_eq!(check("file:///", "file:///data/train.jsonl"), Some(Overlap::Above));
        assert_eq!(check("az://c/train.jsonl/out", "az://c/train.jsonl"), Some(Overlap::Below));
    }

    #[test]
    fn lets_neighbours_be() {
        assert_eq!(check("s3://b/base-tuned", "s3://b/base"), None);
        assert_eq!(check("s3://b/base", "s3://b/base-2/rows"), None);
        assert_eq!(check("s3://other/base", "s3://b/base"), None);
        assert_eq!(check("gs://b/base", "s3://b/base"), None);
        assert_eq!(check("pvc://out/base", "pvc://models/base"), None);
        assert_eq!(check("file:///w/out", "file:///w/train.jsonl"), None);
    }

    #[test]
    fn says_which_input_and_that_overwrite_does_not_help() {
        let uri = |text: &str| ObjectUri::parse(text).unwrap();
        let inputs =
            [("spec.model.uri", uri("s3://b/base")), ("spec.dataset.train", uri("s3://b/rows/"))];
        let messages = overlaps_with_inputs(&uri("s3://b/rows/out"), inputs, |uri| uri);
        insta::assert_snapshot!(messages.join("\n"), @r#""s3://b/rows/out" lies inside spec.dataset.train (s3://b/rows/): the output must not be an input, inside one, or a parent of one, with or without output.overwrite; choose another output.uri"#);
    }
}
