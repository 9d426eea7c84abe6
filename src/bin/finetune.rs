//! The `finetune` command line.

fn main() -> std::process::ExitCode {
    finetune_operator::cli::main()
}
