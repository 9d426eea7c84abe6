//! Tests of rows of every format: the parsed content, and the errors.

use crate::data::formats::*;

/// Formats the parsed row: messages as `role=content`, targets in brackets.
fn check_with(text: &str, options: &ReadOptions) -> String {
    let (format, example) = match read(text, options) {
        Ok(read) => read,
        Err(errors) => {
            return errors.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | ");
        }
    };
    let Example::Chat(Conversation { messages, tools, variables, .. }) = example else {
        return format!("{format:?}: {example:?}");
    };
    let mut shown: Vec<String> = messages.iter().map(show).collect();
    if !tools.is_empty() {
        shown.push(format!("tools={}", Value::from(tools)));
    }
    if !variables.is_empty() {
        shown.push(format!("variables={}", Value::from(variables)));
    }
    format!("{format:?}: {}", shown.join(" "))
}

fn show(message: &crate::data::conversation::Message) -> String {
    let serialized = serde_json::to_value(message).unwrap();
    let mut messages = message.content.clone();
    for key in ["reasoning_content", "tool_calls", "tool_call_id", "name"] {
        if let Some(value) = serialized.get(key) {
            messages += &format!("({key}: {value})");
        }
    }
    let role = message.role.as_str();
    if message.is_target { format!("[{role}={messages}]") } else { format!("{role}={messages}") }
}

fn check(text: &str) -> String {
    check_with(text, &ReadOptions::for_format(DatasetFormat::Auto))
}

fn check_as(text: &str, format: DatasetFormat) -> String {
    check_with(text, &ReadOptions::for_format(format))
}

/// Parses a question and an answer with additional keys in the turn of the answer.
fn answer(extra: &str) -> String {
    check(&format!(
        r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b", {extra}}}]}}"#
    ))
}

/// Parses a question and an answer with additional keys in the row.
fn beside(extra: &str) -> String {
    check(&format!(
        r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}}], {extra}}}"#
    ))
}

