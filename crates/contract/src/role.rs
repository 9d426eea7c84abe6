//! What a Secret's keys are for.

/// Which of a run's stores a Secret has the credentials of.
///
/// The operator gives the trainer the keys of each Secret as environment variables that begin with
/// the role's prefix, so that one trainer can use several accounts of one kind of store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The base model: `FINETUNE_MODEL_…`.
    Model,
    /// The adapter that training starts from: `FINETUNE_ADAPTER_…`.
    Adapter,
    /// The checkpoint of another run that training starts from: `FINETUNE_CHECKPOINT_…`.
    Checkpoint,
    /// The rows: `FINETUNE_DATASET_…`.
    Dataset,
    /// The result and its checkpoints: `FINETUNE_OUTPUT_…`.
    Output,
}

impl Role {
    /// All roles, in the order their variables are written.
    pub const ALL: [Self; 5] =
        [Self::Model, Self::Adapter, Self::Checkpoint, Self::Dataset, Self::Output];

    /// Returns how the variables of the role begin.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Model => "FINETUNE_MODEL_",
            Self::Adapter => "FINETUNE_ADAPTER_",
            Self::Checkpoint => "FINETUNE_CHECKPOINT_",
            Self::Dataset => "FINETUNE_DATASET_",
            Self::Output => "FINETUNE_OUTPUT_",
        }
    }
}
