//! What the real thing says to input it cannot use.

use std::fs;

use serde_json::{Value, json};

use crate::sandbox::Sandbox;

fn check(sandbox: &Sandbox, job: &Value) -> String {
    let shown = sandbox.shown(&sandbox.run(job));
    assert!(!sandbox.path("output/finetune-manifest.json").exists());
    shown
}

/// Cuts a refusal after its first problem.
fn first_problem(shown: &str) -> String {
    shown.lines().take(3).collect::<Vec<_>>().join("\n")
}

#[test]
fn refuses_a_model_that_is_not_there() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    job["spec"]["model"]["uri"] = json!(sandbox.uri("absent"));
    insta::assert_snapshot!(check(&sandbox, &job), @r#"
exit 78
error: the run cannot start:
  spec.model.uri: nothing is at file://DIR/absent
"#);
}

#[test]
fn refuses_bad_rows_by_file_and_line() {
    let Some(sandbox) = Sandbox::new() else { return };
    let good = r#"{"text": "fine"}"#;
    sandbox.write("train.jsonl", &format!("{good}\n{{\"text\": \n{good}\n{{\"txt\": \"typo\"}}\n"));
    insta::assert_snapshot!(check(&sandbox, &sandbox.job("output")), @r#"
exit 65
error: the run cannot start:
  train.jsonl:2: the row is not JSON: EOF while parsing a value at column 8
  train.jsonl:4: "text" is missing (did you mean "text" instead of "txt"?)
"#);
}

#[test]
fn refuses_an_adapter_that_does_not_fit() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    job["spec"]["loraConfig"]["r"] = json!(512);
    insta::assert_snapshot!(first_problem(&check(&sandbox, &job)), @r#"
exit 78
error: the run cannot start:
  spec.loraConfig.r: loraConfig.r is 512, larger than "model.layers.0.mlp.down_proj" (32 x 64): use at most 32
"#);
    job["spec"]["loraConfig"] = json!({"targetModules": ["q_porj", "v_proj"]});
    insta::assert_snapshot!(first_problem(&check(&sandbox, &job)), @r#"
exit 78
error: the run cannot start:
  spec.loraConfig.targetModules: loraConfig.targetModules has "q_porj", which matches no module of this model: use down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, up_proj, v_proj (did you mean "q_proj"?)
"#);
}

#[test]
fn refuses_pickled_weights() {
    let Some(sandbox) = Sandbox::new() else { return };
    fs::rename(sandbox.path("model/model.safetensors"), sandbox.path("model/pytorch_model.bin"))
        .unwrap();
    insta::assert_snapshot!(check(&sandbox, &sandbox.job("output")), @r#"
exit 65
error: the run cannot start:
  spec.model.uri: the weights are a pickle (pytorch_model.bin), which can execute any code when loaded: convert them with transformers' save_pretrained, which writes safetensors
"#);
}
