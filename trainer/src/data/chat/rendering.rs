//! How rows become text, decided: what the user said, where a template comes from, what day it is.

use finetune_contract::{FailureReason, Reasoning, RenderingSettings};
use jiff::civil::Date;

use crate::{data::chat::template_source, failure::Failure, runtime::clock, store::Environment};

/// How rows are rendered, beside what the model itself says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendering {
    /// The text of a template that takes the place of the model's own.
    pub chat_template: Option<String>,
    /// What becomes of the assistant's thoughts.
    pub reasoning: Reasoning,
    /// The day it is for templates that ask.
    pub today: Date,
}

impl Rendering {
    /// Renders with the model's own template, on this day.
    pub fn of_model() -> Self {
        Self { chat_template: None, reasoning: Reasoning::Keep, today: clock::today() }
    }

    /// Decides what settings leave open, and reads a template that is named by its URI.
    ///
    /// # Errors
    /// A [`Failure`] that names the setting that cannot be used.
    pub fn resolve(
        settings: &RenderingSettings,
        environment: &Environment,
    ) -> Result<Self, Failure> {
        let RenderingSettings { chat_template, reasoning, template_date } = settings;
        let resolve = |template: &String| template_source::resolve(template, environment);
        let today = match template_date {
            None => clock::today(),
            Some(date) => date.parse().map_err(|_| {
                let message = format!(
                    "dataset.templateDate is {date:?}, which is no date such as 2026-01-31"
                );
                Failure::new(FailureReason::InvalidConfiguration, message)
            })?,
        };
        Ok(Self {
            chat_template: chat_template.as_ref().map(resolve).transpose()?,
            reasoning: *reasoning,
            today,
        })
    }
}
