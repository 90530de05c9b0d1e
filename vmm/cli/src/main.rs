//! The `ftvmm` command.

fn main() -> std::process::ExitCode {
    ftvmm::main()
}
