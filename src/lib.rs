//! fine-tune operator.
