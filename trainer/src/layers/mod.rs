//! The layers a decoder is made of, each with its backward pass beside its forward one.

pub mod attention;
pub mod dropout;
pub mod embedding;
pub mod linear;
pub mod norm;
pub mod rope;
