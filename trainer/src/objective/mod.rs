//! The training objectives: each computes a loss and its gradient from the last hidden states.

pub mod causal_lm;
