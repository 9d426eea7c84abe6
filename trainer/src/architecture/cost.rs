//! What a model costs to train, declared beside its architecture.
//!
//! The plan predicts memory from it. `model/block` tests that a block saves what is declared here;
//! `docs/memory.csv` compares the predicted with the measured peak of whole steps.

use finetune_contract::cost::CostFacts;

use super::{config::ModelConfig, names};

impl ModelConfig {
    /// Returns what one token of a micro-batch costs in memory.
    pub fn cost(&self) -> CostFacts {
        let [d, h, k, e, f, v, blocks] = [
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.intermediate_size,
            self.vocab_size,
            self.num_hidden_layers,
        ]
        .map(|size| size as u64);
        let heads = h * e + 2 * k * e; // queries, keys and values
        let before_norm = if self.qk_norm { h * e + k * e } else { 0 };
        // The input, the residual stream between the halves, attention's output, gate and up.
        let saved = 2 * d + heads + before_norm + h * e + 2 * f;
        let outer =
            self.tensors().into_iter().filter(|tensor| names::layer(&tensor.name).is_none());
        let outer =
            outer.map(|tensor| tensor.shape.iter().map(|&size| size as u64).product::<u64>());
        CostFacts {
            saved_elements: blocks * saved,
            // The logarithm of each softmax's denominator, in fp32.
            saved_bytes: blocks * 4 * h,
            checkpointed_elements: blocks * d,
            // Fitted to docs/memory.csv; includes what the allocator keeps between buffers of other sizes.
            temporary_elements: 7 * f + 6 * d,
            // libtorch's attention has results between its operators, our kernels have none. Which will
            // run is not known, so this is half of them.
            fp32_attention_elements: 4 * d,
            // More results between operators, norms in fp32, and dropout's draws as integers.
            device_temporary_elements: 8 * f + 6 * d,
            device_temporary_bytes: 24 * d + 24 * f,
            device_score_bytes: 16 * h,
            logits: v,
            largest_weight: v * d,
            outer_parameters: outer.sum(),
            blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use finetune_contract::ModelFacts;

    use crate::architecture::ModelConfig;

    #[test]
    fn reports_without_a_cost_mean_that_of_a_llama() {
        let config = ModelConfig::parse(
            r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": false}"#,
        )
        .unwrap();
        let facts: ModelFacts = serde_json::from_value(serde_json::json!({
            "modelType": "llama", "parameters": config.parameters(), "weightBytes": 0, "weightDtype": "BF16",
            "hiddenSize": 64, "intermediateSize": 96, "numHiddenLayers": 3, "numAttentionHeads": 4,
            "numKeyValueHeads": 2, "headDim": 16, "vocabSize": 100, "maxPositionEmbeddings": 2048,
            "tieWordEmbeddings": false, "hasChatTemplate": true, "modules": config.modules(),
        }))
        .unwrap();
        assert_eq!(facts.cost(), config.cost());
    }
}
