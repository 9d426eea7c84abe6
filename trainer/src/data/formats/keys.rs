//! Every key of a row that is known, and what becomes of it.
//!
//! The table is the documentation too: `docs/ROWS.md` is written from it. A key that is not in it is
//! refused, so that nothing a row says is lost without a word.

use finetune_contract::DatasetFormat;
use serde_json::{Map, Value};

use crate::data::formats::{error::RowError, fields::is_empty, nearest, repeated::repeats};

/// The object that a key belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The row.
    Row,
    /// A turn of a conversation.
    Turn,
    /// A part of a turn's content.
    Part,
    /// A tool call, and its function.
    Call,
}

/// What becomes of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is used in rows of these formats.
    Used(&'static [DatasetFormat]),
    /// It says nothing about what is to be trained on.
    Harmless,
    /// It is refused unless empty.
    Refused,
}

/// Some keys that mean the same.
#[derive(Debug)]
pub struct Known {
    /// Where they stand.
    pub place: Place,
    /// The keys.
    pub names: &'static [&'static str],
    /// What becomes of them.
    pub fate: Fate,
    /// What they mean; of refused ones, why and what to do.
    pub note: &'static str,
}

use DatasetFormat::{Alpaca, Messages, Prerendered, PromptCompletion, Sharegpt, Text};

const TURNS: &[DatasetFormat] = &[Messages, Sharegpt];
const WITH_TURNS: &[DatasetFormat] = &[Messages, Sharegpt, PromptCompletion, Alpaca];
const PAIRS: &[DatasetFormat] = &[PromptCompletion, Prerendered];

const fn used(
    place: Place,
    names: &'static [&'static str],
    formats: &'static [DatasetFormat],
    note: &'static str,
) -> Known {
    Known { place, names, fate: Fate::Used(formats), note }
}

const fn harmless(place: Place, names: &'static [&'static str], note: &'static str) -> Known {
    Known { place, names, fate: Fate::Harmless, note }
}

const fn refused(place: Place, names: &'static [&'static str], note: &'static str) -> Known {
    Known { place, names, fate: Fate::Refused, note }
}

