//! Refuses options that would do nothing in the chosen role, because the user expects an effect.

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Error};

use super::args::{OnDivergence, RoleArg, RunArgs, WrittenArgs};

const PAIR: &[RoleArg] = &[RoleArg::Primary, RoleArg::Backup, RoleArg::Auto];

/// Options that only some roles have, by their names in [`RunArgs`].
const ONLY: &[(&str, &[RoleArg])] = &[
    ("listen", PAIR),
    ("connect", &[RoleArg::Backup]),
    ("peer", &[RoleArg::Auto]),
    ("channel_key", PAIR),
    ("tls_cert", PAIR),
    ("tls_key", PAIR),
    ("tls_ca", PAIR),
    ("insecure_channel", PAIR),
    ("start_alone", &[RoleArg::Primary]),
    ("force_new_guest", &[RoleArg::Primary]),
    ("record", &[RoleArg::Solo, RoleArg::Primary, RoleArg::Backup]),
    ("restore", &[RoleArg::Solo, RoleArg::Primary, RoleArg::Backup]),
    ("witness", PAIR),
    ("witness_ca", PAIR),
    ("witness_user_file", PAIR),
    ("release", PAIR),
    ("on_divergence", PAIR),
    ("believe", PAIR),
    ("failure_timeout_ms", PAIR),
    ("horizon_us", PAIR),
    ("incident_dir", PAIR),
    ("disk_error", PAIR),
    ("on_link_down", PAIR),
];

/// Refuses an option that was given and does nothing.
///
/// # Errors
/// Names it, and where it would do something.
pub fn check(matches: &ArgMatches, args: &RunArgs) -> Result<(), Error> {
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let refused = |id: &str, why: String| {
        let option = format!("--{}", id.replace('_', "-"));
        Err(Error::raw(ErrorKind::ArgumentConflict, format!("{option} does nothing {why}")))
    };
    let is_vain = |(id, roles): &&(&str, &[RoleArg])| given(id) && !roles.contains(&args.role);
    if let Some((id, roles)) = ONLY.iter().find(is_vain) {
        let roles: Vec<_> = roles.iter().map(|role| format!("--role {}", name(*role))).collect();
        let own = name(args.role);
        return refused(id, format!("in the role {own}; it is for {}", roles.join(" and ")));
    }
    if given("believe") && args.on_divergence != OnDivergence::Resync {
        return refused("believe", "without --on-divergence resync".into());
    }
    if let Some((id, why)) = args.witness_options.vain(args.witness.as_ref()) {
        return refused(id, why.into());
    }
    let is_logged = args.record.is_some() || args.role != RoleArg::Solo;
    if given("on_link_down") && args.net.is_none() {
        return refused("on_link_down", "without --net".into());
    }
    let WrittenArgs { report, profile, .. } = &args.written;
    if given("overwrite") && args.record.is_none() && report.is_none() && profile.is_none() {
        return refused("overwrite", "without --record, --report or --profile".into());
    }
    for id in ["check_every", "check_memory_every", "max_input_delay"] {
        if given(id) && !is_logged {
            return refused(id, "without a log; add --record, or it is for a pair".into());
        }
    }
    Ok(())
}

fn name(role: RoleArg) -> &'static str {
    match role {
        RoleArg::Solo => "solo",
        RoleArg::Primary => "primary",
        RoleArg::Backup => "backup",
        RoleArg::Auto => "auto",
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches};

    use super::super::args::Cli;
    use super::*;

    fn answer(line: &str) -> Result<(), String> {
        let words = format!("ftvmm --kernel k {line}");
        let matches = Cli::command().try_get_matches_from(words.split_whitespace()).unwrap();
        let cli = Cli::from_arg_matches(&matches).unwrap();
        check(&matches, &cli.run).map_err(|e| e.to_string())
    }

    #[test]
    fn an_option_that_does_nothing_is_refused_by_name() {
        let primary = "--role primary --listen 1.2.3.4:5 --witness file:/w";
        for (line, says) in [
            ("--listen 1.2.3.4:5".to_owned(), "--listen does nothing in the role solo"),
            (
                "--witness file:/w".to_owned(),
                "it is for --role primary and --role backup and --role auto",
            ),
            ("--release ack".to_owned(), "--release"),
            ("--check-every 5".to_owned(), "--check-every does nothing without a log"),
            ("--max-input-delay 5".to_owned(), "--max-input-delay does nothing without a log"),
            ("--on-link-down ignore".to_owned(), "--on-link-down does nothing in the role solo"),
            (
                format!("{primary} --on-link-down ignore"),
                "--on-link-down does nothing without --net",
            ),
            ("--overwrite".to_owned(), "--overwrite does nothing without --record,"),
            (
                format!("{primary} --witness-ca c"),
                "--witness-ca does nothing with --witness file:PATH",
            ),
            (format!("{primary} --insecure-witness"), "--insecure-witness does nothing with"),
            (
                "--role primary --listen 1.2.3.4:5 --witness etcd:http://[::1] --witness-ca c"
                    .into(),
                "--witness-ca does nothing without https",
            ),
            (format!("{primary} --believe backup"), "without --on-divergence resync"),
            (
                format!("{primary} --connect 1.2.3.4:5"),
                "--connect does nothing in the role primary",
            ),
        ] {
            let error = answer(&line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
        for line in [
            String::new(),
            "--record r --check-every 5".to_owned(),
            format!("{primary} --believe backup --on-divergence resync --incident-dir /d"),
        ] {
            answer(&line).unwrap();
        }
    }

    #[test]
    fn every_option_in_the_table_is_one() {
        let command = Cli::command();
        for (id, _) in ONLY {
            assert!(command.get_arguments().any(|argument| argument.get_id() == *id), "{id}");
        }
    }
}
