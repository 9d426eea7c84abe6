//! The table of all known keys of a row, and how each is used.
//!
//! `docs/ROWS.md` is generated from the table. Keys that are not in it are refused, so that no content of
//! a row is dropped silently.

use finetune_contract::DatasetFormat;

/// The kind of object that a key belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyScope {
    /// The row.
    Row,
    /// A turn of a conversation.
    Turn,
    /// A part of the content of a turn.
    Part,
    /// A tool call, and its function.
    Call,
}

/// How a key is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyUse {
    /// It is read in rows of these formats.
    Used(&'static [DatasetFormat]),
    /// It does not affect training and is ignored.
    Ignored,
    /// It is refused unless its value is empty.
    Refused,
}

/// The rule for keys with the same meaning.
#[derive(Debug)]
pub struct KeyRule {
    /// The kind of object that they belong to.
    pub scope: KeyScope,
    /// The keys.
    pub names: &'static [&'static str],
    /// How they are used.
    pub key_use: KeyUse,
    /// The meaning of the keys or, if they are refused, why and what to do.
    pub note: &'static str,
}

use DatasetFormat::{Alpaca, Messages, Prerendered, PromptCompletion, Sharegpt, Text};

const TURNS: &[DatasetFormat] = &[Messages, Sharegpt];
const WITH_TURNS: &[DatasetFormat] = &[Messages, Sharegpt, PromptCompletion, Alpaca];
const PAIRS: &[DatasetFormat] = &[PromptCompletion, Prerendered];

const fn used(
    scope: KeyScope,
    names: &'static [&'static str],
    formats: &'static [DatasetFormat],
    note: &'static str,
) -> KeyRule {
    KeyRule { scope, names, key_use: KeyUse::Used(formats), note }
}

const fn ignored(scope: KeyScope, names: &'static [&'static str], note: &'static str) -> KeyRule {
    KeyRule { scope, names, key_use: KeyUse::Ignored, note }
}

const fn refused(scope: KeyScope, names: &'static [&'static str], note: &'static str) -> KeyRule {
    KeyRule { scope, names, key_use: KeyUse::Refused, note }
}

