//! Generates `docs/ROWS.md` from the table of keys.

use crate::data::formats::keys::{KEY_RULES, KeyRule, KeyScope, KeyUse};

const HEAD: &str = "# Rows

The keys that a row may have. This page is generated from the table with which rows are parsed (`trainer/src/data/formats/keys.rs`); a test compares the two.

- A key is used, ignored because it does not affect training, or refused. A key that is not listed below is refused, too; the message has the number of rows and the location of the first. To drop such a key, list it in `dataset.ignoredKeys`.
- `null`, `\"\"`, `[]` and `{}` count as absent everywhere. Nulls inside tools and arguments are removed, because nested columns contain them for absent values. To keep a null, give the arguments as JSON text.
- A key of another format is accepted if it only repeats the content of the row: a part of a turn, or all turns as a template renders them.
- The first row determines the format: `messages`, `conversations`, `instruction`, a prompt with its completion, or `text`. Lists may be JSON text, as in CSV files.
- If the role of a turn is `function_call` or `tool_call`, its text is the JSON of calls; `observation`, `function` and `tool_response` are responses of tools. Calls are trained on, responses of tools never are.
- For a model without a chat template, `instruction` rows are rendered with the prompt of Stanford Alpaca, and a prompt and its completion are concatenated.
";

/// Renders the page.
pub(super) fn page() -> String {
    let mut page = HEAD.to_owned();
    for (scope, title) in [
        (KeyScope::Row, "A row"),
        (KeyScope::Turn, "A turn"),
        (KeyScope::Part, "A content part of a turn"),
        (KeyScope::Call, "A tool call"),
    ] {
        page += &format!("\n## {title}\n\n| keys | use | meaning |\n|---|---|---|\n");
        for known in KEY_RULES.iter().filter(|known| known.scope == scope) {
            page += &line(known);
        }
    }
    page
}

fn line(known: &KeyRule) -> String {
    let names = known.names.iter().filter(|name| !name.is_empty());
    let names = names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let key_use = match known.key_use {
        KeyUse::Used(formats) if known.scope == KeyScope::Row => {
            let formats: Vec<String> =
                formats.iter().map(|format| crate::data::formats::format_name(*format)).collect();
            format!("used in {}", formats.join(", "))
        }
        KeyUse::Used(_) => "used".to_owned(),
        KeyUse::Ignored => "ignored".to_owned(),
        KeyUse::Refused => "refused".to_owned(),
    };
    format!("| {names} | {key_use} | {} |\n", known.note)
}

#[test]
fn the_page_is_written_from_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/ROWS.md");
    if std::fs::read_to_string(path).unwrap_or_default() != page() {
        std::fs::write(path, page()).unwrap();
        panic!("docs/ROWS.md was out of date and has been regenerated: review and commit it");
    }
}
