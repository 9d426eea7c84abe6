//! What training minimises.

pub mod causal_lm;
