//! Decides the context length, and with it how many sequences an epoch has.

use finetune_api::Training;
use finetune_contract::{
    DatasetCensus, DatasetSource, LengthPoint, ModelFacts, OnOverflow, Problem, ProblemReason,
};

use super::{choices::Choices, problems::invalid};

/// A length that cuts nothing is preferred if it is at most this much longer.
const LONGER_FOR_NOTHING_CUT: f64 = 1.25;

/// What was decided.
pub(super) struct Data {
    pub(super) context: u32,
    /// Positions of a sequence that are predicted, at most.
    pub(super) targets: u32,
    pub(super) sequences: u64,
    pub(super) positions_per_sequence: f64,
}

/// Returns `None`, with a problem pushed, when there is nothing to train on.
pub(super) fn decide(
    training: &Training,
    source: &DatasetSource,
    model: &ModelFacts,
    census: &DatasetCensus,
    packing: bool,
    decisions: &mut Choices,
    problems: &mut Vec<Problem>,
) -> Option<Data> {
    if census.rows == 0 && !problems.is_empty() {
        // Why there is no row is said, and no context would change it.
        return None;
    }
    let longest = model.max_position_embeddings;
    let place = "spec.training.contextLength";
    let point = if let Some(asked) = training.context_length.map(i32::unsigned_abs) {
        if asked > longest {
            problems.push(invalid(
                place,
                format!(
                    "is {asked}, but {} was made for at most {longest} positions: lower it",
                    model.model_type
                ),
            ));
            return None;
        }
        let point = census.lengths.iter().find(|point| point.context == asked);
        let Some(point) = point else {
            problems.push(invalid(
                place,
                format!(
                    "is {asked}, which the preflight did not count: run it again with this manifest"
                ),
            ));
            return None;
        };
        decisions.add(
            "contextLength",
            asked,
            format!("set in the manifest; {}", effect(point, census)),
        );
        *point
    } else {
        let Some(point) = default(census, longest, source.on_overflow) else {
            problems.push(invalid(place, format!("has no default: the preflight counted no length up to the model's {longest}; set it")));
            return None;
        };
        let rule = if source.on_overflow == OnOverflow::Error && point.over == 0 {
            "holds every row, for onOverflow is error"
        } else if point.context < census.p95_tokens {
            "the longest the model was made for"
        } else {
            "holds 95 % of the rows"
        };
        decisions.add(
            "contextLength",
            point.context,
            format!("{rule}; {}", effect(&point, census)),
        );
        point
    };
    if source.on_overflow == OnOverflow::Error && point.over > 0 {
        problems.push(Problem {
            reason: ProblemReason::Overflow,
            location: "spec.dataset.onOverflow".to_owned(),
            message: format!(
                "is error, and {} of {} rows have more than {} tokens (the longest {}): raise training.contextLength, or set onOverflow to truncate or drop",
                point.over, census.rows, point.context, census.max_tokens
            ),
        });
    }
    let sequences = sequences(&point, census, source.on_overflow, packing);
    if sequences == 0 {
        let is_said = problems.iter().any(|known| known.reason == ProblemReason::NothingToTrain);
        if is_said {
            return None;
        }
        problems.push(Problem {
            reason: ProblemReason::NothingToTrain,
            location: "spec.dataset.train".to_owned(),
            message: format!("leaves no row with a token to predict at a context of {} tokens: raise training.contextLength (the longest row has {})", point.context, census.max_tokens),
        });
        return None;
    }
    let tokens = census.tokens.saturating_sub(point.cut) as f64;
    Some(Data {
        context: point.context,
        targets: if packing { point.most_packed_targets } else { point.most_targets }
            .unwrap_or(point.context),
        sequences,
        positions_per_sequence: tokens / sequences as f64,
    })
}

fn default(census: &DatasetCensus, longest: u32, on_overflow: OnOverflow) -> Option<LengthPoint> {
    let allowed = || census.lengths.iter().filter(move |point| point.context <= longest).copied();
    let enough = allowed().find(|point| point.context >= census.p95_tokens);
    let point = enough.or_else(|| allowed().last())?;
    let whole = allowed().find(|point| point.over == 0);
    // Who wants no row cut is not given a default that cuts some.
    let limit = match on_overflow {
        OnOverflow::Error => f64::INFINITY,
        OnOverflow::Truncate | OnOverflow::Drop => {
            f64::from(point.context) * LONGER_FOR_NOTHING_CUT
        }
    };
    Some(whole.filter(|whole| f64::from(whole.context) <= limit).unwrap_or(point))
}

fn sequences(
    point: &LengthPoint,
    census: &DatasetCensus,
    on_overflow: OnOverflow,
    packing: bool,
) -> u64 {
    if packing {
        return point.packed;
    }
    // Rows without a target once cut are among those that are too long.
    let left_out = if on_overflow == OnOverflow::Drop { point.over } else { point.empty };
    census.rows.saturating_sub(left_out)
}

fn effect(point: &LengthPoint, census: &DatasetCensus) -> String {
    if point.over == 0 {
        return format!("cuts nothing, the longest row has {} tokens", census.max_tokens);
    }
    format!(
        "{} of {} rows are longer ({} of {} tokens)",
        point.over, census.rows, point.cut, census.tokens
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_default_cuts_no_row_when_that_is_an_error() {
        let census = testing::report(testing::smollm2(), 1).train.unwrap();
        let context = |longest, on_overflow| {
            default(&census, longest, on_overflow).map(|point| point.context)
        };
        assert_eq!(context(8192, OnOverflow::Truncate), Some(256));
        assert_eq!(context(8192, OnOverflow::Drop), Some(256));
        assert_eq!(context(8192, OnOverflow::Error), Some(1024));
        // A model that cannot hold every row leaves the choice as it is; the plan then refuses.
        assert_eq!(context(512, OnOverflow::Error), Some(256));
    }
}
