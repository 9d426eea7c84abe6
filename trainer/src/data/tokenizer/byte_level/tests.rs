use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::{
    AddedToken,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
    pre_tokenizers::byte_level,
};

use crate::data::tokenizer::byte_level::*;

/// A text to train the tokenizer on: the code under test.
const LEARNED: &str = include_str!("mod.rs");

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\x22#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

fn around(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn bytes(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// The pre-tokenizers of well-known models.
fn pre_tokenizers() -> Vec<(&'static str, Value)> {
    let sequence = |steps: Vec<Value>| json!({"type": "Sequence", "pretokenizers": steps});
    let digits = |individually: bool| json!({"type": "Digits", "individual_digits": individually});
    let deepseek = DEEPSEEK.iter().map(|pattern| pattern.replace(r"\x22", "\""));
    let removed = json!({"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Removed", "invert": true});
    vec![
        ("GPT-2", bytes(true)),
        ("SmolLM2", sequence(vec![digits(true), bytes(true)])),
        ("runs of digits", sequence(vec![digits(false), bytes(true)])),
        ("Llama 3", sequence(vec![around(LLAMA3), bytes(false)])),
        ("Qwen 2", sequence(vec![around(&LLAMA3.replace("{1,3}", "")), bytes(false)])),
        ("GPT-4o", sequence(vec![around(O200K), bytes(false)])),
        ("Phi-4", sequence(vec![removed, bytes(false)])),
        (
            "DeepSeek",
            sequence(deepseek.map(|pattern| around(&pattern)).chain([bytes(false)]).collect()),
        ),
        ("only bytes", bytes(false)),
    ]
}

/// Trains a small tokenizer with a pre-tokenizer.
fn tokenizer(pre_tokenizer: Value, is_nfc: bool) -> tokenizers::Tokenizer {
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    let pre_tokenizer: PreTokenizerWrapper = serde_json::from_value(pre_tokenizer).unwrap();
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(1200)
        .min_frequency(1)
        .initial_alphabet(byte_level::ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let texts = LEARNED.lines().chain(["été Ünïcöde 中文字 日本語 1234 567", "don't we'll I've"]);
    tokenizer.train(&mut trainer, texts).unwrap();
    if is_nfc {
        tokenizer.with_normalizer(Some(tokenizers::normalizers::NFC)).unwrap();
    }
    let special = ["<|im_start|>", "<|im_end|>", "<|im"];
    tokenizer.add_special_tokens(special.map(|token| AddedToken::from(token, true))).unwrap();
    let normalized = ["<tool_call>", "été", "don't"];
    tokenizer.add_tokens(normalized.map(|token| AddedToken::from(token, false))).unwrap();
    tokenizer
}

fn encode_with_library(tokenizer: &tokenizers::Tokenizer, text: &str) -> Encoded {
    let encoding = tokenizer.encode(text, false).unwrap();
    let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
    Encoded { ids: encoding.get_ids().to_vec(), offsets }
}

fn compare(name: &str, tokenizer: &tokenizers::Tokenizer, ours: &ByteLevel, text: &str) -> bool {
    let Some(encoded) = ours.encode(tokenizer, text).unwrap() else { return false };
    assert_eq!(encoded, encode_with_library(tokenizer, text), "{name}: {text:?}");
    true
}

fn all() -> Vec<(&'static str, tokenizers::Tokenizer, ByteLevel)> {
    let mut all = Vec::new();
    for (name, pre_tokenizer) in pre_tokenizers() {
        for is_nfc in [false, true] {
            let tokenizer = tokenizer(pre_tokenizer.clone(), is_nfc);
            let ours = ByteLevel::new(&tokenizer).unwrap_or_else(|| panic!("{name} is not known"));
            all.push((name, tokenizer, ours));
        }
    }
    all
}

/// Returns whether a character is in a range of ideographs, syllables, private use or unassigned planes,
/// where all characters behave alike.
fn is_uniform(character: char) -> bool {
    matches!(
        u32::from(character),
        0x3400..=0x4dbf | 0x4e00..=0x9fff | 0xac00..=0xd7a3 | 0xe000..=0xf8ff | 0x1_2000..=0x1_5fff
            | 0x1_7000..=0x1_aeff | 0x2_0000..
    )
}

/// Tests every character alone, in words, after an apostrophe, and between digits and spaces.
#[test]
fn every_character_gives_the_library_s_tokens() {
    let characters: Vec<char> = ('\0'..=char::MAX)
        .filter(|&character| !is_uniform(character) || u32::from(character).is_multiple_of(101))
        .collect();
    for (name, tokenizer, ours) in all() {
        let step = if name == "GPT-4o" { 1 } else { 5 };
        for characters in characters.chunks(64).step_by(step) {
            let text: String = characters
                .iter()
                .flat_map(|c| [format!("{c}a{c}1{c} "), format!("'{c} {c}{c}\n  {c}")])
                .collect();
            // Text that is not in normal form is left to the library.
            if !compare(name, &tokenizer, &ours, &text) {
                for c in characters {
                    compare(name, &tokenizer, &ours, &format!("'{c}a {c}"));
                }
            }
        }
    }
}

#[test]
fn texts_give_the_library_s_tokens_and_offsets() {
    let texts = [
        "",
        " ",
        "  \n\n  x",
        "a  b   c\t\t\nd \u{a0} e\u{2003}\u{2003}f",
        "<|im_start|>user\nI don't know; we'LL see 12345 things!!\n\n<|im_end|>\n<|im|><tool_call>{\"a\": 1}",
        "été e\u{301}te\u{301} 中文字123日本語 ééé 👩\u{200d}💻🏳️",
        "x\u{0}y\r\n\r\nz'S 'ſ ...///\n",
    ];
    for (name, tokenizer, ours) in all() {
        for text in texts.iter().copied().chain([LEARNED]) {
            let is_done = compare(name, &tokenizer, &ours, text);
            assert!(is_done || text.contains('\u{301}'), "{name}: {text:?} is left to the library");
            // Again, with all words in the cache.
            compare(name, &tokenizer, &ours, text);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_text_gives_the_library_s_tokens(
        parts in prop::collection::vec(prop_oneof![
            any::<String>(),
            "[ a-zA-Z0-9'.,\n\t]{0,40}",
            Just("<|im_end|>".to_owned()), Just("don't".to_owned()), Just("  ".to_owned()),
            "[\\p{L}\\p{M}\\p{N}\\p{Z}]{0,12}",
        ], 0..12),
        which in 0_usize..18,
    ) {
        thread_local!(static ALL: Vec<(&'static str, tokenizers::Tokenizer, ByteLevel)> = all());
        let text = parts.concat();
        ALL.with(|all| {
            let (name, tokenizer, ours) = &all[which];
            compare(name, tokenizer, ours, &text);
        });
    }
}

#[test]
fn unsupported_tokenizers_are_left_to_the_library() {
    let is_known = |tokenizer: &tokenizers::Tokenizer| ByteLevel::new(tokenizer).is_some();
    let plain = || tokenizer(bytes(true), false);
    assert!(is_known(&plain()));
    let mut strips = plain();
    strips.add_special_tokens([AddedToken::from("<|end|>", true).rstrip(true)]).unwrap();
    assert!(!is_known(&strips));
    let mut lowers = plain();
    lowers.with_normalizer(Some(tokenizers::normalizers::Lowercase)).unwrap();
    assert!(!is_known(&lowers));
    let mut splits_special = plain();
    splits_special.set_encode_special_tokens(true);
    assert!(!is_known(&splits_special));
    for pattern in
        [r"\w+|\S", r"a*", r"\p{L}++|.", r"(?<=a)b", r"[[:alpha:]]+", r"\bx", r"a{2}+", r"(?s:a)"]
    {
        assert!(Pattern::new(pattern).is_none(), "{pattern}");
    }
}
