//! Stand-in until the data module lands.

/// A micro-batch.
pub struct Batch {
    pub tokens: Vec<i64>,
    pub segment_lengths: Vec<usize>,
    pub predicting: Vec<i64>,
    pub labels: Vec<i64>,
}
