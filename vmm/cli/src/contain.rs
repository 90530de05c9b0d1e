//! `--seccomp`, `--landlock`, `--user`, `--chroot`: what a run may still do (decision 0034).

use std::path::PathBuf;

use ftvmm_host::contain::{
    Mode, Reach, Thread, User, change_root, configure, make_devices, try_enter,
};
use ftvmm_host::entropy::host_random_bytes;

use super::CommandError;
use super::args::RunArgs;
use super::contain_args::{Landlock, Seccomp};
use super::disk_arg::DiskArg;
use super::witness_arg::WitnessArg;

/// Files that the resolver and the clocks of the processor's thread are read from.
const READ: &[&str] = &["/proc", "/sys", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"];
/// What a tap is opened through, again when it was deleted and made anew.
const TUN: &str = "/dev/net/tun";

/// Takes on what counts for the whole process. Before the first thread is started.
///
/// # Errors
/// When a user is not there, or the kernel refuses.
pub fn begin(args: &RunArgs) -> Result<(), CommandError> {
    let options = &args.contain;
    let wrong = |option: &'static str| {
        move |error: &dyn std::error::Error| {
            CommandError::Configuration(format!("{option}: {error}"))
        }
    };
    // A static libc reads random bytes from /dev/urandom, which it opens once. Who needs one on a
    // host that has none says so.
    let _ = host_random_bytes(1);
    // Looked up in the lists of the host, not in those of the new root.
    let user = options.user.as_deref().map(User::parse).transpose();
    let user = user.map_err(|error| wrong("--user")(&error))?;
    if let Some(root) = &options.chroot {
        make_devices(root, user.as_ref()).map_err(|error| wrong("--chroot")(&error))?;
        change_root(root).map_err(|error| wrong("--chroot")(&error))?;
    }
    if let Some(user) = user {
        user.become_it().map_err(|error| wrong("--user")(&error))?;
    }
    let mode = match options.seccomp {
        Seccomp::On => Mode::On,
        Seccomp::Log => Mode::Log,
        Seccomp::Off => Mode::Off,
    };
    let reach = (options.landlock == Landlock::On).then(|| reach(args));
    configure(mode, reach.as_ref()).map_err(|error| wrong("--landlock")(&error))
}

/// Set-up is over: this thread runs the guest from now on, and nothing else.
///
/// # Errors
/// When the kernel refuses.
pub fn run_guest() -> Result<(), CommandError> {
    try_enter(Thread::Vcpu).map_err(|error| CommandError::Configuration(error.to_string()))
}

/// What is still opened, made, renamed or removed after set-up. A recording is open by then.
fn reach(args: &RunArgs) -> Reach {
    let read = READ.iter().map(PathBuf::from).collect();
    let label = args.disk.as_ref().and_then(DiskArg::label_file);
    let mut folders = Vec::new();
    if args.witness.is_some() {
        folders.push(args.incident_dir.clone());
    }
    folders.extend(args.contain.snapshot_dir.clone());
    let devices = args.net.iter().map(|_| PathBuf::from(TUN)).collect();
    Reach { read, devices, folders }
        .folder_of(args.written.report.as_deref())
        .folder_of(args.written.profile.as_deref())
        .folder_of(args.control.as_deref())
        .folder_of(args.witness.as_ref().and_then(WitnessArg::file))
        .folder_of(label.as_deref())
}

#[cfg(test)]
mod tests {
    use super::super::args::tests::run_args;
    use super::*;

    #[test]
    fn what_the_command_line_names_can_be_reached_and_no_more() {
        let args = run_args(
            "--kernel /k/kernel --role primary --listen 1.2.3.4:5 --witness file:/w/witness \
             --incident-dir /incidents --record /r/log --report report.json --control /c/socket \
             --snapshot-dir /snapshots --disk path=/d/disk",
        );
        let Reach { read, devices, folders } = reach(&args);
        assert!(devices.is_empty(), "there is no tap");
        let names = |paths: &[PathBuf]| -> Vec<String> {
            paths.iter().map(|path| path.display().to_string()).collect()
        };
        assert_eq!(names(&folders), ["/incidents", "/snapshots", ".", "/c", "/w", "/d"]);
        assert_eq!(names(&read), READ);
        assert!(reach(&run_args("--kernel /k/kernel")).folders.is_empty());
    }

    #[test]
    fn a_user_that_is_not_there_is_named() {
        let args = run_args("--kernel k --user nobody-of-this-name");
        let error = begin(&args).unwrap_err();
        assert_eq!(error.status(), 2);
        assert!(error.to_string().starts_with("--user: "), "{error}");
        assert!(error.to_string().contains("'nobody-of-this-name'"), "{error}");
    }
}
