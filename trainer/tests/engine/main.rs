//! The engine against a plain reference that records a graph.
//!
//! Every hand-written backward pass is compared with autograd through `reference`, for every switch
//! of the architecture and every kind of attachment.

mod fixture;
mod gradients;
mod invariance;
mod reference;
