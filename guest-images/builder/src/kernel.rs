//! The tiny kernel: Debian's source, kernel.config on top of `allnoconfig`.
//!
//! The result is reproducible: the names and times that Kbuild would take from the machine are
//! fixed (Documentation/kbuild/reproducible-builds.rst), and make sees none of the caller's
//! variables.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ftvmm_guest_programs::stream::reader_sha256;
use ftvmm_host_programs::Program;
use indicatif::{ProgressBar, ProgressStyle};

use crate::store::{Store, digest, not_started, succeeded};
use crate::{GuestBuildError, at};

const CONFIGURATION: &str = include_str!("../../kernel.config");

/// What a kernel without drivers for real hardware never compiles; it is two thirds of the archive.
/// Kconfig and Makefiles stay, since every configuration reads all of them.
const NOT_UNPACKED: &[&str] = &[
    "*/arch/[a-w]*/*.[chS]",
    "*/arch/xtensa/*.[chS]",
    "*/drivers/gpu/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/drivers/staging/*.[ch]",
    "*/sound/*.[ch]",
    "*/tools/testing/*",
    "*/Documentation/*.rst",
    "*/Documentation/*.txt",
    "*.dts",
    "*.dtsi",
    "*.yaml",
];

/// The whole environment of make, beside `PATH`.
const ENVIRONMENT: &[(&str, &str)] = &[
    ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
    ("KBUILD_BUILD_USER", "ftvmm"),
    ("KBUILD_BUILD_HOST", "ftvmm"),
    ("KBUILD_BUILD_VERSION", "1"),
    ("LC_ALL", "C"),
];

/// Lines that make prints for this configuration, for the progress bar; being wrong costs nothing.
const MAKE_LINES: u64 = 1530;
const BZIMAGE: &str = "bzImage";
const REDRAW_MS: u64 = 100;

/// Returns the bzImage, building it when the source, the configuration or this recipe is new.
pub(crate) fn build(store: &Store, source: &Path) -> Result<PathBuf, GuestBuildError> {
    let archive = File::open(source).and_then(reader_sha256).map_err(at(source))?;
    let recipe = format!("{NOT_UNPACKED:?} {ENVIRONMENT:?}");
    // Comments are left out: they do not change a kernel.
    let options: Vec<&str> = configuration_lines().collect();
    let digest = digest([&archive[..], options.join("\n").as_bytes(), recipe.as_bytes()]);
    let folder = store.publish("guest-kernel", &digest, |finished| {
        let work = store.temporary()?;
        let log = store.path("guest-kernel.log");
        let built = compile(source, work.path(), &log)?;
        let target = finished.join(BZIMAGE);
        fs::copy(&built, &target).map(drop).map_err(at(&target))
    })?;
    Ok(folder.join(BZIMAGE))
}

fn compile(source: &Path, work: &Path, log: &Path) -> Result<PathBuf, GuestBuildError> {
    File::create(log).map_err(at(log))?;
    let (tree, output) = (work.join("source"), work.join("build"));
    let make = |target: &str| -> Result<Command, GuestBuildError> {
        let mut command = Program::Make.command()?;
        command.env_clear().envs(ENVIRONMENT.iter().copied());
        command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.arg("-C").arg(&tree).arg(format!("O={}", output.display())).arg(target);
        Ok(command)
    };
    // What these lack is installed now, before there is a bar on the terminal.
    let (mut unpack, mut configure) = (Program::Tar.command()?, make("allnoconfig")?);

    let progress = Progress::new();
    progress.bar.set_message("unpacking the source");
    let configuration = work.join("kernel.config");
    [&tree, &output].into_iter().try_for_each(|path| fs::create_dir(path).map_err(at(path)))?;
    fs::write(&configuration, CONFIGURATION).map_err(at(&configuration))?;
    unpack.args(["--extract", "--strip-components=1", "--file"]).arg(source).arg("-C").arg(&tree);
    unpack.args(NOT_UNPACKED.iter().map(|pattern| format!("--exclude={pattern}")));
    progress.run(&mut unpack, log)?;

    progress.bar.set_message("configuring");
    progress.run(configure.env("KCONFIG_ALLCONFIG", &configuration), log)?;
    let written = output.join(".config");
    check_configuration(&fs::read_to_string(&written).map_err(at(&written))?)?;

    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    progress.run(make(BZIMAGE)?.arg(format!("-j{jobs}")), log)?;
    Ok(output.join("arch/x86/boot").join(BZIMAGE))
}

fn configuration_lines() -> impl Iterator<Item = &'static str> {
    CONFIGURATION.lines().filter(|line| line.starts_with("CONFIG_"))
}

/// Options that Linux 6.12 no longer has: it always does what they asked for.
const GONE_LATER: &[&str] =
    &["CONFIG_EMBEDDED=y", "CONFIG_BASE_FULL=y", "CONFIG_RANDOM_TRUST_BOOTLOADER=y"];

/// Checks that every line of our configuration is in Kconfig's: it drops what it cannot fulfil
/// silently.
fn check_configuration(written: &str) -> Result<(), GuestBuildError> {
    for line in configuration_lines().filter(|line| !GONE_LATER.contains(line)) {
        let honoured = match line.strip_suffix("=n") {
            // An option that is off is absent or in a comment.
            Some(option) => !written.lines().any(|l| l.starts_with(&format!("{option}="))),
            None => written.lines().any(|l| l == line),
        };
        if !honoured {
            return Err(GuestBuildError::ConfigurationIgnored { line: line.to_owned() });
        }
    }
    Ok(())
}

/// A bar that counts the lines a build prints and shows the current one.
struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn new() -> Self {
        eprintln!("building the guest kernel (once for each configuration, some minutes) ...");
        let bar = ProgressBar::new(MAKE_LINES);
        if let Ok(style) =
            ProgressStyle::with_template("{wide_bar} {percent}% [{elapsed}] {msg:40!}")
        {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(REDRAW_MS));
        Self { bar }
    }

    /// Runs a program to its end, its output in the log.
    fn run(&self, command: &mut Command, log: &Path) -> Result<(), GuestBuildError> {
        let mut file = File::options().create(true).append(true).open(log).map_err(at(log))?;
        let errors = file.try_clone().map_err(at(log))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().map_err(not_started(command))?;
        if let Some(output) = child.stdout.take() {
            self.follow(output, &mut file).map_err(at(log))?;
        }
        let status = child.wait().map_err(not_started(command))?;
        succeeded(command, status, log)
    }

    fn follow(&self, output: impl io::Read, log: &mut File) -> io::Result<()> {
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            writeln!(log, "{line}")?;
            self.bar.inc(1);
            self.bar.set_message(line.trim().to_owned());
        }
        Ok(())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_checked_line_by_line() {
        assert!(check_configuration(&CONFIGURATION.replace("=n", "=dropped-n")).is_err());
        let kept: String = CONFIGURATION
            .lines()
            .filter(|line| !line.ends_with("=n"))
            .map(|line| format!("{line}\n"))
            .collect();
        check_configuration(&kept).unwrap();
        let lost = kept.replace("CONFIG_VIRTIO_NET=y", "# CONFIG_VIRTIO_NET is not set");
        let error = check_configuration(&lost).unwrap_err().to_string();
        assert!(error.contains("CONFIG_VIRTIO_NET=y"), "{error}");
    }
}
