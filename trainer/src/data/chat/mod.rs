//! Renders conversations with the chat template of a model and finds the assistant turns in the text.

pub mod alpaca_prompt;
pub(crate) mod assistant_spans;
pub(super) mod check_rendered;
#[cfg(test)]
pub(crate) mod goldens;
mod jinja;
pub(super) mod reasoning;
pub mod rendering;
pub mod rendering_stats;
pub mod template;
pub mod template_source;
#[cfg(test)]
mod tests;
