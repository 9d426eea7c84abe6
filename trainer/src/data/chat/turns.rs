//! From a conversation to texts, and where in them the assistant's turns are.
//!
//! Most templates append: what they print for a conversation begins with what they print for its
//! beginning. Such a conversation is one text. Other templates print earlier turns differently once
//! more follow (Qwen3 leaves out their thoughts, Mistral moves the system prompt). Then each turn
//! that is trained on becomes a text of its own: what a server sends to the model when it asks for
//! this turn, and the answer. Which of both it is, is found out for each conversation.

use std::ops::Range;

use minijinja::Value;

use crate::data::{
    chat::template::{Chat, GENERATION_MARKS, Template, message_value, refuse_marks},
    conversation::{ChatRole, Conversation, Message},
};

/// Stands for what a turn says when looking for where a template puts it; private use, and rows
/// that have it are refused.
const CONTENT: char = '\u{F8F2}';
/// Turns before one that are rendered with it to see what the template makes of it. Rows with more
/// turns are rendered in windows, so that time grows with their length and not with its square.
const WINDOW: usize = 24;
/// The most characters a conversation may become when each of its turns is a text of its own.
const MOST_EXPANDED: usize = 256 << 20;

/// A text with the turns in it that are trained on.
#[expect(clippy::struct_field_names, reason = "a text is what it holds")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Text {
    /// What is tokenized.
    pub text: String,
    /// The turns trained on, in order.
    pub turns: Vec<Turn>,
    /// The messages it shows are those before this index.
    pub until: usize,
    /// Whether the template itself marks what the assistant generates.
    pub is_marked: bool,
}

/// Where a turn is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Turn {
    /// The message.
    pub index: usize,
    /// The end of what a server sends to the model; no token may span it.
    pub border: usize,
    /// What the model says, without what the template supplies.
    pub span: Range<usize>,
}

/// What became of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Texts {
    /// At least one.
    pub texts: Vec<Text>,
    /// What the generation prompt begins for the model, and an answer does not have (`<think>`).
    pub opened: Option<String>,
}

/// Renders a conversation.
///
/// # Errors
/// A text that says why it cannot be trained on.
pub(crate) fn render(template: &Template, conversation: &Conversation) -> Result<Texts, String> {
    let turns = Turns::new(template, conversation);
    if template.marks_generation(&turns.chat) {
        refuse_marks(&conversation.messages, &GENERATION_MARKS)?;
        return Ok(Texts { texts: vec![turns.marked()?], opened: None });
    }
    refuse_marks(&conversation.messages, &[CONTENT])?;
    let whole = turns.text(turns.chat.messages.clone(), false)?;
    let mut opened = None;
    let texts = match turns.appended(whole, &mut opened)? {
        Some(text) => vec![text],
        None => turns.expanded(&mut opened)?,
    };
    Ok(Texts { texts, opened })
}

struct Turns<'a> {
    template: &'a Template,
    messages: &'a [Message],
    chat: Chat,
}

/// Where an answer starts in what is rendered with it.
struct Answer {
    /// The end of the prompt.
    border: usize,
    /// The same, or after what the template supplies.
    start: usize,
    /// The end of the generation prompt that the answer does not have.
    opened: String,
}

impl<'a> Turns<'a> {
    fn new(template: &'a Template, conversation: &'a Conversation) -> Self {
        Self { template, messages: &conversation.messages, chat: Chat::new(conversation) }
    }

    fn text(&self, messages: Vec<Value>, add_generation_prompt: bool) -> Result<String, String> {
        Ok(self.template.render(&self.chat, messages, add_generation_prompt)?.text)
    }

    fn targets(&self) -> impl DoubleEndedIterator<Item = usize> {
        (0..self.messages.len()).filter(|&index| self.messages[index].is_target)
    }

