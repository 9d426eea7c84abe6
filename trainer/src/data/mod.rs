//! From rows of text to micro-batches of tokens.
//!
//! In the order data flows: [`row_sources`] and [`files`] say where rows are,
//! [`records`] streams them, [`format`](mod@format) understands one as what
//! [`conversation`] defines, [`tokenizer`] and [`template`] turn it into tokens with targets, [`rows`] does so for a whole
//! split, [`census`] counts or [`dataset`] stores them, [`packing`] and [`sequences`] arrange them.

mod added_tokens;
pub mod alpaca_prompt;
mod byte_level;
pub mod census;
pub mod chat_template;
mod check_rendered;
pub mod conversation;
pub mod dataset;
pub mod files;
pub mod format;
#[cfg(test)]
pub(crate) mod goldens;
mod jinja;
pub mod packing;
mod parallel_map;
pub mod records;
pub mod rendered;
pub mod rendering;
pub mod row_sources;
pub mod rows;
pub mod sequences;
pub mod targets;
pub mod template;
mod thoughts;
pub mod tokenizer;
#[cfg(test)]
mod turn_tests;
mod turns;

pub use dataset::{Dataset, Row};
pub use rendering::Rendering;
pub use row_sources::RowSources;
pub use sequences::{Batch, Sequences};
pub use tokenizer::Tokenizer;
