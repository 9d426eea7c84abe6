//! Trained parameters as flat fp32 tensors, and how they are divided over ranks.

pub mod buckets;
pub mod flat;
pub mod layout;
pub mod zero;
