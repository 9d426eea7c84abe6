//! Preflight reports of real models, for tests.

use finetune_contract::{
    CONTRACT_VERSION, DatasetCensus, DatasetFormat, LengthPoint, LoraFacts, MachineFacts,
    ModelFacts, ModuleShape, OutputState, PreflightReport, RunId,
};

fn model(
    model_type: &str,
    [d, f, layers, h, k, e, v, longest]: [u32; 8],
    tied: bool,
) -> ModelFacts {
    let module = |name: &str, out_features, in_features, count| ModuleShape {
        name: name.to_owned(),
        out_features,
        in_features,
        bias: false,
        count,
    };
    let mut modules = vec![
        module("embed_tokens", v, d, 1),
        module("q_proj", h * e, d, layers),
        module("k_proj", k * e, d, layers),
        module("v_proj", k * e, d, layers),
        module("o_proj", d, h * e, layers),
        module("gate_proj", f, d, layers),
        module("up_proj", f, d, layers),
        module("down_proj", d, f, layers),
        module("input_layernorm", d, 0, layers),
        module("post_attention_layernorm", d, 0, layers),
        module("norm", d, 0, 1),
    ];
    if !tied {
        modules.push(module("lm_head", v, d, 1));
    }
    let parameters = modules.iter().map(ModuleShape::parameters).sum();
    ModelFacts {
        model_type: model_type.to_owned(),
        resolved_revision: None,
        parameters,
        weight_bytes: 2 * parameters,
        weight_dtype: "BF16".to_owned(),
        hidden_size: d,
        intermediate_size: f,
        num_hidden_layers: layers,
        num_attention_heads: h,
        num_key_value_heads: k,
        head_dim: e,
        vocab_size: v,
        added_tokens: 0,
        max_position_embeddings: longest,
        tie_word_embeddings: tied,
        has_chat_template: true,
        modules,
        cost: None,
    }
}

/// Returns the facts of SmolLM2-135M.
pub fn smollm2() -> ModelFacts {
    model("llama", [576, 1536, 30, 9, 3, 64, 49152, 8192], true)
}

/// Returns the facts of Llama-3.1-8B.
pub fn llama_8b() -> ModelFacts {
    model("llama", [4096, 14336, 32, 32, 8, 128, 128_256, 131_072], false)
}

/// Returns the report of a preflight without problems: 1,000 rows of chat, and a machine with
/// `memory_bytes` and two cores.
pub fn report(model: ModelFacts, memory_bytes: u64) -> PreflightReport {
    let point = |context, over, cut, packed| LengthPoint {
        context,
        over,
        cut,
        empty: 0,
        packed,
        most_targets: None,
        most_packed_targets: None,
    };
    PreflightReport {
        version: CONTRACT_VERSION,
        run_id: RunId("job".to_owned()),
        problems: Vec::new(),
        problems_total: 0,
        warnings: Vec::new(),
        // As the trainer resolves all-linear.
        lora: Some(LoraFacts {
            targets: model
                .modules
                .iter()
                .filter(|module| module.name.ends_with("_proj"))
                .cloned()
                .collect(),
            saved: Vec::new(),
            unties: false,
        }),
        model: Some(model),
        train: Some(DatasetCensus {
            format: DatasetFormat::Messages,
            files: 1,
            file_names: Vec::new(),
            rows: 1000,
            bad_rows: 0,
            tokens: 150_000,
            target_tokens: 60_000,
            duplicate_rows: 0,
            max_tokens: 700,
            p50_tokens: 140,
            p95_tokens: 240,
            sha256: "ab".repeat(32),
            lengths: vec![
                point(128, 500, 40_000, 900),
                point(256, 40, 4000, 590),
                point(512, 3, 300, 300),
                point(1024, 0, 0, 150),
            ],
        }),
        validation: None,
        template_date: None,
        overlapping_rows: 0,
        output: Some(OutputState::Vacant),
        published: None,
        machine: Some(MachineFacts {
            cpu: "Test CPU".to_owned(),
            cores: 2,
            memory_bytes,
            native_bf16: true,
            bf16_kernel: None,
            fp32_gflops: Some(100.0),
            bf16_gflops: Some(400.0),
        }),
    }
}
