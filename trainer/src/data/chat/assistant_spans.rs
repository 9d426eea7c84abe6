//! Renders a conversation to text and finds the spans of the assistant turns in it.
//!
//! Most templates append: the rendering of a conversation starts with the rendering of its first turns.
//! Such a conversation becomes one text. Other templates render earlier turns differently once more
//! turns follow (Qwen3 drops their reasoning, Mistral moves the system prompt). Then each trained turn
//! becomes a text of its own: the prompt that a server sends for this turn, and the answer. Which of
//! the two applies is determined for each conversation.

use std::ops::Range;

use minijinja::Value;

use crate::data::{
    chat::template::{Chat, GENERATION_MARKS, Template, message_value, refuse_marks},
    conversation::{ChatRole, Conversation, Message},
};

/// A placeholder for the content of a turn, used to find where a template prints it. It is a
/// private-use character; rows that contain it are refused.
const PLACEHOLDER: char = '\u{F8F2}';
/// How many earlier turns are rendered together with a turn. Longer conversations are rendered in
/// windows, so that the time grows linearly with their length and not quadratically.
const WINDOW_TURNS: usize = 24;
/// The most bytes that a conversation may become when each of its turns becomes a text.
const MAX_EXPANDED_BYTES: usize = 256 << 20;

/// A rendered text with the spans that are trained on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RenderedText {
    /// The text to tokenize.
    pub text: String,
    /// The spans of the trained turns, in order.
    pub spans: Vec<AssistantSpan>,
    /// The number of messages, counted from the first, that the text contains.
    pub message_count: usize,
    /// Whether the template marks what the assistant generates, with `{% generation %}` blocks.
    pub is_marked: bool,
}

/// The span of one assistant turn in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AssistantSpan {
    /// The index of the message.
    pub message_index: usize,
    /// The end of the prompt that a server sends to the model; no token may cross it.
    pub prompt_end: usize,
    /// The bytes that the model generates, without those that the template supplies.
    pub range: Range<usize>,
}

/// The texts of one conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RenderedConversation {
    /// At least one text.
    pub texts: Vec<RenderedText>,
    /// The end of the generation prompt that the rendered answers do not contain, such as `<think>`.
    pub omitted_prompt_suffix: Option<String>,
}

/// Renders a conversation.
///
/// # Errors
/// A message that says why the conversation cannot be trained on.
pub(crate) fn render(
    template: &Template,
    conversation: &Conversation,
) -> Result<RenderedConversation, String> {
    let renderer = Renderer::new(template, conversation);
    if template.marks_generation(&renderer.chat) {
        refuse_marks(&conversation.messages, &GENERATION_MARKS)?;
        let texts = vec![renderer.render_marked()?];
        return Ok(RenderedConversation { texts, omitted_prompt_suffix: None });
    }
    refuse_marks(&conversation.messages, &[PLACEHOLDER])?;
    let whole = renderer.text(renderer.chat.messages.clone(), false)?;
    let mut omitted_prompt_suffix = None;
    let texts = match renderer.find_spans(whole, &mut omitted_prompt_suffix)? {
        Some(text) => vec![text],
        None => renderer.render_turn_by_turn(&mut omitted_prompt_suffix)?,
    };
    Ok(RenderedConversation { texts, omitted_prompt_suffix })
}

struct Renderer<'a> {
    template: &'a Template,
    messages: &'a [Message],
    chat: Chat,
}

/// Where an answer starts in a text that ends with it.
struct AnswerStart {
    /// The end of the prompt.
    prompt_end: usize,
    /// The end of the prompt, or of what the template supplies after it.
    start: usize,
    /// The end of the generation prompt that the text does not contain.
    omitted_prompt_suffix: String,
}

impl<'a> Renderer<'a> {
    fn new(template: &'a Template, conversation: &'a Conversation) -> Self {
        Self { template, messages: &conversation.messages, chat: Chat::new(conversation) }
    }

    fn text(&self, messages: Vec<Value>, add_generation_prompt: bool) -> Result<String, String> {
        Ok(self.template.render(&self.chat, messages, add_generation_prompt)?.text)
    }

    /// Returns the indices of the trained messages.
    fn targets(&self) -> impl DoubleEndedIterator<Item = usize> {
        (0..self.messages.len()).filter(|&index| self.messages[index].is_target)
    }

