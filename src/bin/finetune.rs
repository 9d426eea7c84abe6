//! The `finetune` command line.
#![allow(clippy::print_stdout, reason = "temporary")]

fn main() {
    print!("{}", finetune_operator::api::schema::crd_yaml().unwrap_or_default());
}
