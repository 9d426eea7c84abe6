//! Resolves the rendering settings of a dataset: the chat template, the reasoning and the date.

use finetune_contract::{FailureReason, Reasoning, RenderingSettings};
use jiff::civil::Date;

use crate::{data::chat::template_source, failure::Failure, runtime::clock, store::Environment};

/// How conversations are rendered, beyond the files of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendering {
    /// The text of a chat template that replaces that of the model.
    pub chat_template: Option<String>,
    /// Which reasoning of the assistant is kept.
    pub reasoning: Reasoning,
    /// The current date, as templates see it.
    pub today: Date,
}

impl Rendering {
    /// Renders with the chat template of the model and today's date.
    pub fn of_model() -> Self {
        Self { chat_template: None, reasoning: Reasoning::Keep, today: clock::today() }
    }

    /// Resolves the settings; reads a template that is given by its URI.
    ///
    /// # Errors
    /// A [`Failure`] that names the invalid setting.
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
                    "dataset.templateDate is {date:?}, which is not a date such as 2026-01-31"
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
