//! What `cargo test` prints, read line by line: which test binary came to what.

use std::path::Path;

/// What one test binary came to.
#[derive(Debug, PartialEq)]
pub(crate) struct Part {
    /// The crate and its kind of test.
    pub name: String,
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed; one if the binary died, for nobody knows of the others.
    pub failed: u64,
    /// How long they took.
    pub seconds: f64,
}

impl Part {
    /// Returns whether there was no test in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.passed + self.failed == 0
    }
}

/// A reader of the runner's lines, in the order they are printed.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// The binaries that have ended.
    pub parts: Vec<Part>,
    /// Lines of tests that said they were skipped.
    pub skipped: Vec<String>,
    running: Option<String>,
    is_failure_text: bool,
}

impl Reader {
    /// Reads a line and tells whether it is worth showing.
    pub(crate) fn read(&mut self, line: &str) -> bool {
        if let Some(name) = parse_start(line) {
            self.finish();
            self.running = Some(name);
            return true;
        }
        if let Some((passed, failed, seconds)) = parse_result(line) {
            let name = self.running.take().unwrap_or_default();
            self.parts.push(Part { name, passed, failed, seconds });
            self.is_failure_text = false;
            return true;
        }
        if line.starts_with("SKIPPED") {
            self.skipped.push(line.to_owned());
            return true;
        }
        self.is_failure_text |= line == "failures:" || line.starts_with("error: ");
        // What tests print when they pass would bury what matters.
        self.running.is_none() || self.is_failure_text || line.starts_with("test ")
    }

    /// Ends the part that is running: it has died, since it did not say what it came to.
    pub(crate) fn finish(&mut self) {
        if let Some(name) = self.running.take() {
            let name = format!("{name}, died");
            self.parts.push(Part { name, passed: 0, failed: 1, seconds: 0.0 });
        }
        self.is_failure_text = false;
    }
}

/// Reads `Running unittests src/lib.rs (target/release/deps/finetune_contract-0123456789abcdef)`
/// and `Doc-tests finetune_contract`.
fn parse_start(line: &str) -> Option<String> {
    let line = line.trim_start();
    if let Some(name) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{name}, documentation"));
    }
    let (what, binary) = line.strip_prefix("Running ")?.strip_suffix(')')?.rsplit_once(" (")?;
    let binary = Path::new(binary).file_name()?.to_string_lossy();
    let (binary, _hash) = binary.rsplit_once('-')?;
    let what = what.strip_prefix("unittests ").unwrap_or(what);
    Some(format!("{binary}, {what}"))
}

/// Reads `test result: ok. 3 passed; 0 failed; 0 ignored; …; finished in 0.01s`.
fn parse_result(line: &str) -> Option<(u64, u64, f64)> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |word: &str| {
        let before = rest.split(word).next()?;
        before.trim_end().rsplit([' ', ';']).next()?.parse().ok()
    };
    let seconds = rest.rsplit("finished in ").next()?.trim_end_matches('s').parse().ok()?;
    Some((number(" passed")?, number(" failed")?, seconds))
}

#[cfg(test)]
mod tests {
    use super::{Part, Reader};

    const CONTRACT: &str = "     Running unittests src/lib.rs (target/release/deps/finetune_contract-3fa9f6a8c3303213)";
    const STORE: &str =
        "     Running tests/store/main.rs (target/release/deps/store-72525dbe2472af73)";

    fn read(lines: &[&str]) -> Reader {
        let mut reader = Reader::default();
        for line in lines {
            reader.read(line);
        }
        reader.finish();
        reader
    }

    #[test]
    fn gives_each_binary_its_own_result() {
        let reader = read(&[
            CONTRACT,
            "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.25s",
            STORE,
            "SKIPPED store on S3: FINETUNE_TEST_S3_ENDPOINT is not set",
            "test result: FAILED. 7 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.50s",
        ]);
        let part = |name: &str, passed, failed, seconds| Part {
            name: name.to_owned(),
            passed,
            failed,
            seconds,
        };
        assert_eq!(
            reader.parts,
            [
                part("finetune_contract, src/lib.rs", 12, 0, 1.25),
                part("store, tests/store/main.rs", 7, 2, 0.5)
            ]
        );
        assert_eq!(reader.skipped.len(), 1);
    }

    #[test]
    fn counts_a_binary_that_died_as_failed() {
        let reader = read(&[CONTRACT, "test a ... ok", STORE, "test b ... ok"]);
        let failed: Vec<u64> = reader.parts.iter().map(|part| part.failed).collect();
        assert_eq!(failed, [1, 1]);
        assert_eq!(reader.parts[0].name, "finetune_contract, src/lib.rs, died");
    }

    #[test]
    fn shows_what_a_failing_test_printed_and_hides_what_a_passing_one_did() {
        let mut reader = Reader::default();
        let mut is_shown = |line: &str| reader.read(line);
        assert!(is_shown("   Compiling finetune-contract v0.1.0"));
        assert!(is_shown(CONTRACT));
        assert!(is_shown("test a ... ok"));
        assert!(!is_shown("a chatty test"));
        assert!(is_shown("failures:"));
        assert!(is_shown("assertion failed: 1 == 2"));
    }
}
