//! From rows of text to micro-batches of tokens.
//!
//! In the order data flows: [`jsonl`] streams lines, [`format`](mod@format) understands a row as what
//! [`conversation`] defines, [`tokenizer`] and [`template`] turn it into tokens with targets, [`rows`] does so for a whole
//! split, [`census`] counts or [`dataset`] stores them, [`packing`] and [`sequences`] arrange them.

pub mod census;
pub mod conversation;
pub mod dataset;
pub mod format;
#[cfg(test)]
pub(crate) mod goldens;
pub mod jsonl;
pub mod packing;
pub mod rows;
pub mod sequences;
pub mod template;
pub mod tokenizer;

pub use dataset::{Dataset, Row};
pub use sequences::{Batch, Sequences};
pub use tokenizer::Tokenizer;