    /// Renders the conversation and takes the spans from the `{% generation %}` blocks of the template.
    fn render_marked(&self) -> Result<RenderedText, String> {
        let rendered = self.template.render(&self.chat, self.chat.messages.clone(), false)?;
        let answers: Vec<usize> = (0..self.messages.len())
            .filter(|&index| self.messages[index].role == ChatRole::Assistant)
            .collect();
        let blocks = rendered.generation;
        let all_are_targets = answers.len() == self.targets().count();
        if blocks.len() != answers.len() && !all_are_targets {
            return Err(format!(
                "the chat template has {} {{% generation %}} blocks for {} assistant turns, so the blocks of the trained turns cannot be identified: train on all turns, or use a template with one block for each turn",
                blocks.len(),
                answers.len()
            ));
        }
        let span_of_block = |(number, range): (usize, Range<usize>)| AssistantSpan {
            // With several blocks per turn all turns are targets, so the index does not matter.
            message_index: answers[number.min(answers.len() - 1)],
            prompt_end: range.start,
            range,
        };
        let spans: Vec<AssistantSpan> = blocks
            .into_iter()
            .enumerate()
            .map(span_of_block)
            .filter(|span| self.messages[span.message_index].is_target)
            .collect();
        if spans.is_empty() {
            return Err("the {% generation %} blocks of the chat template mark nothing in this conversation, so no token would be trained on".to_owned());
        }
        let message_count = self.messages.len();
        Ok(RenderedText { text: rendered.text, spans, message_count, is_marked: true })
    }

    /// Finds the spans in the text of the whole conversation; `None` if the template does not append.
    fn find_spans(
        &self,
        whole: String,
        omitted_prompt_suffix: &mut Option<String>,
    ) -> Result<Option<RenderedText>, String> {
        let Some(last) = self.targets().next_back() else {
            return Err("no assistant turn is trained on".to_owned());
        };
        let mut spans = Vec::new();
        // The length of the prefix of `whole` that renders the turns so far.
        let mut matched = 0;
        // The start of the current window, and its text up to the previous answer.
        let mut before = (0, String::new());
        let answers = (0..=last).filter(|&index| self.messages[index].role == ChatRole::Assistant);
        let mut previous = None;
        for index in answers {
            let mut first = previous.map_or(0, |previous| self.window_start(previous));
            if let Some(previous) = previous
                && first != before.0
            {
                // A window may break the rules of a template (such as alternating roles). Then the
                // whole beginning is rendered.
                let window = self.text(self.window_messages(first, previous + 1), false);
                before = match window {
                    Ok(window) => (first, window),
                    Err(_) => (0, self.text(self.window_messages(0, previous + 1), false)?),
                };
                first = before.0;
            }
            let with_turn = if first == 0 && index + 1 == self.messages.len() {
                whole.clone()
            } else {
                self.text(self.window_messages(first, index + 1), false)?
            };
            let Some(added) = with_turn.strip_prefix(before.1.as_str()) else { return Ok(None) };
            if !whole[matched..].starts_with(added) {
                return Ok(None);
            }
            if self.messages[index].is_target {
                let Some(answer) = self.find_answer(first, index, &with_turn)? else {
                    return Ok(None);
                };
                let Some(prompt_end) = answer.prompt_end.checked_sub(before.1.len()) else {
                    return Ok(None);
                };
                let start = answer.start - before.1.len();
                let range = matched + start..matched + added.len();
                if !answer.omitted_prompt_suffix.is_empty() {
                    let suffix = answer.omitted_prompt_suffix;
                    if self.drops_reasoning(index, &whole[range.clone()], &suffix) {
                        return Ok(None);
                    }
                    *omitted_prompt_suffix = Some(suffix);
                }
                let prompt_end = matched + prompt_end;
                spans.push(AssistantSpan { message_index: index, prompt_end, range });
            }
            matched += added.len();
            before = (first, with_turn);
            previous = Some(index);
        }
        let message_count = self.messages.len();
        Ok(Some(RenderedText { text: whole, spans, message_count, is_marked: false }))
    }

    /// Renders a text for each trained turn.
    fn render_turn_by_turn(
        &self,
        omitted_prompt_suffix: &mut Option<String>,
    ) -> Result<Vec<RenderedText>, String> {
        let mut texts: Vec<RenderedText> = Vec::new();
        let mut size = 0;
        for index in self.targets() {
            let text = self.render_turn(index, omitted_prompt_suffix)?;
            size += text.text.len();
            if size > MAX_EXPANDED_BYTES {
                return Err(format!(
                    "the chat template renders earlier turns differently once more turns follow, so each assistant turn becomes a row of its own; together they are longer than {} MiB: split the conversation, or set dataset.trainOn to lastTurn",
                    MAX_EXPANDED_BYTES >> 20
                ));
            }
            texts.push(text);
        }
        Ok(texts)
    }

