//! The `finetune` command line.
fn main() {}
