//! `ftvmm --kernel …`: what is the same before a run in any role, and the choice of the role.

use ftvmm_host::user_file::{self, Named};
use ftvmm_kvm::install_kick_handler;

use super::CommandError;
use super::args::{RoleArg, RunArgs};
use super::pair::pair;
use super::solo::solo;
use super::written::Written;

/// Runs a guest in the role the arguments name.
///
/// # Errors
/// Anything that ends the run badly.
pub fn start(args: &RunArgs) -> Result<(), CommandError> {
    let written = check_files(args)?;
    install_kick_handler()?;
    match args.role {
        RoleArg::Solo => solo(args, written),
        RoleArg::Primary | RoleArg::Backup | RoleArg::Auto => pair(args, written),
    }
}

/// Refuses files that would be lost, and reports that could not be written. The reports' places.
fn check_files(args: &RunArgs) -> Result<Written, CommandError> {
    let disk = args.disk.as_ref().map(|disk| disk.path.as_path());
    let label = args.disk.as_ref().and_then(|disk| disk.label.as_deref());
    let named = Named::default()
        .read("--kernel", args.kernel.as_deref())
        .read("--initrd", args.initrd.as_deref())
        .read("--cpu-template", args.cpu_template.as_deref())
        .read("--restore", args.restore.as_deref())
        .read("--channel-key", args.channel.channel_key.as_deref())
        .read("--tls-cert", args.channel.tls_cert.as_deref())
        .read("--tls-key", args.channel.tls_key.as_deref())
        .read("--tls-ca", args.channel.tls_ca.as_deref())
        .written("--disk", disk)
        .written("the label of --disk", label)
        .written("--control", args.control.as_deref())
        .written("--record", args.record.as_deref())
        .written("--report", args.written.report.as_deref())
        .written("--profile", args.written.profile.as_deref());
    named.check()?;
    if let Some(path) = &args.record {
        user_file::may_replace("recording", path, args.written.overwrite)?;
    }
    Written::places(&args.written)
}

#[cfg(test)]
mod tests {
    use super::super::args::tests::run_args;
    use super::*;

    #[test]
    fn no_file_is_lost_and_none_has_two_uses() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        for name in ["kernel", "log", "report", "notes", "profile"] {
            std::fs::write(path(name), "{}").unwrap();
        }
        std::fs::write(path("report"), r#"{"role":"solo","exits":7}"#).unwrap();
        std::fs::write(path("profile"), r#"{"threads":{},"cpu_ns":7}"#).unwrap();
        let check = |options: &[(&str, &str)]| {
            let options = options.iter().map(|(option, name)| format!("{option} {}", path(name)));
            let line = options.collect::<Vec<_>>().join(" ");
            check_files(&run_args(&line)).map_err(|error| error.to_string())
        };
        let kernel = ("--kernel", "kernel");
        check(&[kernel, ("--record", "new"), ("--report", "new.json")]).unwrap();
        check(&[kernel, ("--report", "report"), ("--profile", "profile")]).unwrap();
        for (options, says) in [
            (&[kernel, ("--record", "log")], "log' is there already"),
            (&[kernel, ("--report", "notes")], "notes' is there already"),
            (&[kernel, ("--profile", "report")], "report' is there already"),
            (&[("--kernel", "new"), ("--profile", "new")], "--profile"),
            (&[kernel, ("--record", "kernel")], "--kernel"),
            (&[("--kernel", "new"), ("--control", "new")], "--control"),
        ] {
            let error = check(options).unwrap_err();
            assert!(error.contains(says), "{options:?}: {error}");
        }
        let mut args = run_args(&format!("--kernel k --record {} --overwrite", path("log")));
        check_files(&args).unwrap();
        args.written.report = Some(path("notes").into());
        check_files(&args).unwrap();
    }
}
