//! Tests of files of every format, complete and damaged.

use std::{fs, path::Path};

use finetune_contract::{Split, testing::file_uri};
use io::Write;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{
    data::{files, records::*},
    store::{Environment, Role},
};

fn open(path: &Path) -> Store {
    let uri = file_uri(path);
    Store::open(&uri, None, Role::Dataset, &Environment::default()).unwrap()
}

fn lines(path: &Path) -> Result<Vec<String>, Failure> {
    let store = open(path);
    let mut lines = Vec::new();
    for file in files::list(&store, Split::Train)?.selected {
        for_each_record(&store, &file, &mut |line, _| {
            let text = line.text.unwrap_or_else(|reason| format!("error: {reason}"));
            lines.push(format!("{} {text}", line.location));
            Ok(())
        })?;
    }
    Ok(lines)
}

/// Reads one file of the given bytes.
fn check(name: &str, bytes: &[u8]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, bytes).unwrap();
    match lines(&path) {
        Ok(lines) => lines.join(" | "),
        Err(failure) => failure.to_string().replace(&directory.path().display().to_string(), ""),
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn accepts_the_line_endings_and_byte_order_marks_of_editors() {
    insta::assert_snapshot!(check("a.jsonl", b"\xEF\xBB\xBF{}\r\n\r\n  \n{1}\n{2}"), @"a.jsonl:1 {} | a.jsonl:4 {1} | a.jsonl:5 {2}");
}

#[test]
fn names_lines_that_are_no_text() {
    insta::assert_snapshot!(check("a.jsonl", b"{}\n\xFF\xFE\n{\0}\n{}"), @"a.jsonl:1 {} | a.jsonl:2 error: the row is not UTF-8 (byte 1) | a.jsonl:3 error: the row has a NUL byte: it is not JSON, or it is UTF-16 | a.jsonl:4 {}");
    insta::assert_snapshot!(check("a.jsonl", &[b"{}\n".as_slice(), &vec![b'a'; MAX_ROW_BYTES + 9], b"\n{}"].concat()), @"a.jsonl:1 {} | a.jsonl:2 error: the row is longer than 64 MiB | a.jsonl:3 {}");
}

#[test]
fn unpacks_gzip_and_zstd() {
    let rows = b"{}\n{1}\n";
    // Two members one after the other are one file, as `cat a.gz b.gz` makes.
    insta::assert_snapshot!(check("a.jsonl.gz", &[gzip(rows), gzip(b"{2}\n")].concat()), @"a.jsonl.gz:1 {} | a.jsonl.gz:2 {1} | a.jsonl.gz:3 {2}");
    insta::assert_snapshot!(check("a.jsonl.zst", &zstd::encode_all(rows.as_slice(), 3).unwrap()), @"a.jsonl.zst:1 {} | a.jsonl.zst:2 {1}");
}

#[test]
fn refuses_damaged_archives() {
    // Noise, so that the archive is longer than its first block.
    let rows: Vec<u8> = (0..20_000_u32)
        .flat_map(|row| format!("{{{}}}\n", row.wrapping_mul(2_654_435_761)).into_bytes())
        .collect();
    let (gzip, zstd) = (gzip(&rows), zstd::encode_all(rows.as_slice(), 3).unwrap());
    let without_line = |text: String| text.split_once(": ").map(|(_, reason)| reason.to_owned());
    insta::assert_snapshot!(without_line(check("a.jsonl.gz", &gzip[..gzip.len() / 2])).unwrap(), @"the file cannot be unpacked (incomplete deflate stream): it is truncated or damaged, or its name has the wrong extension");
    insta::assert_snapshot!(without_line(check("a.jsonl.zst", &zstd[..zstd.len() / 2])).unwrap(), @"the file cannot be unpacked (incomplete frame): it is truncated or damaged, or its name has the wrong extension");
    insta::assert_snapshot!(check("a.jsonl.gz", b"{}\n"), @"a.jsonl.gz:1: the file cannot be unpacked (unexpected end of file): it is truncated or damaged, or its name has the wrong extension");
    insta::assert_snapshot!(check("a.jsonl.zst", b"{}\n{}\n"), @"a.jsonl.zst:1: the file cannot be unpacked (Unknown frame descriptor): it is truncated or damaged, or its name has the wrong extension");
}

#[test]
fn stops_archives_that_unpack_without_end() {
    let endless = zstd::encode_all(io::repeat(b'a').take(80 << 20), 1).unwrap();
    insta::assert_snapshot!(check("a.jsonl.zst", &endless).split_once(": ").unwrap().1, @"the file cannot be unpacked (it unpacks to more than 200 times its size, so it cannot be text): it is truncated or damaged, or its name has the wrong extension");
}

#[test]
fn stops_reading_once_the_callback_fails() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.jsonl");
    fs::write(&path, "{1}\n{2}\n{3}\n").unwrap();
    let store = open(&path);
    let mut seen = 0;
    let result = for_each_record(
        &store,
        &files::list(&store, Split::Train).unwrap().selected[0],
        &mut |_, _| {
            seen += 1;
            if seen < 2 {
                return Ok(());
            }
            Err(Failure::new(FailureReason::DiskFull, "the disk is full"))
        },
    );
    assert_eq!((seen, result.unwrap_err().reason), (2, FailureReason::DiskFull));
}

