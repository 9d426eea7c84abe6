//! Removes reasoning of the assistant from a conversation before it is rendered.

use std::borrow::Cow;

use finetune_contract::Reasoning;

use crate::data::conversation::{ChatRole, Conversation, Message};

/// Removes the reasoning that the setting drops.
pub(crate) fn apply(conversation: &Conversation, reasoning: Reasoning) -> Cow<'_, Conversation> {
    let last =
        conversation.messages.iter().rposition(|message| message.role == ChatRole::Assistant);
    let is_dropped = |index: usize| match reasoning {
        Reasoning::Keep => false,
        Reasoning::Drop => true,
        Reasoning::LastTurn => Some(index) != last,
    };
    let drops_reasoning =
        |(index, message): (usize, &Message)| is_dropped(index) && has_reasoning(message);
    if !conversation.messages.iter().enumerate().any(drops_reasoning) {
        return Cow::Borrowed(conversation);
    }
    let mut conversation = conversation.clone();
    for (index, message) in conversation.messages.iter_mut().enumerate() {
        if is_dropped(index) && has_reasoning(message) {
            message.reasoning = None;
            if let Some(answer) = after_reasoning(&message.content) {
                message.content = answer.to_owned();
            }
        }
    }
    Cow::Owned(conversation)
}

fn has_reasoning(message: &Message) -> bool {
    message.role == ChatRole::Assistant
        && (message.reasoning.is_some() || after_reasoning(&message.content).is_some())
}

/// Returns the text after the reasoning block that a content starts with; `None` without one.
fn after_reasoning(content: &str) -> Option<&str> {
    let (_, answer) = content.trim_start().strip_prefix("<think>")?.split_once("</think>")?;
    Some(answer.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(reasoning: Reasoning) -> String {
        let with_reasoning = |content: &str, reasoning_text: Option<&str>| Message {
            reasoning: reasoning_text.map(str::to_owned),
            ..Message::new(ChatRole::Assistant, content)
        };
        let conversation = Conversation::new(vec![
            Message::new(ChatRole::User, "<think>no</think> thought"),
            with_reasoning("<think>\nhm\n</think>\n\none", None),
            with_reasoning("two", Some("well")),
            with_reasoning("<think>so</think>three", None),
        ]);
        let applied = apply(&conversation, reasoning);
        let shown = applied.messages.iter().map(|message| {
            let reasoning_text =
                message.reasoning.as_deref().map_or(String::new(), |text| format!("({text})"));
            reasoning_text + &message.content.replace('\n', "/")
        });
        shown.collect::<Vec<_>>().join(" | ")
    }

    #[test]
    fn reasoning_is_kept_dropped_or_kept_in_the_last_turn() {
        insta::assert_snapshot!(check(Reasoning::Keep), @"<think>no</think> thought | <think>/hm/</think>//one | (well)two | <think>so</think>three");
        insta::assert_snapshot!(check(Reasoning::Drop), @"<think>no</think> thought | one | two | three");
        insta::assert_snapshot!(check(Reasoning::LastTurn), @"<think>no</think> thought | one | two | <think>so</think>three");
    }
}
