//! The operator's and the command line's library: what carries a run out.
//!
//! What a job says is `finetune_api`, what it becomes is decided by `finetune_plan`; [`cli`] carries
//! it out here, without a cluster, and [`operator`] in one.
#![forbid(unsafe_code)]

pub mod cli;
pub mod operator;
