//! Renders conversations with templates that do unexpected things. Tests compare text in which trained
//! spans are in [brackets], rows are separated by ` // `, and line breaks are `⏎`.

use std::{fs, path::Path};

use finetune_contract::{Reasoning, RenderingSettings};
use serde_json::{Value, json};

use crate::{
    data::{
        chat::{
            goldens::{CHATML, show, tokenizer_json},
            rendering::Rendering,
            rendering_stats::RenderingStats,
        },
        conversation::{ChatRole, Conversation, Example, Message, ToolCall, WithoutTemplate},
        tokenizer::Tokenizer,
    },
    store::Environment,
};

/// A model directory with a template and other settings.
struct Model {
    directory: tempfile::TempDir,
    rendering: Rendering,
}

impl Model {
    fn new(template: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer_json("<s>", "</s>").to_string();
        fs::write(directory.path().join("tokenizer.json"), tokenizer).unwrap();
        let model = Self { directory, rendering: Rendering::of_model() };
        model.settings(
            json!({"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": template}),
        )
    }

    fn settings(self, settings: Value) -> Self {
        self.write("tokenizer_config.json", settings)
    }

    fn write(self, name: &str, value: Value) -> Self {
        fs::write(self.directory.path().join(name), value.to_string()).unwrap();
        self
    }

    fn reasoning(mut self, reasoning: Reasoning) -> Self {
        self.rendering.reasoning = reasoning;
        self
    }

    fn tokenizer(&self) -> Tokenizer {
        let directory: &Path = self.directory.path();
        Tokenizer::load(directory, &self.rendering).unwrap()
    }

    fn show(&self, example: &Example) -> String {
        show(&self.tokenizer(), example)
    }

    fn chat(&self, turns: &[(ChatRole, &str)]) -> String {
        self.show(&chat(turns))
    }

    /// Returns the date, if the template prints it for any of the examples.
    fn printed_date(&self, examples: &[Example]) -> Option<String> {
        let tokenizer = self.tokenizer();
        assert_eq!(tokenizer.printed_date(), None);
        for example in examples {
            tokenizer.tokenize(example).unwrap();
        }
        tokenizer.printed_date()
    }

    fn warnings(&self, examples: &[Example]) -> String {
        let tokenizer = self.tokenizer();
        let mut stats = RenderingStats::default();
        for example in examples {
            stats.add(&tokenizer.tokenize(example).unwrap());
        }
        stats.warnings(&tokenizer).join("\n")
    }
}

use ChatRole::{Assistant, System, Tool, User};

fn chat(turns: &[(ChatRole, &str)]) -> Example {
    let messages = turns.iter().map(|(role, content)| Message::new(*role, *content));
    Example::Chat(Conversation::new(messages.collect()))
}

