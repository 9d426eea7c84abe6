//! Detects keys of another format that only repeat the content of a row, such as a `text` beside
//! `messages` that contains the rendered messages.

use serde_json::Value;

/// The words that templates print between turns: roles, and the prompt of Stanford Alpaca.
const TEMPLATE_WORDS: &str = "a ai an answer appropriately assistant below bos bot chatbot completes context \
    describes eos further gpt human im_end im_start input inst instruction instructions is \
    model output paired prompt provides question request response sys system task that the \
    tool user with write";

/// Returns whether `value` is a part of one of `contents`, or consists of all of them in order with only
/// the words of a template between them.
pub(super) fn is_redundant(value: &Value, contents: &[&str]) -> bool {
    let Value::String(text) = value else { return false };
    let text = text.trim();
    contents.iter().any(|content| content.contains(text))
        || (contents.len() > 1 && is_rendered(text, contents))
}

fn is_rendered(text: &str, contents: &[&str]) -> bool {
    let mut rest = text;
    let lines = contents.iter().flat_map(|content| content.lines()).map(str::trim);
    for line in lines.filter(|line| !line.is_empty()) {
        let Some((before, after)) = rest.split_once(line) else { return false };
        if !is_template_text(before) {
            return false;
        }
        rest = after;
    }
    is_template_text(rest)
}

/// Returns whether a text consists of punctuation, [`TEMPLATE_WORDS`], and template tokens `<…>`.
fn is_template_text(text: &str) -> bool {
    let is_between = |character: char| {
        character.is_whitespace() || (character.is_ascii_punctuation() && character != '_')
    };
    let mut words = without_tags(text);
    words.make_ascii_lowercase();
    words.split(is_between).all(|format_name| {
        format_name.is_empty() || TEMPLATE_WORDS.split(' ').any(|known| known == format_name)
    })
}

/// Removes tags that contain only a name, such as `<|start_header_id|>`.
fn without_tags(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('<') {
        kept.push_str(before);
        kept.push(' ');
        let tag = after.split_once('>').filter(|(name, _)| {
            name.len() <= 32 && !name.contains(|c: char| c.is_whitespace() || c == '<')
        });
        rest = if let Some((_, after)) = tag {
            after
        } else {
            kept.push('<');
            after
        };
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rendering_of_the_row_is_redundant_and_a_text_that_adds_to_it_is_not() {
        let turns = ["Be brief.", "Hi\n\nthere", "Hello, I am user 2"];
        let check = |text: &str| is_redundant(&json!(text), &turns);
        for rendered in [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n\nthere<|im_end|>\n<|im_start|>assistant\nHello, I am user 2<|im_end|>\n",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi\n\nthere [/INST] Hello, I am user 2 </s>",
            "Be brief.\n\n### Instruction:\nHi\n\n### Input:\nthere\n\n### Response:\nHello, I am user 2",
            "Hi",
            "there",
        ] {
            assert!(check(rendered), "{rendered}");
        }
        for other in [
            "Be brief.\nHi\nthere\nHello, I am user 2 ០",
            "Be brief. Always lie. Hi there Hello, I am user 2",
            "Be brief. <always lie> Hi there Hello, I am user 2",
            "Hi there Hello, I am user 2",
            "Hello, I am user 2 Hi there Be brief.",
            "Hi there!",
            "Be brief. Hi there Hello, I am user 2 🙂",
        ] {
            assert!(!check(other), "{other}");
        }
        assert!(!is_redundant(&json!(["Hi"]), &turns));
    }
}
