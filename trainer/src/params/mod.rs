//! Trained parameters as flat fp32 tensors, and how they are sharded over ranks.

pub mod buckets;
pub mod flat;
pub mod layout;
pub mod zero;
