//! Conversations rendered as a model's chat template has them, and where in the text the answers are.

pub mod alpaca_prompt;
pub(super) mod check_rendered;
#[cfg(test)]
pub(crate) mod goldens;
mod jinja;
pub(super) mod reasoning;
pub mod rendered;
pub mod rendering;
pub mod template;
pub mod template_source;
#[cfg(test)]
mod turn_tests;
pub(crate) mod turns;