/// The table, in reading order.
pub const KNOWN: &[Known] = &[
    used(Place::Row, &["messages"], &[Messages], "the turns of a conversation"),
    used(
        Place::Row,
        &["conversations", "conversation"],
        &[Sharegpt],
        "the turns of a conversation",
    ),
    used(
        Place::Row,
        &["prompt", "question", "query"],
        PAIRS,
        "a text that is not trained on, or turns that are not",
    ),
    used(
        Place::Row,
        &["completion", "response", "answer"],
        PAIRS,
        "what follows the prompt and is trained on: a text, or turns of which the assistant's are",
    ),
    used(Place::Row, &["instruction"], &[Alpaca], "the user's turn"),
    used(
        Place::Row,
        &["input", "context"],
        &[Alpaca],
        "put below the instruction, after a blank line",
    ),
    used(Place::Row, &["output", "response", "answer"], &[Alpaca], "the assistant's turn"),
    used(
        Place::Row,
        &["history"],
        &[Alpaca],
        "`[[question, answer], …]`: earlier turns; all answers are trained on",
    ),
    used(Place::Row, &["text"], &[Text, Prerendered], "a text, all of it trained on"),
    used(
        Place::Row,
        &["system", "system_prompt", "system_message"],
        WITH_TURNS,
        "a system turn before the others; the same text as a system turn that is there is one, another is refused",
    ),
    used(
        Place::Row,
        &["tools", "functions"],
        WITH_TURNS,
        "the tools that the template shows, as a list or its JSON text; a function by itself becomes `{\"type\": \"function\", \"function\": …}`",
    ),
    used(
        Place::Row,
        &["chat_template_kwargs"],
        WITH_TURNS,
        "further variables of the chat template",
    ),
    used(Place::Row, &["documents"], WITH_TURNS, "the documents that the template shows"),
    used(
        Place::Row,
        &["label"],
        &[Messages, Sharegpt, PromptCompletion, Alpaca, Text, Prerendered],
        "`true`, a good answer of preference data, is trained on; anything else is refused",
    ),
    used(
        Place::Row,
        &["mask"],
        TURNS,
        "NeMo's word for whose turns are not trained on; only the user's is supported, which is so anyway",
    ),
    refused(
        Place::Row,
        &["rejected", "chosen", "rejected_response", "margin"],
        "preference data, but training is supervised: write the answer to be learned as the completion and remove the others",
    ),
    refused(
        Place::Row,
        &["image", "images", "video", "videos", "audio", "audios", "objects"],
        "only text can be trained on: leave the row out, or write what the model should know as text",
    ),
    refused(
        Place::Row,
        &["reasoning", "reasoning_content", "thinking", "thought", "cot"],
        "beside the turns it cannot be placed: put it into the assistant's turn as \"reasoning_content\"",
    ),
    refused(
        Place::Row,
        &["input_ids", "labels", "attention_mask", "loss_mask", "token_ids"],
        "rows are text and tokens are made here: give the text",
    ),
    refused(
        Place::Row,
        &["weight", "train", "loss", "reward"],
        "rows are not weighted: mark turns, give dataset.sources weights, or leave rows out",
    ),
    harmless(
        Place::Row,
        &[
            "id",
            "_id",
            "idx",
            "index",
            "uuid",
            "uid",
            "hash",
            "key",
            "row_id",
            "sample_id",
            "prompt_id",
            "question_id",
            "conversation_id",
            "conversation_hash",
            "conv_id",
            "session_id",
            "dialogue_id",
            "user_id",
            "custom_id",
            "__index_level_0__",
            "trajectory_id",
        ],
        "names the row",
    ),
    harmless(
        Place::Row,
        &[
            "source",
            "sources",
            "dataset",
            "dataset_name",
            "data_source",
            "origin",
            "subset",
            "split",
            "file",
            "file_path",
            "filename",
            "path",
            "url",
            "link",
            "dump",
            "repo",
            "license",
            "author",
            "model",
            "model_name",
            "generator",
            "generation_model",
            "generated_by",
            "annotator",
            "version",
            "title",
        ],
        "says where the row comes from",
    ),
    harmless(
        Place::Row,
        &["timestamp", "created", "created_at", "updated_at", "date", "time"],
        "says when the row was made",
    ),
    harmless(
        Place::Row,
        &[
            "category",
            "categories",
            "topic",
            "topics",
            "task",
            "task_type",
            "task_name",
            "domain",
            "tag",
            "tags",
            "type",
            "lang",
            "language",
            "language_score",
            "difficulty",
            "quality",
            "score",
            "scores",
            "int_score",
            "rating",
            "toxic",
            "redacted",
            "num_turns",
            "turn_count",
            "num_tokens",
            "token_count",
            "n_tokens",
            "length",
            "usage",
            "metadata",
            "meta",
            "meta_data",
            "extra",
            "extra_info",
            "notes",
            "comment",
            "",
            "Unnamed: 0",
        ],
        "describes the row",
    ),
    harmless(
        Place::Row,
        &[
            "parallel_tool_calls",
            "tool_choice",
            "temperature",
            "top_p",
            "max_tokens",
            "seed",
            "n",
            "stream",
        ],
        "a setting of the request that the row was recorded from; templates do not show it",
    ),
    used(Place::Turn, &["role", "from"], TURNS, "who speaks"),
    used(
        Place::Turn,
        &["content", "value"],
        TURNS,
        "what is said: a text, or a list of parts of text, which are joined with a line break",
    ),
    used(
        Place::Turn,
        &["reasoning_content", "reasoning", "thinking"],
        TURNS,
        "what the assistant thought before; templates see it under all three names",
    ),
    used(
        Place::Turn,
        &["tool_calls", "function_call"],
        TURNS,
        "the functions that the assistant calls; arguments as an object or its JSON text",
    ),
    used(Place::Turn, &["tool_call_id"], TURNS, "the call that a tool's turn answers"),
    used(
        Place::Turn,
        &["name"],
        TURNS,
        "the name of the speaker or, of a tool's turn, of the function",
    ),
    used(
        Place::Turn,
        &["weight", "train", "training", "trainable", "loss", "loss_mask", "loss_scale"],
        TURNS,
        "whether the assistant's turn is trained on: 1 or true, 0 or false",
    ),
    used(Place::Turn, &["masked"], TURNS, "the opposite: a masked turn is not trained on"),
    refused(
        Place::Turn,
        &["images", "image", "image_url", "videos", "audio", "audios", "media"],
        "only text can be trained on: leave the row out, or write what the model should know as text",
    ),
    refused(
        Place::Turn,
        &["train_detail", "training_detail", "token_ids"],
        "a turn is trained on as a whole: split it into turns, or mark it whole",
    ),
    refused(
        Place::Turn,
        &["reasoning_details", "thoughts", "channel"],
        "thoughts are given as one text: write it as \"reasoning_content\"",
    ),
    refused(Place::Turn, &["refusal"], "write what the assistant says as its content"),
    refused(
        Place::Turn,
        &["chosen", "rejected", "alternatives", "candidates"],
        "preference data, but training is supervised: keep the answer to be learned",
    ),
    harmless(
        Place::Turn,
        &[
            "id",
            "_id",
            "idx",
            "index",
            "uuid",
            "message_id",
            "parent_id",
            "turn",
            "turn_id",
            "turn_idx",
            "timestamp",
            "created",
            "created_at",
            "date",
            "model",
            "finish_reason",
            "stop_reason",
            "logprobs",
            "usage",
            "annotations",
            "metadata",
            "meta",
            "source",
            "lang",
            "language",
            "rating",
            "score",
            "status",
            "toxic",
            "redacted",
            "end_turn",
            "num_tokens",
            "token_count",
        ],
        "describes the turn",
    ),
    used(
        Place::Part,
        &["type"],
        TURNS,
        "`text`, `input_text`, `output_text`; `thinking` and `reasoning` are thoughts",
    ),
    used(Place::Part, &["text"], TURNS, "the text of a part"),
    used(Place::Part, &["thinking", "reasoning"], TURNS, "the text of a thought"),
    harmless(
        Place::Part,
        &["annotations", "cache_control", "id", "index", "signature"],
        "describes the part",
    ),
    used(Place::Call, &["id"], TURNS, "the id that a tool's turn refers to"),
    used(Place::Call, &["type"], TURNS, "`function`"),
    used(
        Place::Call,
        &["function", "name", "arguments", "parameters"],
        TURNS,
        "what is called, and with what",
    ),
    harmless(
        Place::Call,
        &["index", "output_index", "status", "description"],
        "describes the call",
    ),
];

