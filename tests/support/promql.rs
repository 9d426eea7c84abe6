//! Reads which metrics and labels an expression of Prometheus names; no more of its grammar.

use std::collections::BTreeSet;

/// What an expression names.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Expression {
    /// The metrics, each with what it is selected by.
    pub(crate) selectors: Vec<Selector>,
    /// Labels that series are grouped or matched by.
    pub(crate) groupings: BTreeSet<String>,
}

/// A metric and its matchers, label and value.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Selector {
    /// The metric.
    pub(crate) metric: String,
    /// Metric and matchers as they are written.
    pub(crate) text: String,
    /// Labels and the text they are compared with.
    pub(crate) matchers: Vec<(String, String)>,
}

const OPERATORS: [&str; 7] = ["and", "or", "unless", "offset", "bool", "Inf", "NaN"];
const GROUPINGS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];

/// Reads an expression, or a query of Grafana's for the values of a label.
pub(crate) fn read(text: &str) -> Expression {
    if let Some((selector, label)) =
        text.strip_prefix("label_values(").and_then(|rest| rest.rsplit_once(','))
    {
        let mut expression = read(selector);
        expression.groupings.insert(label.trim_matches([' ', ')']).to_owned());
        return expression;
    }
    let mut expression = Expression::default();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        rest = match first {
            '"' => after(&rest[1..], '"'),
            '[' => after(rest, ']'),
            '{' => {
                let next = after_matchers(rest);
                if let Some(selector) = expression.selectors.last_mut() {
                    selector.matchers = matchers(&rest[1..]);
                    selector.text.push_str(&rest[..rest.len() - next.len()]);
                }
                next
            }
            first if first.is_alphanumeric() || "_:$".contains(first) => {
                let (word, next) = word(rest);
                if GROUPINGS.contains(&word) {
                    let (labels, next) =
                        next.trim_start().strip_prefix('(').unwrap().split_once(')').unwrap();
                    let labels = labels.split(',').map(|label| label.trim().to_owned());
                    expression.groupings.extend(labels.filter(|label| !label.is_empty()));
                    next
                } else {
                    let is_metric = !(OPERATORS.contains(&word)
                        || first.is_numeric()
                        || first == '$'
                        || is_call(next));
                    if is_metric {
                        let (metric, text) = (word.to_owned(), word.to_owned());
                        expression.selectors.push(Selector { metric, text, matchers: Vec::new() });
                    }
                    next
                }
            }
            first => &rest[first.len_utf8()..],
        };
    }
    expression
}

/// Returns whether what precedes is a function or an aggregation: `rate(…)`, `sum by (…) (…)`.
fn is_call(next: &str) -> bool {
    let next = next.trim_start();
    next.starts_with('(') || ["by", "without"].contains(&word(next).0)
}

fn word(text: &str) -> (&str, &str) {
    let is_end = |character: char| !(character.is_alphanumeric() || "_:$.".contains(character));
    text.split_at(text.find(is_end).unwrap_or(text.len()))
}

fn after(text: &str, end: char) -> &str {
    text.split_once(end).map_or("", |(_, rest)| rest)
}

/// Reads `label="value", …}`.
fn matchers(mut text: &str) -> Vec<(String, String)> {
    let mut matchers = Vec::new();
    while let Some((label, rest)) = text.split_once('"') {
        if label.contains('}') {
            break;
        }
        let (value, rest) = rest.split_once('"').unwrap();
        let label = label.trim_matches(|character: char| " ,=!~".contains(character));
        matchers.push((label.to_owned(), value.to_owned()));
        text = rest;
    }
    matchers
}

/// Skips `{…}`, whose values may have braces.
fn after_matchers(mut text: &str) -> &str {
    loop {
        match text.find(['"', '}']) {
            None => return "",
            Some(at) if text[at..].starts_with('}') => return &text[at + 1..],
            Some(at) => text = after(&text[at + 1..], '"'),
        }
    }
}

#[test]
fn names_are_read_where_they_stand_for_metrics_and_labels() {
    let expression = read(
        r#"sum by (le, a) (rate(x_total{code=~"4..|{5}", b!="c"}[$__rate_interval])) / (y > 1.15) and abs(z) == Inf or y offset 30m"#,
    );
    let metrics: Vec<&str> = expression.selectors.iter().map(|s| s.metric.as_str()).collect();
    assert_eq!(metrics, ["x_total", "y", "z", "y"]);
    let pair = |label: &str, value: &str| (label.to_owned(), value.to_owned());
    assert_eq!(expression.selectors[0].matchers, [pair("code", "4..|{5}"), pair("b", "c")]);
    assert_eq!(expression.selectors[0].text, r#"x_total{code=~"4..|{5}", b!="c"}"#);
    assert_eq!(expression.groupings, ["a", "le"].map(str::to_owned).into());
    let variable = read(r#"label_values(x{a="$b"}, c)"#);
    assert_eq!(variable.groupings, ["c".to_owned()].into());
    assert_eq!(variable.selectors.len(), 1);
}