    /// Renders the prompt that a server sends for a turn, and the turn.
    fn render_turn(
        &self,
        index: usize,
        omitted_prompt_suffix: &mut Option<String>,
    ) -> Result<RenderedText, String> {
        let with_turn = self.text(self.window_messages(0, index + 1), false)?;
        let text_with_span = |text: String, prompt_end: usize, start: usize| {
            let range = start..text.len();
            let spans = vec![AssistantSpan { message_index: index, prompt_end, range }];
            RenderedText { text, spans, message_count: index + 1, is_marked: false }
        };
        let Some(answer) = self.find_answer(0, index, &with_turn)? else {
            return match self.split_after_moved_prompt(index)? {
                Some((prompt, answer)) => {
                    let prompt_end = prompt.len();
                    Ok(text_with_span(prompt + &answer, prompt_end, prompt_end))
                }
                None => Err(format!(
                    "the chat template renders the turns before turn {index} differently once the assistant has answered, so the prompt of a server and the training text would differ: use another template (dataset.chatTemplate), or one with {{% generation %}} blocks"
                )),
            };
        };
        if answer.omitted_prompt_suffix.is_empty() {
            return Ok(text_with_span(with_turn, answer.prompt_end, answer.start));
        }
        let suffix = answer.omitted_prompt_suffix;
        if self.drops_reasoning(index, &with_turn[answer.start..], &suffix) {
            // The template drops the reasoning of past answers, but a model that is asked for this
            // turn generates it: build the text from the prompt and the content.
            let prompt = self.text(self.window_messages(0, index), true)?;
            let content = &self.messages[index].content.trim_start()[suffix.trim_end().len()..];
            let content =
                content.strip_prefix(&suffix[suffix.trim_end().len()..]).unwrap_or(content);
            let end = self.text_after_content(index)?;
            let text = format!("{prompt}{}{end}", content.trim_end());
            return Ok(text_with_span(text, prompt.len(), prompt.len()));
        }
        *omitted_prompt_suffix = Some(suffix);
        Ok(text_with_span(with_turn, answer.prompt_end, answer.start))
    }

    /// Returns whether the template dropped reasoning from an answer whose generation prompt starts the
    /// reasoning with `prompt_suffix`.
    fn drops_reasoning(&self, index: usize, answer: &str, prompt_suffix: &str) -> bool {
        let content = self.messages[index].content.trim();
        let marker = prompt_suffix.trim();
        let has_reasoning = content.starts_with(marker) && !marker.is_empty();
        has_reasoning && !answer.contains(marker) && content.len() > marker.len()
    }

    /// Finds where the answer of a turn starts in `with_turn`, the text of the turns from `first` to
    /// it; `None` if the template renders the turns before it differently without it.
    fn find_answer(
        &self,
        first: usize,
        index: usize,
        with_turn: &str,
    ) -> Result<Option<AnswerStart>, String> {
        let found = |prompt_end: usize, start: usize| {
            Some(AnswerStart { prompt_end, start, omitted_prompt_suffix: String::new() })
        };
        if index == 0 {
            // The first turn has no prompt: it starts where the template prints its content.
            let with_placeholder = self.render_placeholder(first, index)?;
            let before = with_placeholder.split(PLACEHOLDER).next().unwrap_or_default();
            let start = if with_turn.starts_with(before) {
                before.len()
            } else {
                common_prefix(with_turn, before)
            };
            return Ok(found(start, start));
        }
        let prompt = self.text(self.window_messages(first, index), true)?;
        if let Some(turn) = with_turn.strip_prefix(prompt.as_str()) {
            if self.starts_with_content(index, turn) {
                return Ok(found(prompt.len(), prompt.len()));
            }
            let with_placeholder = self.render_placeholder(first, index)?;
            let supplied = with_placeholder
                .strip_prefix(prompt.as_str())
                .and_then(|turn| turn.split_once(PLACEHOLDER))
                .map_or("", |(before, _)| before);
            // The model generates white space itself: no prompt contains it.
            let is_supplied = !supplied.trim().is_empty() && turn.starts_with(supplied);
            let start = if is_supplied { supplied.len() } else { 0 };
            return Ok(found(prompt.len(), prompt.len() + start));
        }
        let without_generation_prompt = self.text(self.window_messages(first, index), false)?;
        let with_placeholder = self.render_placeholder(first, index)?;
        let start = common_prefix(&prompt, &with_placeholder);
        if start < without_generation_prompt.len() || !with_turn.starts_with(&prompt[..start]) {
            return Ok(None);
        }
        let omitted_prompt_suffix = prompt[start..].to_owned();
        Ok(Some(AnswerStart { prompt_end: start, start, omitted_prompt_suffix }))
    }

