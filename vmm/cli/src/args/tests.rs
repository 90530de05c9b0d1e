//! Command lines that are accepted, and those that are not.

use super::*;

/// The arguments of a run; words stand between blanks.
pub(crate) fn run_args(line: &str) -> RunArgs {
    let words = std::iter::once("ftvmm").chain(line.split_whitespace());
    Cli::try_parse_from(words).unwrap().run
}

#[test]
fn the_command_line_is_consistent() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
}

#[test]
fn a_primary_needs_an_address_and_a_witness() {
    let parse = |line: &str| Cli::try_parse_from(line.split(' '));
    assert!(parse("ftvmm --kernel k --role primary").is_err());
    assert!(parse("ftvmm --kernel k --role primary --listen 1.2.3.4:5 --witness file:/w").is_ok());
    assert!(parse("ftvmm").is_err());
    assert!(parse("ftvmm --restore s").is_ok());
    assert!(parse("ftvmm --restore s --kernel k --cpu-template t").is_ok());
    for contradiction in
        ["--mem 64", "--cmdline x", "--tsc hide", "--on-reset end", "--on-panic end"]
    {
        assert!(parse(&format!("ftvmm --restore s {contradiction}")).is_err());
    }
    assert!(parse("ftvmm doctor --json").is_ok());
}