    /// Takes the template's own word for what the assistant generates.
    fn marked(&self) -> Result<Text, String> {
        let rendered = self.template.render(&self.chat, self.chat.messages.clone(), false)?;
        let answers: Vec<usize> = (0..self.messages.len())
            .filter(|&index| self.messages[index].role == ChatRole::Assistant)
            .collect();
        let blocks = rendered.generation;
        let all_are_targets = answers.len() == self.targets().count();
        if blocks.len() != answers.len() && !all_are_targets {
            return Err(format!(
                "the chat template has {} {{% generation %}} blocks for {} assistant turns, so it cannot be told which belong to the turns that are trained on: train on all of them, or use a template with one block for each",
                blocks.len(),
                answers.len()
            ));
        }
        let turn = |(place, span): (usize, Range<usize>)| Turn {
            // With several blocks for a turn all turns are targets, and which it is does not matter.
            index: answers[place.min(answers.len() - 1)],
            border: span.start,
            span,
        };
        let turns: Vec<Turn> = blocks
            .into_iter()
            .enumerate()
            .map(turn)
            .filter(|turn| self.messages[turn.index].is_target)
            .collect();
        if turns.is_empty() {
            return Err("the chat template's {% generation %} blocks mark nothing in this conversation, so no token would be trained on".to_owned());
        }
        Ok(Text { text: rendered.text, turns, until: self.messages.len(), is_marked: true })
    }

    /// Finds the turns in the text of the whole conversation; none if the template does not append.
    fn appended(&self, whole: String, opened: &mut Option<String>) -> Result<Option<Text>, String> {
        let Some(last) = self.targets().next_back() else {
            return Err("no assistant turn is trained on".to_owned());
        };
        let mut turns = Vec::new();
        // How far the whole text is known to be that of the turns so far.
        let mut known = 0;
        let mut before = (0, String::new());
        let answers = (0..=last).filter(|&index| self.messages[index].role == ChatRole::Assistant);
        let mut previous = None;
        for index in answers {
            let mut first = previous.map_or(0, |previous| self.window(previous));
            if let Some(previous) = previous
                && first != before.0
            {
                // A part may break a template's rules (roles that alternate): then all is rendered.
                let part = self.text(self.part(first, previous + 1), false);
                before = match part {
                    Ok(part) => (first, part),
                    Err(_) => (0, self.text(self.part(0, previous + 1), false)?),
                };
                first = before.0;
            }
            let with_turn = if first == 0 && index + 1 == self.messages.len() {
                whole.clone()
            } else {
                self.text(self.part(first, index + 1), false)?
            };
            let Some(added) = with_turn.strip_prefix(before.1.as_str()) else { return Ok(None) };
            if !whole[known..].starts_with(added) {
                return Ok(None);
            }
            if self.messages[index].is_target {
                let Some(answer) = self.answer(first, index, &with_turn)? else { return Ok(None) };
                let Some(border) = answer.border.checked_sub(before.1.len()) else {
                    return Ok(None);
                };
                let start = answer.start - before.1.len();
                let span = known + start..known + added.len();
                if !answer.opened.is_empty() {
                    if self.is_cut(index, &whole[span.clone()], &answer.opened) {
                        return Ok(None);
                    }
                    *opened = Some(answer.opened);
                }
                turns.push(Turn { index, border: known + border, span });
            }
            known += added.len();
            before = (first, with_turn);
            previous = Some(index);
        }
        Ok(Some(Text { text: whole, turns, until: self.messages.len(), is_marked: false }))
    }

    /// Makes a text for each turn that is trained on.
    fn expanded(&self, opened: &mut Option<String>) -> Result<Vec<Text>, String> {
        let mut texts: Vec<Text> = Vec::new();
        let mut size = 0;
        for index in self.targets() {
            let text = self.alone(index, opened)?;
            size += text.text.len();
            if size > MOST_EXPANDED {
                return Err(format!(
                    "the chat template prints earlier turns differently once more follow, so each assistant turn becomes a row of its own; together they are longer than {} MiB: split the conversation, or set dataset.trainOn to lastTurn",
                    MOST_EXPANDED >> 20
                ));
            }
            texts.push(text);
        }
        Ok(texts)
    }

