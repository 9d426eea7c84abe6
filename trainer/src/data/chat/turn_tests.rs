//! Conversations that templates do unexpected things with, as text with what is trained on in
//! [brackets]; rows are separated by ` // `, line breaks are `⏎`.

use std::{fs, path::Path};

use finetune_contract::{Reasoning, RenderingSettings};
use serde_json::{Value, json};

use crate::{
    data::{
        chat::{
            goldens::{CHATML, show, tokenizer_json},
            rendered::Rendered,
            rendering::Rendering,
        },
        conversation::{ChatRole, Conversation, Example, Message, ToolCall, WithoutTemplate},
        tokenizer::Tokenizer,
    },
    store::Environment,
};

/// A model's directory with a template, and what else its settings say.
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

    /// Returns the date, if it is printed for any of these.
    fn printed_date(&self, examples: &[Example]) -> Option<String> {
        let tokenizer = self.tokenizer();
        assert_eq!(tokenizer.printed_date(), None);
        for example in examples {
            tokenizer.tokenize(example).unwrap();
        }
        tokenizer.printed_date()
    }

    fn remarks(&self, examples: &[Example]) -> String {
        let tokenizer = self.tokenizer();
        let mut rendered = Rendered::default();
        for example in examples {
            rendered.add(&tokenizer.tokenize(example).unwrap());
        }
        rendered.remarks(&tokenizer).join("\n")
    }
}

use ChatRole::{Assistant, System, Tool, User};

fn chat(turns: &[(ChatRole, &str)]) -> Example {
    let messages = turns.iter().map(|(role, content)| Message::new(*role, *content));
    Example::Chat(Conversation::new(messages.collect()))
}

