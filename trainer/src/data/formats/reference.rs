//! `docs/ROWS.md`, written from the table of keys.

use crate::data::formats::keys::{Fate, KNOWN, Known, Place};

const HEAD: &str = "# Rows

What a row may say. This page is written from the table by which rows are read (`trainer/src/data/formats/keys.rs`), and a test compares them.

- A key is used, known to say nothing about what is trained on, or refused. A key that is not below is refused too, once for each key, with the number of rows and the first place. List it in `dataset.ignoredKeys` if nothing of it is to be trained on.
- `null`, `\"\"`, `[]` and `{}` are absent, wherever they stand. Nulls inside tools and arguments are left out: tables fill what a row does not have with them. To keep one, write arguments as JSON text.
- A key of another format beside the row's own is accepted if it only repeats what the row says: a part of a turn, or all of them as a template renders them.
- The format is that of the first row: `messages`, `conversations`, `instruction`, a prompt with its completion, or `text`. Lists may be JSON text, as CSV files have them.
- `function_call` and `tool_call` as a turn's role mean that its text is the JSON of calls; `observation`, `function` and `tool_response` are what a tool returned. Calls are trained on, what tools return never is.
- A model without a chat template reads `instruction` rows with the prompt of Stanford Alpaca, and a prompt with its completion one after the other.
";

/// Renders the page.
pub(super) fn page() -> String {
    let mut page = HEAD.to_owned();
    for (place, title) in [
        (Place::Row, "A row"),
        (Place::Turn, "A turn"),
        (Place::Part, "A part of a turn's content"),
        (Place::Call, "A tool call"),
    ] {
        page += &format!("\n## {title}\n\n| keys | | |\n|---|---|---|\n");
        for known in KNOWN.iter().filter(|known| known.place == place) {
            page += &line(known);
        }
    }
    page
}

fn line(known: &Known) -> String {
    let names = known.names.iter().filter(|name| !name.is_empty());
    let names = names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let fate = match known.fate {
        Fate::Used(formats) if known.place == Place::Row => {
            let formats: Vec<String> =
                formats.iter().map(|format| crate::data::formats::word(*format)).collect();
            format!("used in {}", formats.join(", "))
        }
        Fate::Used(_) => "used".to_owned(),
        Fate::Harmless => "harmless".to_owned(),
        Fate::Refused => "refused".to_owned(),
    };
    format!("| {names} | {fate} | {} |\n", known.note)
}

#[test]
fn the_page_is_written_from_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/ROWS.md");
    if std::fs::read_to_string(path).unwrap_or_default() != page() {
        std::fs::write(path, page()).unwrap();
        panic!("docs/ROWS.md was stale and is written anew: review and commit it");
    }
}