    /// Renders what a server sends to the model when it asks for a turn, and the turn.
    fn alone(&self, index: usize, opened: &mut Option<String>) -> Result<Text, String> {
        let with_turn = self.text(self.part(0, index + 1), false)?;
        let one = |text: String, border: usize, start: usize| {
            let turns = vec![Turn { index, border, span: start..text.len() }];
            Text { text, turns, until: index + 1, is_marked: false }
        };
        let Some(answer) = self.answer(0, index, &with_turn)? else {
            return match self.after_moved_prompt(index)? {
                Some((prompt, answer)) => {
                    Ok(one(prompt.clone() + &answer, prompt.len(), prompt.len()))
                }
                None => Err(format!(
                    "the chat template prints what comes before turn {index} in another way once the assistant has answered, so what a server asks and what is trained on would differ: use another template (dataset.chatTemplate), or one with {{% generation %}} blocks"
                )),
            };
        };
        if answer.opened.is_empty() {
            return Ok(one(with_turn, answer.border, answer.start));
        }
        if self.is_cut(index, &with_turn[answer.start..], &answer.opened) {
            // The template cuts the thought out of what was said; a model that is asked says it.
            let prompt = self.text(self.part(0, index), true)?;
            let said = &self.messages[index].content.trim_start()[answer.opened.trim_end().len()..];
            let said =
                said.strip_prefix(&answer.opened[answer.opened.trim_end().len()..]).unwrap_or(said);
            let end = self.after_content(index)?;
            let text = format!("{prompt}{}{end}", said.trim_end());
            return Ok(one(text, prompt.len(), prompt.len()));
        }
        *opened = Some(answer.opened);
        Ok(one(with_turn, answer.border, answer.start))
    }

    /// Tells whether a template cut the thought that a generation prompt opens out of an answer.
    fn is_cut(&self, index: usize, answer: &str, opened: &str) -> bool {
        let content = self.messages[index].content.trim();
        let opens = content.starts_with(opened.trim()) && !opened.trim().is_empty();
        opens && !answer.contains(opened.trim()) && content.len() > opened.trim().len()
    }

    /// Finds where the answer of a turn starts in `with_turn`, the text of the turns from `first`
    /// to it; none if the template prints what is before it differently without it.
    fn answer(
        &self,
        first: usize,
        index: usize,
        with_turn: &str,
    ) -> Result<Option<Answer>, String> {
        let at =
            |border: usize, start: usize| Some(Answer { border, start, opened: String::new() });
        if index == 0 {
            // Nobody asks, so there is no prompt: the turn starts where the template lets it speak.
            let probe = self.probe(first, index)?;
            let before = probe.split(CONTENT).next().unwrap_or_default();
            let start = if with_turn.starts_with(before) {
                before.len()
            } else {
                common_prefix(with_turn, before)
            };
            return Ok(at(start, start));
        }
        let prompt = self.text(self.part(first, index), true)?;
        if let Some(turn) = with_turn.strip_prefix(prompt.as_str()) {
            if self.starts_with_content(index, turn) {
                return Ok(at(prompt.len(), prompt.len()));
            }
            let probe = self.probe(first, index)?;
            let supplied = probe
                .strip_prefix(prompt.as_str())
                .and_then(|turn| turn.split_once(CONTENT))
                .map_or("", |(before, _)| before);
            // White space is the model's to say: no prompt has it.
            let is_supplied = !supplied.trim().is_empty() && turn.starts_with(supplied);
            let start = if is_supplied { supplied.len() } else { 0 };
            return Ok(at(prompt.len(), prompt.len() + start));
        }
        let asked = self.text(self.part(first, index), false)?;
        let probe = self.probe(first, index)?;
        let start = common_prefix(&prompt, &probe);
        if start < asked.len() || !with_turn.starts_with(&prompt[..start]) {
            return Ok(None);
        }
        Ok(Some(Answer { border: start, start, opened: prompt[start..].to_owned() }))
    }