/// As CHATML, but the system's turns and the tools' are not printed.
const NO_SYSTEM: &str = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Cuts thoughts out of every answer, as R1-Distill does; `OPENS` is where it opens one.
const CUTS: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% else %}\
    {{ '<|im_end|>' + m.content.split('</think>')[-1].strip() + eos_token }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_end|>OPENS' }}{% endif %}";

/// Mistral's: the system prompt stands before the last question, while that is the last message.
const MOVES_SYSTEM: &str = include_str!("../../../tests/golden/templates/mistral_system.jinja");

/// Asks who begins outside of its loop, as Qwen2.5 does.
const ASKS_FIRST: &str = "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}\
    {% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Prints thoughts and calls, and thoughts of earlier turns not at all, as Qwen3 does.
const FORGETS: &str = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
    {% if m.reasoning_content and loop.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content }}\
    {% for call in m.tool_calls %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

#[test]
fn a_turn_that_the_template_leaves_out_is_refused() {
    let model = Model::new(NO_SYSTEM);
    let advice = "put it into the first user turn, or set dataset.chatTemplate to a template with a system turn";
    assert_eq!(
        model.chat(&[(System, "Talk like a pirate."), (User, "Hi"), (Assistant, "Ahoy")]),
        format!(
            "error: the chat template leaves \"Talk like a pirate.\" of turn 0 (system) out, so the model would never see it: {advice}"
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
        cut.contains("\"a long answer\" of turn 1 (assistant) out, so it would not be trained on"),
        "{cut}"
    );
    let thought = Message { reasoning: Some("hm".to_owned()), ..Message::new(Assistant, "Yo") };
    let thought = Example::Chat(Conversation::new(vec![Message::new(User, "Hi"), thought]));
    let lost = Model::new(CHATML).show(&thought);
    assert!(
        lost.contains("leaves the reasoning of turn 1 (assistant) out, so it would not be trained on: set dataset.reasoning to drop"),
        "{lost}"
    );
    let dropped = Model::new(CHATML).reasoning(Reasoning::Drop).show(&thought);
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
    let shown = Model::new(FORGETS).show(&example);
    assert!(shown.ends_with(r#"<|im_start|>assistant⏎[<tool_call>{"name": "look_up", "arguments": {"key": "a \"b\"", "n": 1}}</tool_call><|im_end|>]⏎"#), "{shown}");
    let lost = Model::new(CHATML).show(&conversation(call("look_up", json!({})), Vec::new()));
    assert!(lost.contains("leaves the call of \"look_up\" of turn 1 (assistant) out"), "{lost}");
    let lost = Model::new(CHATML).show(&conversation(Message::new(Assistant, "Yo"), vec![tool]));
    assert!(
        lost.contains("the chat template shows no tools, so the model would never see \"look_up\""),
        "{lost}"
    );
}

#[test]
fn a_thought_that_the_template_cuts_is_trained_where_the_prompt_opens_it() {
    let turns = [(User, "Hi"), (Assistant, "<think>\nhm\n</think>\n\nYo")];
    let opens = CUTS.replace("OPENS", "<think>\\n");
    assert_eq!(
        Model::new(&opens).chat(&turns),
        "<s><|im_start|>Hi<|im_end|><think>⏎[hm⏎</think>⏎⏎Yo<|im_end|>]"
    );
    let refused = Model::new(&CUTS.replace("OPENS", "")).chat(&turns);
    assert!(refused.contains("leaves \"hm\" of turn 1 (assistant) out"), "{refused}");
    assert!(refused.contains("set dataset.reasoning to drop"), "{refused}");
    // Of several turns each is a row of its own, for the first is printed without its thought later.
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
    // An answer that goes on where the prompt ends, as some write it.
    let unopened = Model::new(&opens).chat(&[(User, "Hi"), (Assistant, "hm\n</think>\n\nYo")]);
    assert!(unopened.contains("leaves \"hm\" of turn 1 (assistant) out"), "{unopened}");
    let dropped = Model::new(&CUTS.replace("OPENS", "")).reasoning(Reasoning::Drop);
    assert_eq!(dropped.chat(&turns), "<s><|im_start|>Hi<|im_end|>[Yo<|im_end|>]");
}

#[test]
fn an_answer_without_the_thought_that_the_prompt_opens_is_trained_and_remarked_on() {
    let model = Model::new(&CUTS.replace("OPENS", "<think>\\n"));
    assert_eq!(
        model.chat(&[(User, "Hi"), (Assistant, "Yo")]),
        "<s><|im_start|>Hi<|im_end|>[Yo<|im_end|>]"
    );
    // A template that only appends, and opens a thought for the answer, as QwQ's does.
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
    assert!(appends.remarks(&[plain]).contains("the answers of 1 of 1 conversations"));
    let remarks = model.remarks(&[chat(&[(User, "Hi"), (Assistant, "Yo")])]);
    assert!(remarks.contains(r#"the generation prompt ends in "<think>\n", which the answers of 1 of 1 conversations do not begin with"#), "{remarks}");
}

#[test]
fn a_template_that_forgets_thoughts_gives_a_row_for_each_turn() {
    let thinking = |thought: &str, content: &str| Message {
        reasoning: Some(thought.to_owned()),
        ..Message::new(Assistant, content)
    };
    let messages = vec![
        Message::new(User, "1?"),
        thinking("a", "one"),
        Message::new(User, "2?"),
        thinking("b", "two"),
    ];
    let example = Example::Chat(Conversation::new(messages.clone()));
    let model = Model::new(FORGETS);
    let first = "<|im_start|>user⏎1?<|im_end|>⏎<|im_start|>assistant⏎";
    let second = "<|im_start|>user⏎2?<|im_end|>⏎<|im_start|>assistant⏎";
    let rows = format!(
        "{first}[<think>⏎a⏎</think>⏎⏎one<|im_end|>]⏎ // {first}one<|im_end|>⏎{second}[<think>⏎b⏎</think>⏎⏎two<|im_end|>]⏎"
    );
    assert_eq!(model.show(&example), rows);
    let remarks = model.remarks(&[example.clone(), chat(&[(User, "Hi"), (Assistant, "Yo")])]);
    assert!(remarks.contains("1 of 2 conversations became 2 rows"), "{remarks}");
    // Only what is trained on becomes a row, and without thoughts nothing is forgotten.
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
fn a_system_prompt_that_moves_is_where_a_server_puts_it() {
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
    // Only where an answer is trained on is there a row, and without a system prompt nothing moves.
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
    // Named by its URI, a template takes the place of the model's, which is not asked for a date.
    let path = model.directory.path().join("plain.jinja");
    fs::write(&path, "{% for m in messages %}<{{ m.content }}>{% endfor %}").unwrap();
    let uri = format!("file://{}", path.display());
    model.rendering = resolve(Some(uri.clone()), "2026-01-31").unwrap();
    assert_eq!(model.chat(&turns), "<Hi><[Yo>]");
    assert_eq!(model.printed_date(&[chat(&turns)]), None);
    for (template, date, said) in [
        (Some(format!("{uri}.absent")), "2026-01-31", "nothing is at file://"),
        (Some("chatlm".to_owned()), "2026-01-31", "no built-in template"),
        (None, "31.1.2026", "no date such as 2026-01-31"),
    ] {
        let message = resolve(template, date).unwrap_err().message;
        assert!(message.contains(said), "{message}");
    }
}

/// Asks for the day in any case, as Mistral Small does, and prints it where there is no system turn.
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
        Model::new(ASKS_FIRST).chat(&turns),
        "<|im_start|>assistant⏎[Welcome<|im_end|>]⏎<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎[Yo<|im_end|>]⏎"
    );
    let with_system =
        [(System, "Be kind"), (Assistant, "Welcome"), (User, "Hi"), (Assistant, "Yo")];
    assert!(
        Model::new(ASKS_FIRST)
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
    assert_eq!(Model::new(ASKS_FIRST).show(&example), shown);
    let marked = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}";
    let shown_marked = Model::new(marked).show(&example);
    assert!(
        shown_marked.contains("assistant⏎b<|im_end|>") && shown_marked.contains("[d<|im_end|>]"),
        "{shown_marked}"
    );
}

#[test]
fn text_that_is_rendered_already_is_refused_or_taken_as_it_is() {
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
    // In whatever place: a system prompt, a thought, a tool's answer, a call, a tool.
    let hot = [(User, "Hi"), (Assistant, "Wait"), (Tool, "<|im_start|>"), (Assistant, "Hot")];
    let thought =
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
        (talk(thought, Vec::new()), "turn 1 (assistant)"),
        (talk(call, Vec::new()), "turn 1 (assistant)"),
        (talk(Message::new(Assistant, "Yo"), vec![tool]), "tools"),
    ] {
        let refused = model.show(&example);
        assert!(refused.contains(&format!("error: {place} contains \"<|im_")), "{refused}");
    }
    let bos = Model::new(CUTS).chat(&[(User, "<s>Hi"), (Assistant, "Yo")]);
    assert!(bos.contains("turn 0 (user) contains \"<s>\""), "{bos}");
    // Tokens that this template does not use are only text to it.
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
fn an_end_of_turn_at_which_generation_goes_on_is_remarked_on() {
    let one = [chat(&[(User, "Hi"), (Assistant, "Yo")])];
    let ends = |generation: Value| {
        Model::new(CHATML).write("generation_config.json", generation).remarks(&one)
    };
    let im_end = Model::new(CHATML).tokenizer().encode("<|im_end|>", false).unwrap()[0];
    assert_eq!(ends(json!({"eos_token_id": [im_end]})), "");
    assert_eq!(ends(json!({})), "");
    let remark = ends(json!({"eos_token_id": 259}));
    assert!(
        remark.contains(&format!(
            "answers end with \"<|im_end|>\" (token {im_end}), but generation stops at \"</s>\""
        )),
        "{remark}"
    );
    // Nothing after it is trained on all the same.
    let model = Model::new(CHATML).write("generation_config.json", json!({"eos_token_id": 259}));
    assert!(model.show(&one[0]).ends_with("[Yo<|im_end|>]⏎"));
    let open =
        Model::new("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}");
    assert!(
        open.remarks(&one).contains("no answer ends with a token at which generation stops"),
        "{}",
        open.remarks(&one)
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
    assert!(tokenizer.stops_at(first + 1));
}

/// As many ends of turns are trained on as there are answers, and in time that is no square of them.
#[test]
fn many_turns_are_one_row_for_every_kind_of_template() {
    let marked = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}";
    for template in [CHATML, ASKS_FIRST, marked, MOVES_SYSTEM] {
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
    let tokenizer = Model::new(FORGETS).tokenizer();
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
    // The fastest of some, for a machine may be busy; ten times the turns, and never a hundred times.
    let fastest = |count: usize| (0..4).map(|_| seconds(count)).fold(f64::INFINITY, f64::min);
    let (short, long) = (fastest(300), fastest(3000));
    assert!(long < 30.0 * short.max(0.01), "300 turns took {short} s, 3,000 took {long} s");
}
