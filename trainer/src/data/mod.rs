//! Turns rows of text into micro-batches of tokens.
//!
//! In the order of the data flow: [`row_sources`] and [`files`] find the rows, [`records`] streams them,
//! [`formats`] parses each into the types of [`conversation`], [`chat`] and [`tokenizer`] turn it into
//! tokens with targets, and [`rows`] does all that for a whole split. [`census`] computes statistics of
//! a split, [`dataset`] stores its tokens, [`packing`] and [`sequences`] arrange them.

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
