//! What becomes of the assistant's thoughts before a conversation is rendered.

use std::borrow::Cow;

use finetune_contract::Reasoning;

use crate::data::conversation::{ChatRole, Conversation, Message};

/// Takes out of a conversation the thoughts that are not to be trained on or shown.
pub(crate) fn keep(conversation: &Conversation, reasoning: Reasoning) -> Cow<'_, Conversation> {
    let last =
        conversation.messages.iter().rposition(|message| message.role == ChatRole::Assistant);
    let drops = |index: usize| match reasoning {
        Reasoning::Keep => false,
        Reasoning::Drop => true,
        Reasoning::LastTurn => Some(index) != last,
    };
    let thinks = |(index, message): (usize, &Message)| drops(index) && has_thought(message);
    if !conversation.messages.iter().enumerate().any(thinks) {
        return Cow::Borrowed(conversation);
    }
    let mut conversation = conversation.clone();
    for (index, message) in conversation.messages.iter_mut().enumerate() {
        if drops(index) && has_thought(message) {
            message.reasoning = None;
            if let Some(said) = after_thought(&message.content) {
                message.content = said.to_owned();
            }
        }
    }
    Cow::Owned(conversation)
}

fn has_thought(message: &Message) -> bool {
    message.role == ChatRole::Assistant
        && (message.reasoning.is_some() || after_thought(&message.content).is_some())
}

/// Returns what follows a thought that a text begins with.
fn after_thought(content: &str) -> Option<&str> {
    let (_, said) = content.trim_start().strip_prefix("<think>")?.split_once("</think>")?;
    Some(said.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(reasoning: Reasoning) -> String {
        let thinking = |content: &str, thought: Option<&str>| Message {
            reasoning: thought.map(str::to_owned),
            ..Message::new(ChatRole::Assistant, content)
        };
        let conversation = Conversation::new(vec![
            Message::new(ChatRole::User, "<think>no</think> thought"),
            thinking("<think>\nhm\n</think>\n\none", None),
            thinking("two", Some("well")),
            thinking("<think>so</think>three", None),
        ]);
        let kept = keep(&conversation, reasoning);
        let shown = kept.messages.iter().map(|message| {
            let thought =
                message.reasoning.as_deref().map_or(String::new(), |text| format!("({text})"));
            thought + &message.content.replace('\n', "/")
        });
        shown.collect::<Vec<_>>().join(" | ")
    }

    #[test]
    fn thoughts_are_kept_dropped_or_kept_in_the_last_turn() {
        insta::assert_snapshot!(check(Reasoning::Keep), @"<think>no</think> thought | <think>/hm/</think>//one | (well)two | <think>so</think>three");
        insta::assert_snapshot!(check(Reasoning::Drop), @"<think>no</think> thought | one | two | three");
        insta::assert_snapshot!(check(Reasoning::LastTurn), @"<think>no</think> thought | one | two | <think>so</think>three");
    }
}