fn find(place: Place, name: &str) -> impl Iterator<Item = &'static Known> {
    KNOWN.iter().filter(move |known| known.place == place && known.names.contains(&name))
}

/// Returns why a key that holds something is refused below a row; `None` if it is known.
pub(super) fn refuse_unknown(place: Place, name: &str) -> Option<RowError> {
    match find(place, name).next() {
        Some(Known { fate: Fate::Used(_) | Fate::Harmless, .. }) => None,
        Some(known) => Some(refusal(name, known)),
        None => Some(unknown(place, name)),
    }
}

fn refusal(name: &str, known: &Known) -> RowError {
    RowError::new(format!("{name:?} cannot be used: {}", known.note))
}

fn unknown(place: Place, name: &str) -> RowError {
    let known: Vec<&str> = KNOWN
        .iter()
        .filter(|known| known.place == place && matches!(known.fate, Fate::Used(_)))
        .flat_map(|known| known.names.iter().copied())
        .collect();
    let hint =
        nearest(name, &known).map_or(String::new(), |known| format!(" (did you mean {known:?}?)"));
    RowError::new(format!(
        "the key {name:?} is not known{hint}, and what it says would be lost: remove it, or list it in dataset.ignoredKeys if nothing of it is to be trained on"
    ))
}

/// Returns why keys of a row that hold something are refused, all of them. `contents` are the texts
/// that were understood: another format's key beside them is harmless if it only repeats them.
pub(super) fn check_row(
    row: &Map<String, Value>,
    format: DatasetFormat,
    contents: &[&str],
) -> Vec<RowError> {
    given_in(row).filter_map(|(name, value)| row_key(name, value, format, contents)).collect()
}

/// Returns the refusals of a row's keys that are refused in every format.
pub(super) fn refused_in(row: &Map<String, Value>) -> Vec<RowError> {
    let refusals = given_in(row).filter_map(|(name, _)| {
        let known = find(Place::Row, name).find(|known| known.fate == Fate::Refused)?;
        Some(refusal(name, known))
    });
    refusals.collect()
}

/// Returns the refusals of a row's keys that no format knows, without one that is reported already.
pub(super) fn unknown_in(row: &Map<String, Value>, reported: Option<&str>) -> Vec<RowError> {
    given_in(row)
        .filter(|(name, _)| reported != Some(name.as_str()))
        .filter(|(name, _)| find(Place::Row, name).next().is_none())
        .map(|(name, _)| unknown(Place::Row, name))
        .collect()
}

fn given_in(row: &Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
    row.iter().filter(|(_, value)| !is_empty(value))
}

fn row_key(
    name: &str,
    value: &Value,
    format: DatasetFormat,
    contents: &[&str],
) -> Option<RowError> {
    if find(Place::Row, name).next().is_none() {
        return Some(unknown(Place::Row, name));
    }
    let mut other_format = false;
    for known in find(Place::Row, name) {
        match known.fate {
            Fate::Used(formats) if formats.contains(&format) => return None,
            Fate::Used(_) => other_format = true,
            Fate::Harmless => return None,
            Fate::Refused => return Some(refusal(name, known)),
        }
    }
    if other_format && !repeats(value, contents) {
        return Some(RowError::new(format!(
            "{name:?} has no place in a row of the format {}, and what it says would be lost: remove it, or list it in dataset.ignoredKeys",
            crate::data::formats::word(format),
        )));
    }
    None
}