/// The table, in the order of the documentation.
pub const KEY_RULES: &[KeyRule] = &[
    used(KeyScope::Row, &["messages"], &[Messages], "the turns of a conversation"),
    used(
        KeyScope::Row,
        &["contents"],
        &[Messages],
        "the turns of a conversation as Gemini's tuning takes them: the role `user` or `model`, and `parts` of text; a part with `thought: true` is reasoning",
    ),
    used(
        KeyScope::Row,
        &["systemInstruction", "system_instruction"],
        &[Messages],
        "beside `contents`, the system turn: `parts` of text",
    ),
    used(
        KeyScope::Row,
        &["conversations", "conversation"],
        &[Sharegpt],
        "the turns of a conversation",
    ),
    used(
        KeyScope::Row,
        &["prompt", "question", "query"],
        PAIRS,
        "the prompt, a text or turns; it is not trained on",
    ),
    used(
        KeyScope::Row,
        &["completion", "response", "answer"],
        PAIRS,
        "the completion that is trained on: a text, or turns, of which those of the assistant are",
    ),
    used(KeyScope::Row, &["instruction"], &[Alpaca], "the user's turn"),
    used(
        KeyScope::Row,
        &["input", "context"],
        &[Alpaca],
        "appended to the instruction after a blank line",
    ),
    used(KeyScope::Row, &["output", "response", "answer"], &[Alpaca], "the assistant's turn"),
    used(
        KeyScope::Row,
        &["history"],
        &[Alpaca],
        "earlier turns as `[[question, answer], …]`; all answers are trained on",
    ),
    used(KeyScope::Row, &["text"], &[Text, Prerendered], "a text that is trained on completely"),
    used(
        KeyScope::Row,
        &["system", "system_prompt", "system_message"],
        WITH_TURNS,
        "a system turn before the others; if the first turn is a system turn, the two must be equal",
    ),
    used(
        KeyScope::Row,
        &["tools", "functions"],
        WITH_TURNS,
        "the tools that the template prints, as a list or its JSON text; a bare function becomes `{\"type\": \"function\", \"function\": …}`",
    ),
    used(
        KeyScope::Row,
        &["chat_template_kwargs"],
        WITH_TURNS,
        "additional variables of the chat template",
    ),
    used(KeyScope::Row, &["documents"], WITH_TURNS, "the documents that the template prints"),
    used(
        KeyScope::Row,
        &["label"],
        &[Messages, Sharegpt, PromptCompletion, Alpaca, Text, Prerendered],
        "`true` marks a good answer of preference data and is accepted; anything else is refused",
    ),
    used(
        KeyScope::Row,
        &["mask"],
        TURNS,
        "in NeMo, the role whose turns are not trained on; only the user is supported, whose turns never are",
    ),
    refused(
        KeyScope::Row,
        &["rejected", "chosen", "rejected_response", "margin"],
        "preference data, but training is supervised: use the preferred answer as the completion and remove the others",
    ),
    refused(
        KeyScope::Row,
        &["image", "images", "video", "videos", "audio", "audios", "objects"],
        "only text can be trained on: remove the row, or replace the content by text",
    ),
    refused(
        KeyScope::Row,
        &["reasoning", "reasoning_content", "thinking", "thought", "cot"],
        "reasoning belongs to a turn: move it into the assistant's turn as \"reasoning_content\"",
    ),
    refused(
        KeyScope::Row,
        &["input_ids", "labels", "attention_mask", "loss_mask", "token_ids"],
        "rows must be text, which the trainer tokenizes: give the text",
    ),
    refused(
        KeyScope::Row,
        &["weight", "train", "loss", "reward"],
        "rows cannot be weighted: mark turns, set weights of dataset.sources, or remove rows",
    ),
    ignored(
        KeyScope::Row,
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
        "identifies the row",
    ),
    ignored(
        KeyScope::Row,
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
        "the origin of the row",
    ),
    ignored(
        KeyScope::Row,
        &["timestamp", "created", "created_at", "updated_at", "date", "time"],
        "the time of the row",
    ),
    ignored(
        KeyScope::Row,
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
    ignored(
        KeyScope::Row,
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
        "a setting of the recorded request; templates do not print it",
    ),
    used(KeyScope::Turn, &["role", "from"], TURNS, "the role of the author"),
    used(
        KeyScope::Turn,
        &["content", "value"],
        TURNS,
        "the content: a text, or a list of text parts, which are joined with line breaks",
    ),
    used(
        KeyScope::Turn,
        &["reasoning_content", "reasoning", "thinking"],
        TURNS,
        "the reasoning of the assistant; templates see it as `reasoning_content` and `thinking`",
    ),
    used(
        KeyScope::Turn,
        &["tool_calls", "function_call"],
        TURNS,
        "the tool calls of the assistant; arguments are an object or its JSON text",
    ),
    used(KeyScope::Turn, &["tool_call_id"], TURNS, "the id of the call that a tool turn answers"),
    used(
        KeyScope::Turn,
        &["name"],
        TURNS,
        "the name of the author or, in a tool turn, of the function",
    ),
    used(
        KeyScope::Turn,
        &["weight", "train", "training", "trainable", "loss", "loss_mask", "loss_scale"],
        TURNS,
        "whether a turn of the assistant is trained on: 1 or true, 0 or false",
    ),
    used(KeyScope::Turn, &["masked"], TURNS, "the opposite: 1 or true does not train on the turn"),
    refused(
        KeyScope::Turn,
        &["images", "image", "image_url", "videos", "audio", "audios", "media"],
        "only text can be trained on: remove the row, or replace the content by text",
    ),
    refused(
        KeyScope::Turn,
        &["train_detail", "training_detail", "token_ids"],
        "a turn is trained on completely or not at all: split it into several turns, or mark the whole turn",
    ),
    refused(
        KeyScope::Turn,
        &["reasoning_details", "thoughts", "channel"],
        "reasoning must be one text: give it as \"reasoning_content\"",
    ),
    refused(KeyScope::Turn, &["refusal"], "give the answer of the assistant as its content"),
    refused(
        KeyScope::Turn,
        &["chosen", "rejected", "alternatives", "candidates"],
        "preference data, but training is supervised: keep only the preferred answer",
    ),
    ignored(
        KeyScope::Turn,
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
        KeyScope::Part,
        &["type"],
        TURNS,
        "`text`, `input_text` or `output_text`; `thinking` or `reasoning` for reasoning",
    ),
    used(KeyScope::Part, &["text"], TURNS, "the text of a part"),
    used(KeyScope::Part, &["thinking", "reasoning"], TURNS, "the text of a reasoning part"),
    ignored(
        KeyScope::Part,
        &["annotations", "cache_control", "id", "index", "signature"],
        "describes the part",
    ),
    used(KeyScope::Call, &["id"], TURNS, "the id that the tool turn refers to"),
    used(KeyScope::Call, &["type"], TURNS, "`function`"),
    used(
        KeyScope::Call,
        &["function", "name", "arguments", "parameters"],
        TURNS,
        "the function and its arguments",
    ),
    ignored(
        KeyScope::Call,
        &["index", "output_index", "status", "description"],
        "describes the call",
    ),
];