#[test]
fn finds_every_shape_by_its_keys() {
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#), @"Sharegpt: user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"instruction": "a", "input": "x", "output": "b"}"#), @r#"
Alpaca: user=a

x [assistant=b]
"#);
    insta::assert_snapshot!(check(r#"{"prompt": "a", "completion": "b"}"#), @r#"PromptCompletion: PromptCompletion { prompt: "a", completion: "b" }"#);
    insta::assert_snapshot!(check(r#"{"text": "a"}"#), @r#"Text: Text("a")"#);
    insta::assert_snapshot!(check_as(r#"{"prompt": "<u>a<a>", "completion": "b</a>"}"#, DatasetFormat::Prerendered), @r#"Prerendered: Prerendered { prompt: "<u>a<a>", completion: "b</a>" }"#);
    insta::assert_snapshot!(check_as(r#"{"text": "<u>a<a>b</a>"}"#, DatasetFormat::Prerendered), @r#"Prerendered: Prerendered { prompt: "", completion: "<u>a<a>b</a>" }"#);
}

#[test]
fn reads_shapes_that_differ_by_a_name() {
    insta::assert_snapshot!(check(r#"{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#), @"Sharegpt: user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"messages": [{"from": "user", "value": "a"}, {"from": "chatgpt", "value": "b"}]}"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"conversation": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}, {"from": "user", "value": "c"}, {"from": "bard", "value": "d"}]}"#), @"Sharegpt: user=a [assistant=b] user=c [assistant=d]");
    insta::assert_snapshot!(check(r#"{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#), @"PromptCompletion: system=s user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], "completion": "d"}"#), @"PromptCompletion: user=a assistant=b user=c [assistant=d]");
    insta::assert_snapshot!(check(r#"{"question": "a", "answer": "b"}"#), @r#"PromptCompletion: PromptCompletion { prompt: "a", completion: "b" }"#);
    insta::assert_snapshot!(check(r#"{"query": "a", "response": "b"}"#), @r#"PromptCompletion: PromptCompletion { prompt: "a", completion: "b" }"#);
    insta::assert_snapshot!(check(r#"{"prompt": "a", "response": "b"}"#), @r#"PromptCompletion: PromptCompletion { prompt: "a", completion: "b" }"#);
    insta::assert_snapshot!(check(r#"{"instruction": "a", "context": "x", "response": "b", "category": "open_qa"}"#), @r#"
Alpaca: user=a

x [assistant=b]
"#);
    insta::assert_snapshot!(check(r#"{"messages": "[{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]"}"#), @"Messages: user=a [assistant=b]");
}

#[test]
fn a_system_prompt_beside_the_turns_is_the_first_turn() {
    insta::assert_snapshot!(beside(r#""system": "s""#), @"Messages: system=s user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"system_prompt": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#), @"Sharegpt: system=s user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"system": "s", "prompt": "a", "completion": "b"}"#), @"PromptCompletion: system=s user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"system": "s", "instruction": "a", "output": "b"}"#), @"Alpaca: system=s user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"system": "s", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#), @"Messages: system=s user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"system": "s", "messages": [{"role": "system", "content": "other"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#), @"the row has a system prompt and a different one as its first turn: keep one");
    insta::assert_snapshot!(beside(r#""system": "s", "system_message": "other""#), @r#""system_message" and another key give different system prompts: keep one"#);
    insta::assert_snapshot!(beside(r#""system": 3"#), @r#""system" is 3, but it must be a string"#);
    insta::assert_snapshot!(beside(r#""system": """#), @"Messages: user=a [assistant=b]");
}

#[test]
fn earlier_turns_of_alpaca_come_first_and_are_trained_on() {
    insta::assert_snapshot!(check(r#"{"instruction": "c", "input": "", "output": "d", "history": [["a", "b"], ["x", "y"]], "system": "s"}"#), @"Alpaca: system=s user=a [assistant=b] user=x [assistant=y] user=c [assistant=d]");
    insta::assert_snapshot!(check(r#"{"instruction": "c", "output": "d", "history": []}"#), @"Alpaca: user=c [assistant=d]");
    insta::assert_snapshot!(check(r#"{"instruction": "c", "output": "d", "history": null}"#), @"Alpaca: user=c [assistant=d]");
    insta::assert_snapshot!(check(r#"{"instruction": "c", "output": "d", "history": [["a"]]}"#), @"history[0]: it must be a list of a question and its answer");
    insta::assert_snapshot!(check(r#"{"instruction": "c", "output": "d", "history": [["a", ""]]}"#), @"history[0]: the answer is empty");
    insta::assert_snapshot!(check(r#"{"instruction": "c", "output": "d", "history": "a"}"#), @r#""history" is "a", but it must be a list"#);
    insta::assert_snapshot!(check(r#"{"instruction": "Name two.", "input": "Of them", "output": "b", "text": "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nName two.\n\n### Input:\nOf them\n\n### Response:\nb"}"#), @r"
    Alpaca: user=Name two.

    Of them [assistant=b]
    ");
    insta::assert_snapshot!(check(r#"{"instruction": "a", "input": "", "output": "b", "text": "something else"}"#), @r#""text" is not used in rows of the format alpaca, so its content would be lost: remove it, or list it in dataset.ignoredKeys"#);
}

#[test]
fn marks_say_which_turns_are_trained_on() {
    insta::assert_snapshot!(answer(r#""weight": 1"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 0}]}"#), @"Messages: user=a [assistant=b] user=c assistant=d");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": false}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "train": true}]}"#), @"Messages: user=a assistant=b user=c [assistant=d]");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": false}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "loss_mask": 1}]}"#), @"Messages: user=a assistant=b user=c [assistant=d]");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "masked": true}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "masked": false, "trainable": true}]}"#), @"Messages: user=a assistant=b user=c [assistant=d]");
    insta::assert_snapshot!(answer(r#""weight": 0"#), @"every assistant turn is marked not to be trained on, so there is nothing to train on");
    insta::assert_snapshot!(answer(r#""weight": 1, "train": false"#), @r#"messages[1]: "weight" and "train" contradict each other: keep one"#);
    insta::assert_snapshot!(answer(r#""masked": true, "loss": true"#), @r#"messages[1]: "loss" and "masked" contradict each other: keep one"#);
    insta::assert_snapshot!(answer(r#""weight": 0.5"#), @r#"messages[1]: "weight" is 0.5: only 0, 1, false and true are supported, because a turn is either trained on or not"#);
    insta::assert_snapshot!(answer(r#""train": "no""#), @r#"messages[1]: "train" is "no": only 0, 1, false and true are supported, because a turn is either trained on or not"#);
    insta::assert_snapshot!(answer(r#""loss_scale": 1.0"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a", "train": true}, {"role": "assistant", "content": "b"}]}"#), @"messages[0]: the turn is marked to be trained on, but its role is user: only turns of the assistant can be trained on; remove the mark");
    insta::assert_snapshot!(beside(r#""mask": "User""#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(beside(r#""mask": "Assistant""#), @r#""mask" is "Assistant", but only the user's turns can be left out that way: mark turns with "weight": 0 instead"#);
    insta::assert_snapshot!(answer(r#""train_detail": [{"begin_offset": 0}]"#), @r#"messages[1]: "train_detail" cannot be used: a turn is trained on completely or not at all: split it into several turns, or mark the whole turn"#);
}

#[test]
fn only_the_last_turn_is_trained_on_if_asked_for() {
    let options =
        ReadOptions { train_on: TrainOn::LastTurn, ..ReadOptions::for_format(DatasetFormat::Auto) };
    let turns = |last: &str| {
        check_with(
            &format!(
                r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}}, {{"role": "user", "content": "c"}}, {{"role": "assistant", "content": "d"{last}}}]}}"#
            ),
            &options,
        )
    };
    insta::assert_snapshot!(turns(""), @"Messages: user=a assistant=b user=c [assistant=d]");
    insta::assert_snapshot!(turns(r#", "weight": 0"#), @"the last assistant turn is marked not to be trained on, and dataset.trainOn is lastTurn, so there is nothing to train on");
    insta::assert_snapshot!(check_with(r#"{"instruction": "c", "output": "d", "history": [["a", "b"]]}"#, &options), @"Alpaca: user=a assistant=b user=c [assistant=d]");
    insta::assert_snapshot!(check_with(r#"{"prompt": "a", "completion": "b"}"#, &options), @r#"PromptCompletion: PromptCompletion { prompt: "a", completion: "b" }"#);
}

#[test]
fn nulls_are_absent() {
    insta::assert_snapshot!(answer(r#""weight": null, "train": null, "tool_calls": null, "function_call": null, "reasoning_content": null, "name": null, "refusal": null, "audio": null, "anything": null"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(beside(r#""system": null, "tools": null, "images": null, "rejected": null, "label": null, "prompt": null, "anything": null"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(check(r#"{"messages": null, "text": "a"}"#), @r#"Text: Text("a")"#);
    insta::assert_snapshot!(check(r#"{"prompt": null, "question": "a", "completion": null, "answer": "b"}"#), @r#"PromptCompletion: PromptCompletion { prompt: "a", completion: "b" }"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a", "from": null}, {"role": "assistant", "content": null}]}"#), @"messages[1]: the assistant's content is empty");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]}"#), @"Messages: user= [assistant=b]");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": null, "content": "a"}]}"#), @r#"messages[0]: "role" is null: a turn needs a role"#);
    insta::assert_snapshot!(check(r#"{"prompt": "a", "completion": null}"#), @r#""completion" is null, but it must be a string"#);
    insta::assert_snapshot!(check(r#"{"instruction": "a", "input": null, "output": "b", "history": null, "system": null}"#), @"Alpaca: user=a [assistant=b]");
}

#[test]
fn parts_of_text_are_joined_and_others_refused() {
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "c", "image_url": null}]}, {"role": "assistant", "content": ["b", {"text": "d"}]}]}"#), @r#"
Messages: user=a
c [assistant=b
d]
"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "output_text", "text": "b", "annotations": []}]}]}"#), @r#"Messages: user=a [assistant=b(reasoning_content: "hm")]"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, {"role": "assistant", "content": "b"}]}"#), @r#"messages[0]: content[0]: a content part has the type "image_url", but only text can be trained on: remove the row, or replace the part by text"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "x"}]}, {"role": "assistant", "content": "b"}]}"#), @r#"messages[0]: content[0]: the key "image" is unknown, so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "b"}]}"#), @r#"messages[0]: content[0]: "text" is missing"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": [3]}, {"role": "assistant", "content": "b"}]}"#), @r#"messages[0]: content[0]: "content" is 3, but it must be a string"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": {"text": "a"}}, {"role": "assistant", "content": "b"}]}"#), @r#"messages[0]: "content" is an object, but it must be a string"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": []}]}"#), @"messages[1]: the assistant's content is empty");
}

#[test]
fn reads_tool_calls_tools_and_what_tools_return() {
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "2"}, {"role": "assistant", "content": "b"}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": null}}}], "parallel_tool_calls": false}"#), @r#"Messages: user=a [assistant=(tool_calls: [{"id":"1","type":"function","function":{"name":"f","arguments":{"x":1}}}])] tool=2(tool_call_id: "1") [assistant=b] tools=[{"type":"function","function":{"name":"f","parameters":{"z":1}}}]"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": null}}, {"function": {"name": "g", "arguments": ""}}]}], "tools": "[{\"name\": \"f\"}]"}"#), @r#"Messages: user=a [assistant=(tool_calls: [{"type":"function","function":{"name":"f","arguments":{"x":1}}},{"type":"function","function":{"name":"g","arguments":{}}}])] tools=[{"type":"function","function":{"name":"f"}}]"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}}, {"role": "function", "name": "f", "content": "2"}], "functions": [{"name": "f"}]}"#), @r#"Messages: user=a [assistant=(tool_calls: [{"type":"function","function":{"name":"f","arguments":{}}}])] tool=2(name: "f") tools=[{"type":"function","function":{"name":"f"}}]"#);
    insta::assert_snapshot!(check(r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"}, {"from": "observation", "value": "2"}, {"from": "gpt", "value": "b"}], "tools": "[]"}"#), @r#"Sharegpt: user=a [assistant=(tool_calls: [{"type":"function","function":{"name":"f","arguments":{"x":1}}}])] tool=2 [assistant=b]"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "tool_call", "content": "[{\"name\": \"f\"}, {\"name\": \"g\"}]"}, {"role": "tool_response", "content": "2"}, {"role": "assistant", "content": "b"}]}"#), @r#"Messages: user=a [assistant=(tool_calls: [{"type":"function","function":{"name":"f","arguments":{}}},{"type":"function","function":{"name":"g","arguments":{}}}])] tool=2 [assistant=b]"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "let me see", "weight": 0, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, {"role": "assistant", "content": "b"}]}"#), @r#"Messages: user=a assistant=let me see(tool_calls: [{"type":"function","function":{"name":"f","arguments":{}}}]) [assistant=b]"#);
}

#[test]
fn says_what_is_wrong_with_tools() {
    insta::assert_snapshot!(answer(r#""tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]"#), @r#"messages[1]: tool_calls[0]: "arguments" is "{x", which is not JSON (key must be a string at line 1 column 2): give the arguments as an object or its JSON text"#);
    insta::assert_snapshot!(answer(r#""tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]"#), @r#"messages[1]: tool_calls[0]: "arguments" is [1], but it must be an object"#);
    insta::assert_snapshot!(answer(r#""tool_calls": [{"function": {"arguments": {}}}]"#), @r#"messages[1]: tool_calls[0]: "name" is missing"#);
    insta::assert_snapshot!(answer(r#""tool_calls": [{"id": 1, "function": {"name": "f"}}]"#), @r#"messages[1]: tool_calls[0]: "id" is 1, but it must be a string"#);
    insta::assert_snapshot!(answer(r#""tool_calls": [{"type": "custom", "function": {"name": "f"}}]"#), @r#"messages[1]: tool_calls[0]: the call has the type "custom": only functions are supported"#);
    insta::assert_snapshot!(answer(r#""tool_calls": [{"function": {"name": "f", "arguments": {"x": 12345678901234567890123}}}]"#), @r#"messages[1]: tool_calls[0]: "arguments" has an integer of more than 19 digits, which would be rounded: give it as a string"#);
    insta::assert_snapshot!(answer(r#""tool_calls": [{"function": {"name": "f", "result": "2"}}]"#), @r#"messages[1]: tool_calls[0]: the key "result" is unknown, so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on"#);
    insta::assert_snapshot!(answer(r#""tool_calls": "f()""#), @r#"messages[1]: "tool_calls" is "f()", but it must be a list"#);
    insta::assert_snapshot!(answer(r#""tool_calls": [3]"#), @"messages[1]: tool_calls[0]: 3 is not a tool call: it must be an object");
    insta::assert_snapshot!(answer(r#""tool_calls": [{"name": "f"}], "function_call": {"name": "g"}"#), @r#"messages[1]: "tool_calls" and "function_call" both list calls: keep one"#);
    insta::assert_snapshot!(beside(r#""tools": "f""#), @r#""tools" is "f", but it must be a list"#);
    insta::assert_snapshot!(beside(r#""tools": [{"type": "function"}]"#), @r#"tools[0]: the tool's function has no "name""#);
    insta::assert_snapshot!(beside(r#""tools": [3]"#), @"tools[0]: 3 is not a tool: it must be an object");
    insta::assert_snapshot!(beside(r#""tools": [{"type": "retrieval", "function": {"name": "f"}}]"#), @r#"tools[0]: the tool has the type "retrieval": only functions are supported"#);
    insta::assert_snapshot!(beside(r#""tools": [{"name": "f"}], "functions": [{"name": "f"}]"#), @r#""tools" and "functions" both list tools: keep one"#);
    insta::assert_snapshot!(check(r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(1)"}]}"#), @r#"conversations[1]: the turn is a function call, but its text is not the JSON of a call: {"name": …, "arguments": {…}}"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, {"role": "assistant", "content": "b"}]}"#), @"messages[0]: the turn has tool calls, but its role is user: only turns of the assistant can have them");
}

#[test]
fn reasoning_is_read_under_each_of_its_names() {
    insta::assert_snapshot!(answer(r#""reasoning_content": "hm""#), @r#"Messages: user=a [assistant=b(reasoning_content: "hm")]"#);
    insta::assert_snapshot!(answer(r#""reasoning": "hm""#), @r#"Messages: user=a [assistant=b(reasoning_content: "hm")]"#);
    insta::assert_snapshot!(answer(r#""thinking": "hm""#), @r#"Messages: user=a [assistant=b(reasoning_content: "hm")]"#);
    insta::assert_snapshot!(answer(r#""reasoning": "hm", "reasoning_content": "hm""#), @r#"Messages: user=a [assistant=b(reasoning_content: "hm")]"#);
    insta::assert_snapshot!(answer(r#""reasoning": "hm", "thinking": "other""#), @r#"messages[1]: "thinking" and another key give different reasoning for one turn: keep one"#);
    insta::assert_snapshot!(answer(r#""reasoning": {"text": "hm"}"#), @r#"messages[1]: "reasoning" is an object, but it must be a string"#);
    insta::assert_snapshot!(answer(r#""reasoning_details": [{"text": "hm"}]"#), @r#"messages[1]: "reasoning_details" cannot be used: reasoning must be one text: give it as "reasoning_content""#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a", "reasoning": "hm"}, {"role": "assistant", "content": "b"}]}"#), @"messages[0]: the turn has reasoning, but its role is user: only turns of the assistant can have them");
    insta::assert_snapshot!(beside(r#""reasoning": "hm""#), @r#""reasoning" cannot be used: reasoning belongs to a turn: move it into the assistant's turn as "reasoning_content""#);
    insta::assert_snapshot!(check(r#"{"prompt": "a", "completion": "b", "thinking": "hm"}"#), @r#""thinking" cannot be used: reasoning belongs to a turn: move it into the assistant's turn as "reasoning_content""#);
}

#[test]
fn what_would_change_the_meaning_is_refused_by_name() {
    insta::assert_snapshot!(check(r#"{"prompt": "a", "completion": "b", "label": false}"#), @r#""label" is false: it marks a bad answer, which must not be trained on; remove the row"#);
    insta::assert_snapshot!(check(r#"{"prompt": "a", "completion": "b", "label": true}"#), @r#"PromptCompletion: PromptCompletion { prompt: "a", completion: "b" }"#);
    insta::assert_snapshot!(beside(r#""label": false"#), @r#""label" is false: it marks a bad answer, which must not be trained on; remove the row"#);
    insta::assert_snapshot!(check(r#"{"text": "a", "label": 1}"#), @r#""label" is 1: only true (a good answer) is supported; remove the key, or list it in dataset.ignoredKeys"#);
    insta::assert_snapshot!(check(r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#), @r#""chosen" cannot be used: preference data, but training is supervised: use the preferred answer as the completion and remove the others | "rejected" cannot be used: preference data, but training is supervised: use the preferred answer as the completion and remove the others"#);
    insta::assert_snapshot!(beside(r#""rejected": [{"role": "assistant", "content": "c"}]"#), @r#""rejected" cannot be used: preference data, but training is supervised: use the preferred answer as the completion and remove the others"#);
    insta::assert_snapshot!(beside(r#""rejected": []"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(beside(r#""images": ["a.png"]"#), @r#""images" cannot be used: only text can be trained on: remove the row, or replace the content by text"#);
    insta::assert_snapshot!(beside(r#""images": []"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(beside(r#""videos": ["a.mp4"], "audios": ["a.wav"]"#), @r#""videos" cannot be used: only text can be trained on: remove the row, or replace the content by text | "audios" cannot be used: only text can be trained on: remove the row, or replace the content by text"#);
    insta::assert_snapshot!(answer(r#""images": ["a.png"]"#), @r#"messages[1]: "images" cannot be used: only text can be trained on: remove the row, or replace the content by text"#);
    insta::assert_snapshot!(answer(r#""refusal": "no""#), @r#"messages[1]: "refusal" cannot be used: give the answer of the assistant as its content"#);
    insta::assert_snapshot!(check(r#"{"input_ids": [1], "labels": [1]}"#), @r#""input_ids" cannot be used: rows must be text, which the trainer tokenizes: give the text | "labels" cannot be used: rows must be text, which the trainer tokenizes: give the text"#);
    insta::assert_snapshot!(beside(r#""weight": 0.5"#), @r#""weight" cannot be used: rows cannot be weighted: mark turns, set weights of dataset.sources, or remove rows"#);
}

#[test]
fn keys_are_used_known_to_be_harmless_or_refused() {
    insta::assert_snapshot!(beside(r#""id": 3, "source": "web", "timestamp": "2024", "metadata": {"a": 1}, "score": 0.5"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(answer(r#""id": 3, "timestamp": 1, "finish_reason": "stop""#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(beside(r#""rationale": "hm", "notes_of_x": 1"#), @r#"the key "rationale" is unknown, so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on | the key "notes_of_x" is unknown, so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on"#);
    insta::assert_snapshot!(beside(r#""massages": []"#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(beside(r#""toools": [1]"#), @r#"the key "toools" is unknown (did you mean "tools"?), so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on"#);
    insta::assert_snapshot!(answer(r#""contnt": "x""#), @r#"messages[1]: the key "contnt" is unknown (did you mean "content"?), so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on"#);
    insta::assert_snapshot!(answer(r#""wieght": 0"#), @r#"messages[1]: the key "wieght" is unknown (did you mean "weight"?), so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on"#);
    insta::assert_snapshot!(beside(r#""prompt": "a""#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(beside(r#""prompt": "other""#), @r#""prompt" is not used in rows of the format messages, so its content would be lost: remove it, or list it in dataset.ignoredKeys"#);
    insta::assert_snapshot!(beside(r#""text": "a: b""#), @"Messages: user=a [assistant=b]");
    insta::assert_snapshot!(beside(r#""instruction": "other""#), @r#""instruction" is not used in rows of the format messages, so its content would be lost: remove it, or list it in dataset.ignoredKeys"#);
    insta::assert_snapshot!(beside(r#""input": {"a": 1}"#), @r#""input" is not used in rows of the format messages, so its content would be lost: remove it, or list it in dataset.ignoredKeys"#);
    insta::assert_snapshot!(check(r#"{"text": "a", "extra_text": "b"}"#), @r#"the key "extra_text" is unknown, so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on"#);
    insta::assert_snapshot!(check(r#"{"prompt": "a", "completion": "b", "response": "c"}"#), @r#""completion" and "response" have the same meaning but differ: keep one"#);
    insta::assert_snapshot!(check(r#"{"instruction": "a", "output": "b", "response": "c"}"#), @r#""output" and "response" have the same meaning but differ: keep one"#);
    insta::assert_snapshot!(beside(r#""chat_template_kwargs": {"enable_thinking": false, "x": null}, "documents": [{"text": "d"}]"#), @r#"Messages: user=a [assistant=b] variables={"enable_thinking":false,"documents":[{"text":"d"}]}"#);
    insta::assert_snapshot!(beside(r#""chat_template_kwargs": {"tools": []}"#), @r#""chat_template_kwargs" sets "tools", which the row itself defines: remove it from there"#);
    insta::assert_snapshot!(beside(r#""chat_template_kwargs": 3"#), @r#""chat_template_kwargs" is 3, but it must be an object"#);
}

#[test]
fn ignored_keys_are_left_out() {
    let options = ReadOptions {
        ignored_keys: ["rationale", "images", "label", "reward"].map(str::to_owned).to_vec(),
        ..ReadOptions::for_format(DatasetFormat::Auto)
    };
    insta::assert_snapshot!(check_with(r#"{"text": "a", "rationale": "hm", "images": ["a.png"], "label": 3, "reward": 1}"#, &options), @r#"Text: Text("a")"#);
    insta::assert_snapshot!(check_with(r#"{"text": "a", "rational": "hm"}"#, &options), @r#"the key "rational" is unknown, so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on"#);
}

#[test]
fn says_what_is_wrong_with_a_row() {
    insta::assert_snapshot!(check(r#"{"message": []}"#), @r#"the row has the keys "message", none of which is "messages", "conversations", "prompt", "instruction", "text" (did you mean "messages" instead of "message"?)"#);
    insta::assert_snapshot!(check_as(r#"{"message": []}"#, DatasetFormat::Messages), @r#""messages" is missing (did you mean "messages" instead of "message"?)"#);
    insta::assert_snapshot!(check_as(r#"{"message": [{"role": "user", "content": "a"}]}"#, DatasetFormat::Messages), @r#""messages" is missing (did you mean "messages" instead of "message"?)"#);
    insta::assert_snapshot!(check(r#"{"text": "a",}"#), @"the row is not JSON: trailing comma at column 14");
    insta::assert_snapshot!(check(r#"[{"text": "a"}]"#), @"the row is JSON but not an object `{…}`");
    insta::assert_snapshot!(check("3"), @"the row is JSON but not an object `{…}`");
    insta::assert_snapshot!(check(r#"{"text": ""}"#), @r#""text" is empty"#);
    insta::assert_snapshot!(check(r#"{"text": 3}"#), @r#""text" is 3, but it must be a string"#);
    insta::assert_snapshot!(check(r#"{"text": "a", "text": "b"}"#), @r#"the key "text" occurs twice: keep one"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a", "content": "c"}]}"#), @r#"the key "content" occurs twice: keep one"#);
    insta::assert_snapshot!(check(r#"{"text": "a"} x"#), @"the row is not JSON: trailing characters at column 15");
    insta::assert_snapshot!(check(r#"{"data": [{"text": "a"}]}"#), @r#"the row has the keys "data", none of which is "messages", "conversations", "prompt", "instruction", "text"; if the rows are the list under "data", write that list alone"#);
    insta::assert_snapshot!(check("{}"), @"the row is empty");
    insta::assert_snapshot!(check_as(r#"{"text": "a"}"#, DatasetFormat::Alpaca), @r#""instruction" is missing"#);
    insta::assert_snapshot!(check_as(r#"{"prompt": "a", "completion": "b"}"#, DatasetFormat::Messages), @r#""messages" is missing"#);
    insta::assert_snapshot!(check(r#"{"instruction": "a"}"#), @r#""output" is missing"#);
    insta::assert_snapshot!(check(r#"{"prompt": "a", "completion": ""}"#), @r#""completion" is empty"#);
}

#[test]
fn says_what_is_wrong_with_a_conversation() {
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}]}"#), @"there is no assistant turn, so there is nothing to train on");
    insta::assert_snapshot!(check(r#"{"messages": []}"#), @"there is no assistant turn, so there is nothing to train on");
    insta::assert_snapshot!(check(r#"{"messages": {}}"#), @r#""messages" is {}, but it must be a list"#);
    insta::assert_snapshot!(check(r#"{"messages": ["a", "b"]}"#), @"messages[0]: a turn must be an object");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "usr", "content": "a"}]}"#), @r#"messages[0]: the role "usr" is unknown: use system, user, assistant or tool"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}]}"#), @"messages[1]: a system turn must be the first");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}"#), @"messages[1]: the assistant's content is empty");
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}"#), @r#"messages[0]: "content" is missing"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}"#), @r#"messages[0]: "role" is missing"#);
    insta::assert_snapshot!(check(r#"{"conversations": [{"value": "a"}]}"#), @r#"conversations[0]: "from" is missing"#);
    insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a", "value": "c"}]}"#), @r#"messages[0]: "content" and "value" differ: keep one"#);
    insta::assert_snapshot!(check(r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}]}"#), @"completion[0]: a system turn must be the first");
    insta::assert_snapshot!(check(r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]}"#), @"there is no assistant turn, so there is nothing to train on");
}
