//! From rows of text to micro-batches of tokens.
//!
//! In the order data flows: [`row_sources`] and [`files`] say where rows are,
//! [`records`] streams them, [`format`](mod@format) understands one as what
//! [`conversation`] defines, [`tokenizer`] and [`template`] turn it into tokens with targets, [`rows`] does so for a whole
//! split, [`census`] counts or [`dataset`] stores them, [`packing`] and [`sequences`] arrange them.

pub mod census;
pub mod chat;
pub mod conversation;
pub mod dataset;
pub mod files;
pub mod formats;
pub mod packing;
pub mod records;
pub mod row_sources;
pub mod rows;
pub mod sequences;
pub mod tokenizer;

pub use chat::rendering::Rendering;
pub use dataset::{Dataset, Row};
pub use row_sources::RowSources;
pub use sequences::{Batch, Sequences};
pub use tokenizer::Tokenizer;
