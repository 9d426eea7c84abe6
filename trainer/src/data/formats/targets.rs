//! Decides which messages are targets: by the marks of the turns and by `trainOn`.

use finetune_contract::TrainOn;
use serde_json::{Map, Value};

use crate::data::{
    conversation::{ChatRole, Message},
    formats::{error::RowError, fields::non_null},
};

/// The meaning of a key that marks a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// True or 1 trains on the turn; false or 0 does not.
    Trains,
    /// True or 1 does not train on the turn; false or 0 does.
    Masks,
}

/// The keys that mark a turn in common datasets.
///
/// # Source
/// `weight`: OpenAI; `train`, `training`: Axolotl; `loss`, `loss_scale`: ms-swift; `loss_mask`: verl;
/// `trainable`: Llama Stack and Together's exports; `masked`: torchtune.
const MARKS: [(&str, Mark); 8] = [
    ("weight", Mark::Trains),
    ("train", Mark::Trains),
    ("training", Mark::Trains),
    ("trainable", Mark::Trains),
    ("loss", Mark::Trains),
    ("loss_mask", Mark::Trains),
    ("loss_scale", Mark::Trains),
    ("masked", Mark::Masks),
];

/// Returns whether a turn is marked to be trained on; `None` without a mark.
pub(super) fn training_mark(turn: &Map<String, Value>) -> Result<Option<bool>, RowError> {
    let mut found: Option<(&str, bool)> = None;
    for (key, training_mark) in MARKS {
        let Some(value) = non_null(turn, key) else { continue };
        let is_set = match (value, value.as_f64()) {
            (Value::Bool(is_set), _) => *is_set,
            (_, Some(1.0)) => true,
            (_, Some(0.0)) => false,
            _ => {
                let message = format!(
                    "{key:?} is {value}: only 0, 1, false and true are supported, because a turn is either trained on or not"
                );
                return Err(RowError::of_kind(format!("mark {key}"), message));
            }
        };
        let trains = is_set == (training_mark == Mark::Trains);
        match found {
            Some((other, trained)) if trained != trains => {
                let message = format!("{other:?} and {key:?} contradict each other: keep one");
                return Err(RowError::new(message));
            }
            _ => found = Some((key, trains)),
        }
    }
    Ok(found.map(|(_, trains)| trains))
}

/// Applies the mark of a turn to its message.
///
/// # Errors
/// If a message that is not the assistant's is marked to be trained on.
pub(super) fn apply_mark(
    message: &mut Message,
    training_mark: Option<bool>,
) -> Result<(), RowError> {
    let Some(trains) = training_mark else { return Ok(()) };
    if trains && message.role != ChatRole::Assistant {
        return Err(RowError::new(format!(
            "the turn is marked to be trained on, but its role is {}: only turns of the assistant can be trained on; remove the mark",
            message.role.as_str()
        )));
    }
    message.is_target = trains;
    Ok(())
}

/// Keeps only the targets that `train_on` selects.
///
/// # Errors
/// If no target remains.
pub(super) fn apply_train_on(messages: &mut [Message], train_on: TrainOn) -> Result<(), RowError> {
    let is_assistant = |message: &Message| message.role == ChatRole::Assistant;
    if !messages.iter().any(is_assistant) {
        return Err(RowError::new("there is no assistant turn, so there is nothing to train on"));
    }
    match train_on {
        TrainOn::AllTurns => {}
        TrainOn::LastTurn => {
            let last = messages.iter().rposition(is_assistant);
            for (index, message) in messages.iter_mut().enumerate() {
                message.is_target &= Some(index) == last;
            }
        }
    }
    if messages.iter().any(|message| message.is_target) {
        return Ok(());
    }
    Err(RowError::new(match train_on {
        TrainOn::AllTurns => {
            "every assistant turn is marked not to be trained on, so there is nothing to train on"
        }
        TrainOn::LastTurn => {
            "the last assistant turn is marked not to be trained on, and dataset.trainOn is lastTurn, so there is nothing to train on"
        }
    }))
}
