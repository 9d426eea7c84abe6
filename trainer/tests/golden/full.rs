//! Ten AdamW steps of full-parameter training.

use finetune_trainer::model::attach::Attachment;

use crate::golden::{FAMILIES, Golden, distance};

#[test]
fn ten_steps_of_full_parameter_training_equal_torch() {
    let mut trained = Vec::new();
    for family in FAMILIES {
        let golden = Golden::open(family);
        let Some(trajectory) = &golden.facts.full else { continue };
        let mut model = golden.load(Attachment::Full);
        let loss_difference = golden.train(&mut model, trajectory);
        assert!(loss_difference <= 1e-5, "{family}: a loss differs by {loss_difference:e}");
        for (name, expected) in golden.tensors_below("full.") {
            let found = distance(&model.trained().master_of(name).unwrap(), expected);
            assert!(found <= 1e-4, "{family}: {name} differs by {found:e} after training");
        }
        trained.push(family);
    }
    assert_eq!(trained, ["llama", "llama-biases", "qwen3"]);
}
