//! The prompt of Stanford Alpaca, for instruction rows on models without a chat template.

use crate::data::conversation::{ChatRole, Conversation, WithoutTemplate};

/// A part of a rendered conversation. The tokenizer appends EOS to each answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The text.
    pub text: String,
    /// Whether the model generates it.
    pub is_answer: bool,
    /// Whether it is trained on; only answers can be.
    pub is_target: bool,
}

/// Renders a conversation; `None` if it does not come from an instruction row.
///
/// # Source
/// `train.py` of Stanford Alpaca, with a line break after `### Response:` as in Axolotl and
/// LLaMA-Factory. A system prompt replaces the first sentences, and earlier turns come first, under the
/// same headings.
pub fn segments(conversation: &Conversation) -> Option<Vec<Segment>> {
    let WithoutTemplate::AlpacaPrompt { input } = &conversation.without_template else {
        return None;
    };
    let context =
        if input.is_some() { ", paired with an input that provides further context" } else { "" };
    let mut prompt = format!(
        "Below is an instruction that describes a task{context}. Write a response that appropriately completes the request.\n\n"
    );
    let last_user =
        conversation.messages.iter().rposition(|message| message.role == ChatRole::User);
    let mut segments = Vec::new();
    for (index, message) in conversation.messages.iter().enumerate() {
        match message.role {
            ChatRole::System => prompt = format!("{}\n\n", message.content),
            ChatRole::Assistant => {
                let text = std::mem::take(&mut prompt);
                segments.push(Segment { text, is_answer: false, is_target: false });
                segments.push(Segment {
                    text: message.content.clone(),
                    is_answer: true,
                    is_target: message.is_target,
                });
                prompt.push_str("\n\n");
            }
            ChatRole::User | ChatRole::Tool => {
                let input = input.as_ref().filter(|_| Some(index) == last_user);
                let both = input.map(|input| format!("\n\n{input}"));
                let content = message.content.as_str();
                let instruction =
                    both.and_then(|both| content.strip_suffix(both.as_str())).unwrap_or(content);
                prompt.push_str(&format!("### Instruction:\n{instruction}\n\n"));
                if let Some(input) = input {
                    prompt.push_str(&format!("### Input:\n{input}\n\n"));
                }
                prompt.push_str("### Response:\n");
            }
        }
    }
    Some(segments)
}

#[cfg(test)]
mod tests {
    use finetune_contract::DatasetFormat;

    use super::*;
    use crate::data::{
        conversation::Example,
        formats::{ReadOptions, read},
    };

    fn check(row: &str) -> String {
        let (_, example) = read(row, &ReadOptions::for_format(DatasetFormat::Auto)).unwrap();
        let Example::Chat(conversation) = example else { return format!("{example:?}") };
        let segments = segments(&conversation).unwrap_or_default();
        let show = |segment: Segment| {
            if segment.is_target { format!("[{}]", segment.text) } else { segment.text }
        };
        segments.into_iter().map(show).collect()
    }

    #[test]
    fn writes_instruction_rows_as_alpaca_does() {
        insta::assert_snapshot!(check(r#"{"instruction": "Add.", "input": "1 2", "output": "3"}"#), @"
        Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.

        ### Instruction:
        Add.

        ### Input:
        1 2

        ### Response:
        [3]
        ");
        insta::assert_snapshot!(check(r#"{"instruction": "c", "output": "d", "system": "Be brief.", "history": [["a", "b"]]}"#), @"
        Be brief.

        ### Instruction:
        a

        ### Response:
        [b]

        ### Instruction:
        c

        ### Response:
        [d]
        ");
    }
}
