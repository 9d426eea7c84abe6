//! Writes the model card: a README.md that says what a result is, what it was made from, and how to
//! load it.

use std::{fmt::Write, path::Path};

use finetune_contract::{ArtifactKind, RunConfig};

use crate::{
    checkpoint::TrainState,
    export::{Error, Export, adapter::base_name, files},
};

/// Writes the model card.
pub(super) fn write(
    export: &Export<'_>,
    kind: ArtifactKind,
    directory: &Path,
) -> Result<(), Error> {
    let skipped_rows = export.training.train.dataset.skipped_rows();
    let state = &export.training.state;
    let vocab_size = export.training.model.config().vocab_size;
    let vocab_size = (!export.config.model.added_tokens.is_empty()).then_some(vocab_size);
    let base = base_name(export);
    let text = card(export.config, state, skipped_rows, export.step, kind, &base, vocab_size);
    files::write_text(&directory.join("README.md"), &text)
}

fn card(
    config: &RunConfig,
    state: &TrainState,
    skipped_rows: u64,
    step: u64,
    kind: ArtifactKind,
    base: &str,
    extended_to: Option<usize>,
) -> String {
    let training = &config.training;
    let mut rows = vec![
        (
            "base model",
            format!(
                "`{base}`{}",
                config
                    .model
                    .revision
                    .as_ref()
                    .map_or(String::new(), |commit| format!(" at `{commit}`"))
            ),
        ),
        (
            "method",
            config.lora.as_ref().map_or("full-parameter".to_owned(), |lora| {
                format!(
                    "LoRA, r {}, alpha {}, dropout {}{}",
                    lora.r,
                    lora.lora_alpha,
                    lora.lora_dropout,
                    if lora.use_rslora { ", rank-stabilised" } else { "" }
                )
            }),
        ),
        ("training rows (SHA-256)", format!("`{}`", config.expected.train_sha256)),
        (
            "steps",
            format!("{step} of {} planned, {} tokens", training.total_steps, state.tokens_seen),
        ),
        ("context length", training.context_length.to_string()),
        (
            "learning rate",
            format!(
                "{:e}, {:?}{} after {} warm-up steps",
                training.learning_rate,
                training.lr_scheduler_type,
                training
                    .min_learning_rate_ratio
                    .map_or(String::new(), |ratio| format!(" to {ratio} of it")),
                training.num_warmup_steps
            ),
        ),
        (
            "sequences per step",
            (training.micro_batch_size * training.gradient_accumulation_steps).to_string(),
        ),
        ("seed", training.seed.to_string()),
    ];
    if let Some(rows_of_embedding) = extended_to {
        let tokens = config.model.added_tokens.iter().map(|token| format!("`{token}`"));
        let tokens: Vec<String> = tokens.collect();
        let added = format!("{}: the embedding has {rows_of_embedding} rows", tokens.join(", "));
        rows.push(("added tokens", added));
    }
    if skipped_rows > 0 {
        rows.push(("rows left out, as they could not be used", skipped_rows.to_string()));
    }
    if let Some((first, last)) = state.first_loss.zip(state.last_loss) {
        rows.push(("training loss, first and last step", format!("{first:.4} → {last:.4}")));
    }
    if let Some((before, best)) = state.base_eval_loss.zip(state.best) {
        rows.push((
            "validation loss, before and published",
            format!("{before:.4} → {:.4}", best.loss),
        ));
    }
    let library = if kind == ArtifactKind::Adapter { "peft" } else { "transformers" };
    let mut text = format!(
        "---\nbase_model: {base}\nlibrary_name: {library}\npipeline_tag: text-generation\n---\n\n# Fine-tuned from {base}\n\n| | |\n|---|---|\n"
    );
    for (name, value) in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {name} | {value} |");
    }
    let load = match kind {
        ArtifactKind::Adapter => {
            let resize = extended_to.map_or(String::new(), |rows| {
                format!("\nbase.resize_token_embeddings({rows})")
            });
            format!(
                "from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n\nbase = AutoModelForCausalLM.from_pretrained(\"{base}\"){resize}\nmodel = PeftModel.from_pretrained(base, \"THIS_DIRECTORY\")"
            )
        }
        ArtifactKind::FullModel | ArtifactKind::MergedModel => {
            "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(\"THIS_DIRECTORY\")".to_owned()
        }
    };
    let _ = write!(text, "\n```python\n{load}\n```\n");
    text
}