/// As CHATML, but does not print the turns of the system and of tools.
const NO_SYSTEM: &str = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Drops the reasoning of every answer, as R1-Distill does; `OPENS` is the end of the generation
/// prompt.
const DROPS_REASONING: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% else %}\
    {{ '<|im_end|>' + m.content.split('</think>')[-1].strip() + eos_token }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_end|>OPENS' }}{% endif %}";

/// Puts the system prompt before the last question while that is the last message, as Mistral does.
const MOVES_SYSTEM: &str = include_str!("../../../tests/golden/templates/mistral_system.jinja");

/// Handles the system turn outside of its loop, as Qwen2.5 does.
const SYSTEM_OUTSIDE_LOOP: &str = "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}\
    {% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Prints tool calls, and the reasoning of the last turn only, as Qwen3 does.
const LAST_REASONING_ONLY: &str = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
    {% if m.reasoning_content and loop.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content }}\
    {% for call in m.tool_calls %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

#[test]
fn a_turn_that_the_template_leaves_out_is_refused() {
    let model = Model::new(NO_SYSTEM);
    let advice = "move it into the first user turn, or set dataset.chatTemplate to a template with a system turn";
    assert_eq!(
        model.chat(&[(System, "Talk like a pirate."), (User, "Hi"), (Assistant, "Ahoy")]),
        format!(
            "error: the chat template leaves out \"Talk like a pirate.\" of turn 0 (system), so the model would never see it: {advice}"
        )
    );
    let tool =
        model.chat(&[(User, "Hi"), (Assistant, "Wait"), (Tool, "42 degrees"), (Assistant, "Hot")]);
    assert!(tool.contains("\"42 degrees\" of turn 2 (tool)"), "{tool}");
    let cut = Model::new(
        "{% for m in messages %}{{ '<|im_start|>' + m.content[:4] + '<|im_end|>' }}{% endfor %}",
    );
    let cut = cut.chat(&[(User, "Hi"), (Assistant, "a long answer")]);
    assert!(
        cut.contains("\"a long answer\" of turn 1 (assistant), so it would not be trained on"),
        "{cut}"
    );
    let with_reasoning =
        Message { reasoning: Some("hm".to_owned()), ..Message::new(Assistant, "Yo") };
    let with_reasoning =
        Example::Chat(Conversation::new(vec![Message::new(User, "Hi"), with_reasoning]));
    let lost = Model::new(CHATML).show(&with_reasoning);
    assert!(
        lost.contains("leaves out the reasoning of turn 1 (assistant), so it would not be trained on: set dataset.reasoning to drop"),
        "{lost}"
    );
    let dropped = Model::new(CHATML).reasoning(Reasoning::Drop).show(&with_reasoning);
    assert!(dropped.ends_with("[Yo<|im_end|>]⏎"), "{dropped}");
    let trimmed = Model::new(
        "{% for m in messages %}{{ '<|im_start|>' + m.content | trim + '<|im_end|>' }}{% endfor %}",
    );
    assert_eq!(
        trimmed.chat(&[(User, " Hi\n"), (Assistant, "\n\nYo ")]),
        "<|im_start|>Hi<|im_end|><|im_start|>[Yo<|im_end|>]"
    );
}

#[test]
fn tools_and_calls_that_the_template_leaves_out_are_refused() {
    let call = |name: &str, arguments: Value| Message {
        tool_calls: vec![ToolCall { id: None, name: name.to_owned(), arguments }],
        ..Message::new(Assistant, "")
    };
    let conversation = |call: Message, tools: Vec<Value>| {
        Example::Chat(Conversation {
            tools,
            ..Conversation::new(vec![Message::new(User, "Hi"), call])
        })
    };
    let tool = json!({"type": "function", "function": {"name": "look_up"}});
    let example =
        conversation(call("look_up", json!({"key": "a \"b\"", "n": 1})), vec![tool.clone()]);
    let shown = Model::new(LAST_REASONING_ONLY).show(&example);
    assert!(shown.ends_with(r#"<|im_start|>assistant⏎[<tool_call>{"name": "look_up", "arguments": {"key": "a \"b\"", "n": 1}}</tool_call><|im_end|>]⏎"#), "{shown}");
    let lost = Model::new(CHATML).show(&conversation(call("look_up", json!({})), Vec::new()));
    assert!(lost.contains("leaves out the call of \"look_up\" of turn 1 (assistant)"), "{lost}");
    let lost = Model::new(CHATML).show(&conversation(Message::new(Assistant, "Yo"), vec![tool]));
    assert!(
        lost.contains("the chat template shows no tools, so the model would never see \"look_up\""),
        "{lost}"
    );
}

#[test]
fn reasoning_that_the_template_drops_is_trained_if_the_prompt_opens_it() {
    let turns = [(User, "Hi"), (Assistant, "<think>\nhm\n</think>\n\nYo")];
    let opens = DROPS_REASONING.replace("OPENS", "<think>\\n");
    assert_eq!(
        Model::new(&opens).chat(&turns),
        "<s><|im_start|>Hi<|im_end|><think>⏎[hm⏎</think>⏎⏎Yo<|im_end|>]"
    );
    let refused = Model::new(&DROPS_REASONING.replace("OPENS", "")).chat(&turns);
    assert!(refused.contains("leaves out \"hm\" of turn 1 (assistant)"), "{refused}");
    assert!(refused.contains("set dataset.reasoning to drop"), "{refused}");
    // Each of several turns becomes a row, because the first is later rendered without its reasoning.
    let two = [
        turns[0],
        (Assistant, "<think>\na\n</think>\n\nYo"),
        (User, "Bye"),
        (Assistant, "<think>\nb\n</think>\n\nCiao"),
    ];
    assert_eq!(
        Model::new(&opens).chat(&two),
        "<s><|im_start|>Hi<|im_end|><think>⏎[a⏎</think>⏎⏎Yo<|im_end|>] // <s><|im_start|>Hi<|im_end|>Yo<|im_end|><|im_start|>Bye<|im_end|><think>⏎[b⏎</think>⏎⏎Ciao<|im_end|>]"
    );
    // An answer that continues the open reasoning block of the prompt, as some datasets have it.
    let unopened = Model::new(&opens).chat(&[(User, "Hi"), (Assistant, "hm\n</think>\n\nYo")]);
    assert!(unopened.contains("leaves out \"hm\" of turn 1 (assistant)"), "{unopened}");
    let dropped = Model::new(&DROPS_REASONING.replace("OPENS", "")).reasoning(Reasoning::Drop);
    assert_eq!(dropped.chat(&turns), "<s><|im_start|>Hi<|im_end|>[Yo<|im_end|>]");
}

#[test]
fn an_answer_without_the_reasoning_that_the_prompt_opens_is_trained_with_a_warning() {
    let model = Model::new(&DROPS_REASONING.replace("OPENS", "<think>\\n"));
    assert_eq!(
        model.chat(&[(User, "Hi"), (Assistant, "Yo")]),
        "<s><|im_start|>Hi<|im_end|>[Yo<|im_end|>]"
    );
    // A template that appends and whose generation prompt opens a reasoning block, as that of QwQ.
    let appends = Model::new(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    );
    assert_eq!(
        appends.chat(&[(User, "Hi"), (Assistant, "<think>\nhm\n</think>\n\nYo")]),
        "<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎<think>⏎[hm⏎</think>⏎⏎Yo<|im_end|>]⏎"
    );
    let plain = chat(&[(User, "Hi"), (Assistant, "Yo"), (User, "Bye"), (Assistant, "Ciao")]);
    assert_eq!(
        appends.show(&plain),
        "<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎[Yo<|im_end|>]⏎<|im_start|>user⏎Bye<|im_end|>⏎<|im_start|>assistant⏎[Ciao<|im_end|>]⏎"
    );
    assert!(appends.warnings(&[plain]).contains("the answers of 1 of 1 conversations"));
    let warnings = model.warnings(&[chat(&[(User, "Hi"), (Assistant, "Yo")])]);
    assert!(warnings.contains(r#"the generation prompt ends with "<think>\n", but the answers of 1 of 1 conversations do not start with it"#), "{warnings}");
}

#[test]
fn a_template_that_drops_earlier_reasoning_gives_a_row_for_each_turn() {
    let assistant_with_reasoning = |with_reasoning: &str, content: &str| Message {
        reasoning: Some(with_reasoning.to_owned()),
        ..Message::new(Assistant, content)
    };
    let messages = vec![
        Message::new(User, "1?"),
        assistant_with_reasoning("a", "one"),
        Message::new(User, "2?"),
        assistant_with_reasoning("b", "two"),
    ];
    let example = Example::Chat(Conversation::new(messages.clone()));
    let model = Model::new(LAST_REASONING_ONLY);
    let first = "<|im_start|>user⏎1?<|im_end|>⏎<|im_start|>assistant⏎";
    let second = "<|im_start|>user⏎2?<|im_end|>⏎<|im_start|>assistant⏎";
    let rows = format!(
        "{first}[<think>⏎a⏎</think>⏎⏎one<|im_end|>]⏎ // {first}one<|im_end|>⏎{second}[<think>⏎b⏎</think>⏎⏎two<|im_end|>]⏎"
    );
    assert_eq!(model.show(&example), rows);
    let warnings = model.warnings(&[example.clone(), chat(&[(User, "Hi"), (Assistant, "Yo")])]);
    assert!(warnings.contains("1 of 2 conversations became 2 rows"), "{warnings}");
    // Only trained turns become rows, and without reasoning the template drops nothing.
    let mut last = messages;
    last[1].is_target = false;
    assert_eq!(
        model.show(&Example::Chat(Conversation::new(last))),
        rows.split(" // ").nth(1).unwrap()
    );
    let model = model.reasoning(Reasoning::Drop);
    assert_eq!(model.show(&example), format!("{first}[one<|im_end|>]⏎{second}[two<|im_end|>]⏎"));
    let model = model.reasoning(Reasoning::LastTurn);
    assert_eq!(
        model.show(&example),
        format!("{first}[one<|im_end|>]⏎{second}[<think>⏎b⏎</think>⏎⏎two<|im_end|>]⏎")
    );
}

#[test]
fn a_moved_system_prompt_is_where_a_server_puts_it() {
    let model = Model::new(MOVES_SYSTEM);
    assert_eq!(
        model.chat(&[(System, "Be kind"), (User, "Hi"), (Assistant, "Yo")]),
        "<s>[INST] Be kind⏎⏎Hi[/INST][ Yo<|im_end|>]"
    );
    assert_eq!(
        model.chat(&[
            (System, "Be kind"),
            (User, "Hi"),
            (Assistant, "Yo"),
            (User, "Bye"),
            (Assistant, "Ciao")
        ]),
        "<s>[INST] Be kind⏎⏎Hi[/INST][ Yo<|im_end|>] // <s>[INST] Hi[/INST] Yo<|im_end|>[INST] Be kind⏎⏎Bye[/INST][ Ciao<|im_end|>]"
    );
    // Only trained answers become rows, and without a system prompt nothing moves.
    let turns = [Message::new(User, "Hi"), Message::new(Assistant, "Yo")];
    let more = [Message::new(User, "Bye"), Message::new(Assistant, "Ciao")];
    let mut messages = [&[Message::new(System, "Be kind")], &turns[..], &more].concat();
    messages[2].is_target = false;
    assert_eq!(
        model.show(&Example::Chat(Conversation::new(messages))),
        "<s>[INST] Hi[/INST] Yo<|im_end|>[INST] Be kind⏎⏎Bye[/INST][ Ciao<|im_end|>]"
    );
    assert_eq!(
        model.show(&Example::Chat(Conversation::new([turns, more].concat()))),
        "<s>[INST] Hi[/INST][ Yo<|im_end|>][INST] Bye[/INST][ Ciao<|im_end|>]"
    );
}

#[test]
fn settings_decide_the_day_and_the_template() {
    let mut model = Model::new(
        "{{ 'It is ' + strftime_now('%d %b %Y') + '\n' }}{% for m in messages %}{{ m.content }}{% endfor %}",
    );
    let resolve = |chat_template: Option<String>, date: &str| {
        let settings = RenderingSettings {
            chat_template,
            reasoning: Reasoning::Keep,
            template_date: Some(date.to_owned()),
        };
        Rendering::resolve(&settings, &Environment::default())
    };
    let turns = [(User, "Hi"), (Assistant, "Yo")];
    model.rendering = resolve(None, "2026-01-31").unwrap();
    assert_eq!(model.chat(&turns), "It is 31 Jan 2026⏎Hi[Yo]");
    assert_eq!(model.printed_date(&[chat(&turns)]).as_deref(), Some("2026-01-31"));
    // A template given by its URI replaces that of the model and does not print the date.
    let path = model.directory.path().join("plain.jinja");
    fs::write(&path, "{% for m in messages %}<{{ m.content }}>{% endfor %}").unwrap();
    let uri = format!("file://{}", path.display());
    model.rendering = resolve(Some(uri.clone()), "2026-01-31").unwrap();
    assert_eq!(model.chat(&turns), "<Hi><[Yo>]");
    assert_eq!(model.printed_date(&[chat(&turns)]), None);
    for (template, date, said) in [
        (Some(format!("{uri}.absent")), "2026-01-31", "nothing is at file://"),
        (Some("chatlm".to_owned()), "2026-01-31", "neither a built-in template"),
        (None, "31.1.2026", "not a date such as 2026-01-31"),
    ] {
        let message = resolve(template, date).unwrap_err().message;
        assert!(message.contains(said), "{message}");
    }
}

/// The template always asks for the date but prints it only without a system turn, as Mistral Small.
#[test]
fn a_date_counts_where_it_is_printed() {
    let model = Model::new(
        "{% set today = strftime_now('%Y-%m-%d') %}{% if messages[0].role != 'system' %}It is {{ today }}.{% endif %}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    );
    let with_system = chat(&[(System, "Be kind"), (User, "Hi"), (Assistant, "Yo")]);
    let without = chat(&[(User, "Hi"), (Assistant, "Yo")]);
    assert_eq!(
        model.show(&with_system),
        "<|im_start|>Be kind<|im_end|><|im_start|>Hi<|im_end|><|im_start|>[Yo<|im_end|>]"
    );
    let text = Example::Text("It is today".to_owned());
    assert_eq!(model.printed_date(&[with_system.clone(), text]), None);
    let today = crate::runtime::clock::today().to_string();
    assert_eq!(model.printed_date(&[with_system, without]), Some(today));
}

#[test]
fn a_conversation_may_begin_with_the_assistant() {
    let turns = [(Assistant, "Welcome"), (User, "Hi"), (Assistant, "Yo")];
    assert_eq!(
        Model::new(SYSTEM_OUTSIDE_LOOP).chat(&turns),
        "<|im_start|>assistant⏎[Welcome<|im_end|>]⏎<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎[Yo<|im_end|>]⏎"
    );
    let with_system =
        [(System, "Be kind"), (Assistant, "Welcome"), (User, "Hi"), (Assistant, "Yo")];
    assert!(
        Model::new(SYSTEM_OUTSIDE_LOOP)
            .chat(&with_system)
            .contains("kind<|im_end|>⏎<|im_start|>assistant⏎[Welcome<|im_end|>]")
    );
}

#[test]
fn only_targets_are_trained() {
    let mut messages = vec![
        Message::new(User, "a"),
        Message::new(Assistant, "b"),
        Message::new(User, "c"),
        Message::new(Assistant, "d"),
    ];
    messages[1].is_target = false;
    let example = Example::Chat(Conversation::new(messages));
    let shown = "<|im_start|>user⏎a<|im_end|>⏎<|im_start|>assistant⏎b<|im_end|>⏎<|im_start|>user⏎c<|im_end|>⏎<|im_start|>assistant⏎[d<|im_end|>]⏎";
    assert_eq!(Model::new(SYSTEM_OUTSIDE_LOOP).show(&example), shown);
    let marked = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}";
    let shown_marked = Model::new(marked).show(&example);
    assert!(
        shown_marked.contains("assistant⏎b<|im_end|>") && shown_marked.contains("[d<|im_end|>]"),
        "{shown_marked}"
    );
}

#[test]
fn already_rendered_text_is_refused_unless_the_format_is_prerendered() {
    let (prompt, completion) = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n".to_owned(),
        "Yo<|im_end|>".to_owned(),
    );
    let model = Model::new(CHATML);
    let refused = model.show(&Example::PromptCompletion {
        prompt: prompt.clone(),
        completion: completion.clone(),
    });
    assert!(
        refused.contains("turn 0 (user) contains \"<|im_start|>\"")
            && refused.contains("set dataset.format to prerendered"),
        "{refused}"
    );
    let refused = model.chat(&[(User, "Hi"), (Assistant, "Yo<|im_end|>")]);
    assert!(refused.contains("turn 1 (assistant) contains \"<|im_end|>\""), "{refused}");
    assert_eq!(
        model.show(&Example::Prerendered { prompt, completion }),
        "<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎[Yo<|im_end|>]"
    );
    // Anywhere: in a system prompt, reasoning, a tool response, a call or a tool.
    let hot = [(User, "Hi"), (Assistant, "Wait"), (Tool, "<|im_start|>"), (Assistant, "Hot")];
    let with_reasoning =
        Message { reasoning: Some("<|im_end|>".to_owned()), ..Message::new(Assistant, "Yo") };
    let call =
        ToolCall { id: None, name: "f".to_owned(), arguments: json!({"a": ["x<|im_end|>"]}) };
    let call = Message { tool_calls: vec![call], ..Message::new(Assistant, "") };
    let talk = |last: Message, tools: Vec<Value>| {
        let messages = vec![Message::new(User, "Hi"), last];
        Example::Chat(Conversation { tools, ..Conversation::new(messages) })
    };
    let tool = json!({"name": "f", "description": "<|im_start|>"});
    for (example, place) in [
        (chat(&[(System, "Be<|im_end|>kind"), (User, "Hi"), (Assistant, "Yo")]), "turn 0 (system)"),
        (chat(&hot), "turn 2 (tool)"),
        (talk(with_reasoning, Vec::new()), "turn 1 (assistant)"),
        (talk(call, Vec::new()), "turn 1 (assistant)"),
        (talk(Message::new(Assistant, "Yo"), vec![tool]), "tools"),
    ] {
        let refused = model.show(&example);
        assert!(refused.contains(&format!("error: {place} contains \"<|im_")), "{refused}");
    }
    let bos = Model::new(DROPS_REASONING).chat(&[(User, "<s>Hi"), (Assistant, "Yo")]);
    assert!(bos.contains("turn 0 (user) contains \"<s>\""), "{bos}");
    // Special tokens that this template does not print are allowed.
    assert!(
        model.chat(&[(User, "What is <|eot_id|>?"), (Assistant, "Yo")]).contains("[Yo<|im_end|>]")
    );
}

#[test]
fn bos_is_never_doubled() {
    let model = Model::new("").settings(json!({"bos_token": "<s>", "eos_token": "</s>"}));
    for text in ["Once", "<s>Once", "<s>Once</s>"] {
        assert_eq!(model.show(&Example::Text(text.to_owned())), "<s>[Once</s>]");
    }
    let pair = |prompt: &str| Example::PromptCompletion {
        prompt: prompt.to_owned(),
        completion: "4".to_owned(),
    };
    assert_eq!(model.show(&pair("<s>2+2=")), "<s>2+2=[4</s>]");
    assert_eq!(model.show(&pair("2+2=")), "<s>2+2=[4</s>]");
}

#[test]
fn an_end_of_turn_that_does_not_stop_generation_is_a_warning() {
    let one = [chat(&[(User, "Hi"), (Assistant, "Yo")])];
    let ends = |generation: Value| {
        Model::new(CHATML).write("generation_config.json", generation).warnings(&one)
    };
    let im_end = Model::new(CHATML).tokenizer().encode("<|im_end|>", false).unwrap()[0];
    assert_eq!(ends(json!({"eos_token_id": [im_end]})), "");
    assert_eq!(ends(json!({})), "");
    let warning = ends(json!({"eos_token_id": 259}));
    assert!(
        warning.contains(&format!(
            "answers end with \"<|im_end|>\" (token {im_end}), but generation stops at \"</s>\""
        )),
        "{warning}"
    );
    // Still, nothing after the end of a turn is trained on.
    let model = Model::new(CHATML).write("generation_config.json", json!({"eos_token_id": 259}));
    assert!(model.show(&one[0]).ends_with("[Yo<|im_end|>]⏎"));
    let open =
        Model::new("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}");
    assert!(
        open.warnings(&one).contains("no answer ends with a token at which generation stops"),
        "{}",
        open.warnings(&one)
    );
}

#[test]
fn instructions_train_base_models_too() {
    let model = Model::new("").settings(json!({"bos_token": "<s>", "eos_token": "</s>"}));
    let conversation =
        Conversation::new(vec![Message::new(User, "Add 2 and 2"), Message::new(Assistant, "4")]);
    let example = Example::Chat(Conversation {
        without_template: WithoutTemplate::AlpacaPrompt { input: None },
        ..conversation.clone()
    });
    assert_eq!(
        model.show(&example),
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.⏎⏎### Instruction:⏎Add 2 and 2⏎⏎### Response:⏎[4</s>]"
    );
    for (name, shown) in [
        ("vicuna", "USER: Add 2 and 2 ASSISTANT:[ 4</s>]"),
        ("chatml", "<|im_start|>user⏎Add 2 and 2<|im_end|>⏎<|im_start|>assistant⏎[4<|im_end|>]⏎"),
        ("alpaca", "### Instruction:⏎Add 2 and 2⏎⏎### Response:⏎[4</s>]"),
    ] {
        let settings = RenderingSettings {
            chat_template: Some(name.to_owned()),
            ..RenderingSettings::default()
        };
        let named = Model {
            rendering: Rendering::resolve(&settings, &Environment::default()).unwrap(),
            ..Model::new("").settings(json!({"bos_token": "<s>", "eos_token": "</s>"}))
        };
        let found = named.show(&Example::Chat(conversation.clone()));
        assert!(found.ends_with(shown), "{name}: {found}");
    }
    let refused = model.show(&Example::Chat(conversation));
    assert!(
        refused.contains(
            "set dataset.chatTemplate (to chatml, alpaca, vicuna, a template's text or its URI)"
        ),
        "{refused}"
    );
}

#[test]
fn a_token_that_is_declared_beside_the_tokenizer_ends_turns() {
    let model = Model::new("").settings(json!({
        "eos_token": "<|done|>",
        "added_tokens_decoder": {
            "481": {"content": "<|turn|>", "special": true}, "482": {"content": "<|done|>", "special": true},
        },
        "chat_template": "{% for m in messages %}{{ '<|turn|>' + m.role + '\n' + m.content + '<|done|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}",
    }));
    assert_eq!(
        model.chat(&[(User, "hello"), (Assistant, "world")]),
        "<|turn|>user⏎hello<|done|>⏎<|turn|>assistant⏎[world<|done|>]⏎"
    );
    let tokenizer = model.tokenizer();
    let first = tokenizer.vocab_size() - 2;
    assert_eq!(tokenizer.encode("<|turn|><|done|>", false).unwrap(), [first, first + 1]);
    assert!(tokenizer.is_stop_token(first + 1));
}

/// Every answer's end of turn is trained on, and the time does not grow quadratically.
#[test]
fn many_turns_are_one_row_for_every_kind_of_template() {
    let marked = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}";
    for template in [CHATML, SYSTEM_OUTSIDE_LOOP, marked, MOVES_SYSTEM] {
        let tokenizer = Model::new(template).tokenizer();
        let seconds = |pairs: usize| {
            let pair = |index: usize| {
                let said = |role, what| Message::new(role, format!("{what} {index}"));
                [said(User, "question"), said(Assistant, "answer")]
            };
            let example = Example::Chat(Conversation::new((0..pairs).flat_map(pair).collect()));
            let started = crate::runtime::clock::now();
            let tokenized = tokenizer.tokenize(&example).unwrap();
            let elapsed = started.elapsed().as_secs_f64();
            assert_eq!(tokenized.rows.len(), 1, "{template}");
            let ends = tokenizer.encode("<|im_end|>", false).unwrap()[0];
            let row = &tokenized.rows[0];
            let tokens = row.tokens.iter().zip(&row.targets);
            let trained = tokens.filter(|&(&token, &is_target)| is_target && token == ends);
            assert_eq!(trained.count(), pairs, "{template}");
            elapsed
        };
        let fastest = |pairs: usize| (0..3).map(|_| seconds(pairs)).fold(f64::INFINITY, f64::min);
        let (short, long) = (fastest(100), fastest(1000));
        assert!(
            long < 30.0 * short.max(0.01),
            "{template}: {short} s, ten times the turns {long} s"
        );
    }
}

#[test]
fn time_grows_with_the_turns_and_not_with_their_square() {
    let turns = |count: usize| {
        let turn = |index: usize| match index % 3 {
            0 => Message::new(User, format!("question {index}")),
            1 => Message {
                tool_calls: vec![ToolCall { id: None, name: "f".to_owned(), arguments: json!({}) }],
                ..Message::new(Assistant, format!("calling {index}"))
            },
            _ => Message::new(Assistant, format!("answer {index}")),
        };
        Example::Chat(Conversation::new((0..count).map(turn).collect()))
    };
    let tokenizer = Model::new(LAST_REASONING_ONLY).tokenizer();
    let seconds = |count: usize| {
        let example = turns(count);
        let started = crate::runtime::clock::now();
        let tokenized = tokenizer.tokenize(&example).unwrap();
        assert_eq!(tokenized.rows.len(), 1);
        let ends = tokenizer.encode("<|im_end|>", false).unwrap()[0];
        let row = &tokenized.rows[0];
        let trained = row
            .tokens
            .iter()
            .zip(&row.targets)
            .filter(|&(&token, &is_target)| is_target && token == ends)
            .count();
        assert_eq!(trained, count / 3 * 2);
        started.elapsed().as_secs_f64()
    };
    // The fastest of several runs, because the machine may be busy. Ten times the turns must take far
    // less than a hundred times the time.
    let fastest = |count: usize| (0..4).map(|_| seconds(count)).fold(f64::INFINITY, f64::min);
    let (short, long) = (fastest(300), fastest(3000));
    assert!(long < 30.0 * short.max(0.01), "300 turns took {short} s, 3,000 took {long} s");
}
