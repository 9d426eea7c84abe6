//! The layers of a decoder, each with its backward pass beside its forward pass.

pub mod attention;
pub mod dropout;
pub mod embedding;
pub mod linear;
pub mod norm;
pub mod rope;