    /// Returns whether the rendered turn starts with its content, so that nothing comes before it.
    fn starts_with_content(&self, index: usize, turn: &str) -> bool {
        let Message { content, reasoning, tool_calls, .. } = &self.messages[index];
        reasoning.is_none()
            && tool_calls.is_empty()
            && !content.trim().is_empty()
            && (turn.starts_with(content.as_str()) || turn.starts_with(content.trim()))
    }

    /// Renders the turns up to one, with the placeholder as the content of that one.
    fn render_placeholder(&self, first: usize, index: usize) -> Result<String, String> {
        let mut messages = self.window_messages(first, index + 1);
        if let Some(last) = messages.last_mut() {
            *last = message_value(&Message::new(ChatRole::Assistant, PLACEHOLDER));
        }
        self.text(messages, false)
    }

    /// Returns what the template prints after the content of an assistant turn.
    fn text_after_content(&self, index: usize) -> Result<String, String> {
        let text = self.render_placeholder(0, index)?;
        Ok(text.split_once(PLACEHOLDER).map_or(String::new(), |(_, after)| after.to_owned()))
    }

    /// Splits a turn into prompt and answer for templates that move a part of the prompt, as Mistral
    /// does: it puts the system prompt before the last question while that has no answer. The prompt is
    /// the rendering without the answer; the answer is what follows the question in the rendering with
    /// it. `None` if that is not how the template works.
    fn split_after_moved_prompt(&self, index: usize) -> Result<Option<(String, String)>, String> {
        let Some(question) = index.checked_sub(1) else { return Ok(None) };
        let prompt = self.text(self.window_messages(0, index), true)?;
        let with_placeholder = |mut messages: Vec<Value>| {
            let content = PLACEHOLDER.to_string();
            let message = Message { content, ..self.messages[question].clone() };
            messages[question] = message_value(&message);
            messages
        };
        let asked = self.text(with_placeholder(self.window_messages(0, index)), true)?;
        let answered = self.text(with_placeholder(self.window_messages(0, index + 1)), false)?;
        let (Some((_, after_question)), Some((_, answered))) =
            (asked.split_once(PLACEHOLDER), answered.split_once(PLACEHOLDER))
        else {
            return Ok(None);
        };
        let Some(answer) = answered.strip_prefix(after_question) else { return Ok(None) };
        // Only text before the question may have moved, not text after it.
        Ok(prompt.ends_with(after_question).then(|| (prompt.clone(), answer.to_owned())))
    }

    /// Returns the first message of the window in which to render what follows the answer `previous`.
    fn window_start(&self, previous: usize) -> usize {
        if previous < WINDOW_TURNS {
            return 0;
        }
        // Windows advance in strides, so that most turns can reuse the previous rendering.
        let latest = previous - previous % (WINDOW_TURNS / 2) - WINDOW_TURNS / 2;
        (latest..previous)
            .find(|&index| self.messages[index].role == ChatRole::User)
            .or_else(|| {
                (latest..=previous).find(|&index| self.messages[index].role == ChatRole::Assistant)
            })
            .unwrap_or(0)
    }

    /// Returns the messages from `first` to before `end`, preceded by those that every conversation
    /// starts with: the system message, and a question if the window does not start with one.
    fn window_messages(&self, first: usize, end: usize) -> Vec<Value> {
        let values = &self.chat.messages;
        if first == 0 {
            return values[..end].to_vec();
        }
        let mut window = Vec::new();
        if self.messages[0].role == ChatRole::System {
            window.push(values[0].clone());
        }
        if self.messages[first].role != ChatRole::User {
            let question = (0..first).rfind(|&index| self.messages[index].role == ChatRole::User);
            window.extend(question.map(|index| values[index].clone()));
        }
        window.extend_from_slice(&values[first..end]);
        window
    }
}

/// Returns the length of the longest common prefix in bytes.
fn common_prefix(one: &str, other: &str) -> usize {
    one.chars().zip(other.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}