    /// Tells whether a turn says its content first, so that there is nothing to look for before it.
    fn starts_with_content(&self, index: usize, turn: &str) -> bool {
        let Message { content, reasoning, tool_calls, .. } = &self.messages[index];
        reasoning.is_none()
            && tool_calls.is_empty()
            && !content.trim().is_empty()
            && (turn.starts_with(content.as_str()) || turn.starts_with(content.trim()))
    }

    /// Renders the turns up to one, of which a mark is all it says.
    fn probe(&self, first: usize, index: usize) -> Result<String, String> {
        let mut messages = self.part(first, index + 1);
        if let Some(last) = messages.last_mut() {
            *last = message_value(&Message::new(ChatRole::Assistant, CONTENT));
        }
        self.text(messages, false)
    }

    /// Returns what a template prints after what the assistant says.
    fn after_content(&self, index: usize) -> Result<String, String> {
        let probe = self.probe(0, index)?;
        Ok(probe.split_once(CONTENT).map_or(String::new(), |(_, after)| after.to_owned()))
    }

    /// Where a template moves things in the prompt (Mistral puts the system prompt before the last
    /// question while there is no answer), the answer is what follows the question in the text with
    /// it, and the prompt what is sent without it.
    fn after_moved_prompt(&self, index: usize) -> Result<Option<(String, String)>, String> {
        let Some(question) = index.checked_sub(1) else { return Ok(None) };
        let prompt = self.text(self.part(0, index), true)?;
        let mark = |mut messages: Vec<Value>| {
            let marked =
                Message { content: CONTENT.to_string(), ..self.messages[question].clone() };
            messages[question] = message_value(&marked);
            messages
        };
        let asked = self.text(mark(self.part(0, index)), true)?;
        let answered = self.text(mark(self.part(0, index + 1)), false)?;
        let (Some((_, asked)), Some((_, answered))) =
            (asked.split_once(CONTENT), answered.split_once(CONTENT))
        else {
            return Ok(None);
        };
        let Some(answer) = answered.strip_prefix(asked) else { return Ok(None) };
        // Only what is before the question may have moved, not what is after it.
        Ok(prompt.ends_with(asked).then(|| (prompt.clone(), answer.to_owned())))
    }

    /// Returns the first message of the window for what follows the answer at `previous`.
    fn window(&self, previous: usize) -> usize {
        if previous < WINDOW {
            return 0;
        }
        // Windows move in strides, so that most turns share the rendering of the one before.
        let latest = previous - previous % (WINDOW / 2) - WINDOW / 2;
        (latest..previous)
            .find(|&index| self.messages[index].role == ChatRole::User)
            .or_else(|| {
                (latest..=previous).find(|&index| self.messages[index].role == ChatRole::Assistant)
            })
            .unwrap_or(0)
    }

    /// Returns the messages from `first` to before `end`, after what every conversation begins with:
    /// the system's message, and a question if the part does not begin with one.
    fn part(&self, first: usize, end: usize) -> Vec<Value> {
        let values = &self.chat.messages;
        if first == 0 {
            return values[..end].to_vec();
        }
        let mut part = Vec::new();
        if self.messages[0].role == ChatRole::System {
            part.push(values[0].clone());
        }
        if self.messages[first].role != ChatRole::User {
            let question = (0..first).rfind(|&index| self.messages[index].role == ChatRole::User);
            part.extend(question.map(|index| values[index].clone()));
        }
        part.extend_from_slice(&values[first..end]);
        part
    }
}

fn common_prefix(one: &str, other: &str) -> usize {
    one.chars().zip(other.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}