#[test]
fn reads_every_data_file_below_a_prefix_in_order() {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in [("b.jsonl", "2"), ("a.jsonl", "1"), ("README.md", "no")] {
        fs::write(directory.path().join(name), text).unwrap();
    }
    fs::create_dir(directory.path().join("c")).unwrap();
    fs::write(directory.path().join("c/d.jsonl.gz"), gzip(b"3")).unwrap();
    insta::assert_snapshot!(lines(directory.path()).unwrap().join(" | "), @"a.jsonl:1 1 | b.jsonl:1 2 | c/d.jsonl.gz:1 3");
}

#[test]
fn says_what_a_data_file_is_called() {
    insta::assert_snapshot!(check("train.xlsx", b"PK"), @"file:///train.xlsx is not a data file: its name must end in .jsonl, .json, .csv, .tsv (each also with .gz or .zst) or .parquet");
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("README.md"), "").unwrap();
    let path = directory.path().display().to_string();
    insta::assert_snapshot!(lines(directory.path()).unwrap_err().to_string().replace(&path, "/data"), @"file:///data has no data files: it must name a file, or a prefix with files that end in .jsonl, .json, .csv, .tsv (each also with .gz or .zst) or .parquet");
}

#[test]
fn reads_an_array_of_rows_whatever_its_layout() {
    insta::assert_snapshot!(check("a.json", b"[\n  {\n    \"text\": \"a\"\n  },\n  {\"text\": \"]}\\\"{\"}\n]\n"), @r#"
a.json:2 {
    "text": "a"
  } | a.json:5 {"text": "]}\"{"}
"#);
    insta::assert_snapshot!(check("a.jsonl", b"\xEF\xBB\xBF[{\"text\": \"a\"},\r\n{\"text\": \"b\"}]"), @r#"a.jsonl:1 {"text": "a"} | a.jsonl:2 {"text": "b"}"#);
    insta::assert_snapshot!(check("a.json", b"[]"), @"");
    insta::assert_snapshot!(check("a.json", b"[{\"a\": [1, [2]]}, 3, \"x\", null]"), @r#"a.json:1 {"a": [1, [2]]} | a.json:1 3 | a.json:1 "x" | a.json:1 null"#);
    insta::assert_snapshot!(check("a.json", b"[{}]\n[{}]\n"), @"a.json:1 {} | a.json:2 {}");
    insta::assert_snapshot!(check("a.json.gz", &gzip(b"[{},\n{}]")), @"a.json.gz:1 {} | a.json.gz:2 {}");
}

#[test]
fn reads_objects_over_several_lines() {
    insta::assert_snapshot!(check("a.jsonl", b"{\n  \"text\": \"a\"\n}\n{\n  \"text\": \"b\"\n}\n"), @r#"
a.jsonl:1 {
  "text": "a"
} | a.jsonl:4 {
  "text": "b"
}
"#);
    insta::assert_snapshot!(check("a.json", b"{\"text\":\n\"a\"}\n{\"text\": \"b\"}"), @r#"
a.json:1 {"text":
"a"} | a.json:3 {"text": "b"}
"#);
    insta::assert_snapshot!(check("a.json", b"{\"data\": [\n{\"text\": \"a\"}\n]}"), @r#"
a.json:1 {"data": [
{"text": "a"}
]}
"#);
}

#[test]
fn a_broken_first_line_is_one_bad_row() {
    insta::assert_snapshot!(check("a.jsonl", b"{\"text\": \"a\"\n{\"text\": \"b\"}\n"), @r#"a.jsonl:1 {"text": "a" | a.jsonl:2 {"text": "b"}"#);
    insta::assert_snapshot!(check("a.jsonl", b"{\"text\": \"a\n{\"text\": \"b\"}\n"), @r#"a.jsonl:1 {"text": "a | a.jsonl:2 {"text": "b"}"#);
    insta::assert_snapshot!(check("a.jsonl", b"{\"text\": \"a\"}}\n{\"text\": \"b\"}\n"), @r#"a.jsonl:1 {"text": "a"}} | a.jsonl:2 {"text": "b"}"#);
    insta::assert_snapshot!(check("a.jsonl", b"text\n{}\n"), @"a.jsonl:1 text | a.jsonl:2 {}");
}

#[test]
fn says_that_an_array_is_cut_short() {
    insta::assert_snapshot!(check("a.json", b"[\n{\"text\": \"a\"},\n{\"text\": "), @"a.json:3: the file ends inside the row that begins on line 3: it is truncated, or a bracket or quotation mark is missing");
    insta::assert_snapshot!(check("a.json", b"[\n{\"text\": \"a\"}\n"), @"a.json:3: the file ends before its array is closed: it is truncated, or a bracket or quotation mark is missing");
    insta::assert_snapshot!(check("a.json", b"[{\"text\": \"a}]"), @"a.json:1: the file ends inside the row that begins on line 1: it is truncated, or a bracket or quotation mark is missing");
    insta::assert_snapshot!(check("a.json", b"[1, 2"), @"a.json:1: the file ends inside the row that begins on line 1: it is truncated, or a bracket or quotation mark is missing");
}

#[test]
fn reads_tables_of_text() {
    insta::assert_snapshot!(check("a.csv", b"prompt,completion,id\n\"a, \"\"b\"\"\nc\",d,\n e ,f,3\n"), @r#"a.csv:2 {"prompt":"a, \"b\"\nc","completion":"d","id":null} | a.csv:4 {"prompt":" e ","completion":"f","id":"3"}"#);
    insta::assert_snapshot!(check("a.tsv", b"prompt\tcompletion\na,b\tc\n"), @r#"a.tsv:2 {"prompt":"a,b","completion":"c"}"#);
    insta::assert_snapshot!(check("a.csv", b"\xEF\xBB\xBFprompt;completion\na,b;c\n"), @r#"a.csv:2 {"prompt":"a,b","completion":"c"}"#);
    insta::assert_snapshot!(check("a.csv.gz", &gzip(b"text\na\n")), @r#"a.csv.gz:2 {"text":"a"}"#);
    insta::assert_snapshot!(check("a.csv", b"text\n"), @"");
}

#[test]
fn says_what_is_wrong_with_a_table() {
    insta::assert_snapshot!(check("a.csv", b"prompt,completion\na,b,c\nd,e\nf\n"), @r#"a.csv:2 error: the row has 3 cells, but the first line has 2 keys: quote cells that contain the separator or a line break | a.csv:3 {"prompt":"d","completion":"e"} | a.csv:4 error: the row has 1 cells, but the first line has 2 keys: quote cells that contain the separator or a line break"#);
    insta::assert_snapshot!(check("a.csv", b"text,text\na,b\n"), @r#"a.csv:1: the first line has "text" twice: keep one"#);
    insta::assert_snapshot!(check("a.csv", b"text\n\xFF\n\"b\"\n"), @r#"a.csv:2 error: "text" is not UTF-8 (byte 1) | a.csv:3 {"text":"b"}"#);
    insta::assert_snapshot!(check("a.csv", b""), @"");
}

fn golden(name: &str) -> Vec<u8> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/data/records/golden");
    fs::read(directory.join(name)).unwrap()
}

#[test]
fn reads_nested_columns_in_every_compression() {
    insta::assert_snapshot!(check("a.parquet", &golden("messages-snappy.parquet")), @r#"a.parquet:1 {"messages":[{"role":"user","content":"hello","tool_calls":null},{"role":"assistant","content":null,"tool_calls":[{"name":"f","arguments":"{\"x\": 1}"}]},{"role":"tool","content":"2","tool_calls":null},{"role":"assistant","content":"☂ two","tool_calls":[]}],"id":1,"score":0.5,"at":"x"} | a.parquet:2 {"messages":[{"role":"user","content":"a\nb","tool_calls":null},{"role":"assistant","content":"c","tool_calls":null}],"id":2,"score":null,"at":null}"#);
    for compression in ["zstd", "gzip", "lz4"] {
        let bytes = golden(&format!("messages-{compression}.parquet"));
        assert_eq!(
            check("a.parquet", &bytes),
            check("a.parquet", &golden("messages-snappy.parquet"))
        );
    }
}

#[test]
fn damaged_parquet_is_said_to_be_damaged() {
    let whole = golden("messages-snappy.parquet");
    insta::assert_snapshot!(check("a.parquet", b"PAR1"), @"a.parquet:1: the file is not Parquet, or damaged: EOF: Parquet file too small. Size is 4 but need 8");
    insta::assert_snapshot!(check("a.parquet", &whole[..whole.len() / 2]), @"a.parquet:1: the file is not Parquet, or damaged: Parquet error: Invalid Parquet file. Corrupt footer");
    // Whatever byte is wrong: rows or a message, never a panic.
    for at in (0..whole.len()).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x5A;
        let said = check("a.parquet", &damaged);
        assert!(said.contains("a.parquet:"), "byte {at}: {said}");
    }
}

/// Generates rows that every format can represent: texts by key.
fn rows() -> impl Strategy<Value = Vec<[String; 2]>> {
    let text = prop_oneof!["\\PC{0,12}", "[\"\\\\\n\t ,;{}\\[\\]]{0,8}", Just("☂ 你好".to_owned())];
    prop::collection::vec(prop::array::uniform2(text), 1..6)
}

/// Reads a file's rows as JSON values.
fn values(name: &str, bytes: &[u8]) -> Vec<Value> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, bytes).unwrap();
    let store = open(&path);
    let mut values = Vec::new();
    let file = &files::list(&store, Split::Train).unwrap().selected[0];
    for_each_record(&store, file, &mut |record, _| {
        values.push(serde_json::from_str(&record.text.unwrap()).unwrap());
        Ok(())
    })
    .unwrap();
    values
}

proptest! {
    #[test]
    fn the_same_rows_are_read_from_every_kind_of_file(rows in rows()) {
        let row = |[prompt, completion]: &[String; 2], of: fn(&String) -> Value| {
            json!({"prompt": of(prompt), "completion": of(completion)})
        };
        let expected: Vec<Value> = rows.iter().map(|texts| row(texts, |text| json!(text))).collect();
        let jsonl: String = expected.iter().map(|row| format!("{row}\n")).collect();
        let spread: String = expected.iter().map(|row| format!("{row:#}\n")).collect();
        let array = Value::from(expected.clone());
        prop_assert_eq!(&values("a.jsonl", jsonl.as_bytes()), &expected);
        prop_assert_eq!(&values("a.jsonl", spread.as_bytes()), &expected);
        prop_assert_eq!(&values("a.json", array.to_string().as_bytes()), &expected);
        prop_assert_eq!(&values("a.json.gz", &gzip(format!("{array:#}").as_bytes())), &expected);
        // An empty cell is null.
        let of_cell = |text: &String| if text.is_empty() { Value::Null } else { json!(text) };
        let expected: Vec<Value> = rows.iter().map(|texts| row(texts, of_cell)).collect();
        for (name, delimiter) in [("a.csv", b','), ("a.csv", b';'), ("a.tsv", b'\t')] {
            let mut table = ::csv::WriterBuilder::new()
                .delimiter(delimiter)
                .quote_style(::csv::QuoteStyle::NonNumeric)
                .from_writer(Vec::new());
            table.write_record(["prompt", "completion"]).unwrap();
            for row in &rows {
                table.write_record(row).unwrap();
            }
            prop_assert_eq!(&values(name, &table.into_inner().unwrap()), &expected);
        }
    }

    #[test]
    fn no_bytes_make_a_reader_panic(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..60),
            "[\\[\\]{}\",:;\n\r\t0-9a-c\\\\ \u{feff}]{0,60}".prop_map(String::into_bytes),
        ],
        name in prop::sample::select(vec!["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.zst"]),
    ) {
        check(name, &bytes);
    }
}
