//! What `finetune data check` shows of rows.

use crate::sandbox::Sandbox;

const ROWS: &str = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}, {"role": "assistant", "content": "so long", "weight": 0}]}
{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "contnt": "hello"}]}
{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
"#;

fn check(sandbox: &Sandbox, arguments: &[&str]) -> String {
    let all = [&["data", "check"], arguments, &["--work-dir", "work"]].concat();
    let ran = sandbox.finetune(&all);
    format!("{}{}", ran.stdout, sandbox.shown(&ran))
}

#[test]
fn shows_what_is_trained_on_and_every_fault() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.write("chat.jsonl", ROWS);
    insta::assert_snapshot!(check(&sandbox, &["chat.jsonl", "--model", "model", "--rows", "1"]), @r#"
chat.jsonl:1: 59 tokens, 6 trained on
<|im_start|>user
hi<|im_end|>
<|im_start|>assistant
⟦hello<|im_end|>⟧
<|im_start|>user
bye<|im_end|>
<|im_start|>assistant
so long<|im_end|>

chat.jsonl: 2 rows, 8 of 82 tokens trained on
chat.jsonl:2: messages[1]: the key "contnt" is unknown (did you mean "content"?), so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on
exit 65
error: 1 of 3 rows cannot be used: fix them
"#);
    insta::assert_snapshot!(check(&sandbox, &["chat.jsonl", "--model", "model", "--line", "2", "--line", "chat.jsonl:3", "--ids"]), @r#"
chat.jsonl:2: cannot be used
messages[1]: the key "contnt" is unknown (did you mean "content"?), so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on

chat.jsonl:3: 23 tokens, 2 trained on
    256  "<|im_start|>"
    117  "u"
    115  "s"
    101  "e"
    114  "r"
     10  "\n"
     49  "1"
    257  "<|im_end|>"
     10  "\n"
    256  "<|im_start|>"
     97  "a"
    115  "s"
    115  "s"
    105  "i"
    115  "s"
    116  "t"
     97  "a"
    110  "n"
    116  "t"
     10  "\n"
     50  ⟦"2"⟧
    257  ⟦"<|im_end|>"⟧
     10  "\n"

chat.jsonl: 2 rows, 8 of 82 tokens trained on
chat.jsonl:2: messages[1]: the key "contnt" is unknown (did you mean "content"?), so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on
exit 65
error: 1 of 3 rows cannot be used: fix them
"#);
    // Read as the manifest says: the last turn of each row, cut at the context.
    sandbox.write("good.jsonl", &ROWS.replace("contnt", "content"));
    let mut job = sandbox.job("output");
    job["spec"]["dataset"] = serde_json::json!({
        "train": sandbox.uri("good.jsonl"), "trainOn": "lastTurn", "ignoredKeys": ["weight"],
    });
    job["spec"]["training"]["contextLength"] = serde_json::json!(64);
    sandbox.write("job.yaml", &job.to_string());
    insta::assert_snapshot!(check(&sandbox, &["-f", "job.yaml", "--rows", "1"]), @r#"
good.jsonl:1: 59 tokens, 8 trained on
<|im_start|>user
hi<|im_end|>
<|im_start|>assistant
hello<|im_end|>
<|im_start|>user
bye<|im_end|>
<|im_start|>assistant
⟦so long<|im_end|>⟧

good.jsonl: 3 rows, 16 of 110 tokens trained on
exit 0
"#);
}

#[test]
fn says_what_is_wrong_with_the_question() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.write("chat.jsonl", ROWS);
    insta::assert_snapshot!(check(&sandbox, &["chat.jsonl", "--model", "model", "--rows", "0", "--line", "7"]), @r#"
chat.jsonl: 2 rows, 8 of 82 tokens trained on
chat.jsonl:2: messages[1]: the key "contnt" is unknown (did you mean "content"?), so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on
exit 65
error: there is no row at 7: a row has the number of its line, counted from 1
"#);
    insta::assert_snapshot!(check(&sandbox, &["absent.jsonl", "--model", "model"]), @r#"
exit 78
error: nothing is at file://DIR/absent.jsonl
"#);
    insta::assert_snapshot!(check(&sandbox, &["chat.jsonl", "--model", "absent"]), @r#"
exit 78
error: spec.model.uri: nothing is at file://DIR/absent
"#);
    insta::assert_snapshot!(check(&sandbox, &["chat.jsonl", "--model", "ftp://absent"]), @r#"
exit 78
error: these rows or this model cannot be read:
  spec.model.uri: "ftp://absent" has the unknown scheme "ftp": use hf, s3, gs, az, pvc or file
"#);
    insta::assert_snapshot!(check(&sandbox, &["chat.jsonl"]), @r#"
exit 2
error: the following required arguments were not provided:
  --model <MODEL>

Usage: finetune data check --model <MODEL> --work-dir <DIR> <ROWS>

For more information, try '--help'.
"#);
}
