//! Whether a key of another format says again what a row says already, as `text` beside `messages` does
//! where someone rendered the turns.

use serde_json::Value;

/// Words that a template writes between turns: who speaks, and the prompt of Stanford Alpaca.
const FRAME: &str = "a ai an answer appropriately assistant below bos bot chatbot completes context \
    describes eos further gpt human im_end im_start input inst instruction instructions is \
    model output paired prompt provides question request response sys system task that the \
    tool user with write";

/// Tells whether `value` is a part of one of `contents`, or all of them in their order with nothing but
/// a template's words between.
pub(super) fn repeats(value: &Value, contents: &[&str]) -> bool {
    let Value::String(text) = value else { return false };
    let text = text.trim();
    contents.iter().any(|content| content.contains(text))
        || (contents.len() > 1 && renders(text, contents))
}

fn renders(text: &str, contents: &[&str]) -> bool {
    let mut rest = text;
    let lines = contents.iter().flat_map(|content| content.lines()).map(str::trim);
    for line in lines.filter(|line| !line.is_empty()) {
        let Some((before, after)) = rest.split_once(line) else { return false };
        if !is_frame(before) {
            return false;
        }
        rest = after;
    }
    is_frame(rest)
}

/// Tells whether a text is punctuation and words of [`FRAME`]; `<…>` is a token of a template.
fn is_frame(text: &str) -> bool {
    let is_between = |character: char| {
        character.is_whitespace() || (character.is_ascii_punctuation() && character != '_')
    };
    let mut words = without_tags(text);
    words.make_ascii_lowercase();
    words
        .split(is_between)
        .all(|word| word.is_empty() || FRAME.split(' ').any(|known| known == word))
}

/// Leaves out `<…>` with nothing but a name in it, such as `<|start_header_id|>`.
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
    fn what_was_rendered_from_the_row_is_told_from_what_says_more() {
        let turns = ["Be brief.", "Hi\n\nthere", "Hello, I am user 2"];
        let check = |text: &str| repeats(&json!(text), &turns);
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
        assert!(!repeats(&json!(["Hi"]), &turns));
    }
}
