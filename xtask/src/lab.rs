//! `cargo xtask lab`: runs one command on host `a` of a fresh lab.

use std::error::Error;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ftvmm_guest_images::GuestKernel;
use ftvmm_tests::lab::{Backend, IntelConfig, IntelHost, Lab, LabConfig, LabProcess};
use ftvmm_tests::progress::Step;

use crate::hosts::log_folder;
use crate::{cargo, guest};

/// Arguments of `cargo xtask lab`.
#[derive(clap::Args)]
#[allow(rustdoc::invalid_html_tags, reason = "clap prints these texts as they are")]
pub struct LabArguments {
    /// Whose CPU the emulated host has; an Intel host has the guest images in /share, no network,
    /// and takes minutes to boot
    #[arg(long, value_enum, value_name = "MAKER", default_value_t = Maker::Amd)]
    host: Maker,
    /// Number of hosts; the command runs on the first, `b` is reached at 10.77.0.2
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    hosts: u8,
    /// Memory of each host in MiB
    #[arg(long, value_name = "MiB", default_value_t = 1536)]
    mem: u32,
    /// Folder for consoles, logs and the shared directory [default: out/lab/<time>]
    #[arg(long, value_name = "D")]
    log_dir: Option<PathBuf>,
    /// Files to put into /share/bin, beside ftvmm
    #[arg(long, value_name = "FILE", num_args = 1..)]
    copy: Vec<PathBuf>,
    /// Do not build and carry in ftvmm
    #[arg(long)]
    no_ftvmm: bool,
    /// Give up when nothing was heard for so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    silence: u64,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Makers of emulated CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Maker {
    /// QEMU, with AMD-V.
    Amd,
    /// Bochs, with VMX.
    Intel,
}

/// Runs the command; its exit status is ours.
pub fn run(arguments: &LabArguments) -> Result<ExitCode, Box<dyn Error>> {
    let agent = cargo::build("ftvmm-tests", "lab-agent")?;
    let mut programs = arguments.copy.clone();
    if !arguments.no_ftvmm {
        programs.push(cargo::build("ftvmm", "ftvmm")?);
    }
    let folder = log_folder("lab", arguments.log_dir.as_deref());
    if arguments.host == Maker::Intel {
        return run_on_intel(arguments, agent, programs, folder);
    }
    let config = LabConfig {
        backend: Backend::Lab,
        hosts: usize::from(arguments.hosts),
        memory_mib: arguments.mem,
        folder,
        silence: Duration::from_secs(arguments.silence),
        agent,
        counts_instructions: false,
    };
    let step = Step::start("starting the lab");
    let lab = Lab::start(config)?;
    drop(step);
    for program in &programs {
        lab.install(program)?;
    }
    eprintln!("logs: {}", lab.folder().display());
    follow(lab.host(0).spawn_visible(&arguments.command)?)
}

fn run_on_intel(
    arguments: &LabArguments,
    agent: PathBuf,
    programs: Vec<PathBuf>,
    folder: PathBuf,
) -> Result<ExitCode, Box<dyn Error>> {
    if arguments.hosts > 1 {
        return Err("an Intel host stands alone: --hosts 1".into());
    }
    let images = guest::ensure()?;
    let kernels = [GuestKernel::Tiny, GuestKernel::Cloud];
    let step = Step::start("starting an Intel host");
    let host = IntelHost::start(&IntelConfig {
        folder: folder.clone(),
        silence: Duration::from_secs(arguments.silence),
        memory_mib: arguments.mem,
        agent,
        programs,
        files: kernels.into_iter().flat_map(|kernel| images.boot_files(kernel)).collect(),
    })?;
    drop(step);
    eprintln!("logs: {}", folder.display());
    follow(host.spawn_visible(&arguments.command)?)
}

/// Feeds the program from our own input to its end.
fn follow(process: LabProcess) -> Result<ExitCode, Box<dyn Error>> {
    let process = Arc::new(process);
    let fed = Arc::clone(&process);
    // Never joined: a read from a terminal cannot be interrupted, the end of the program can.
    thread::spawn(move || feed_from_own_stdin(&fed));
    let ended = process.wait()?;
    Ok(ExitCode::from(u8::try_from(ended.shell_code()).unwrap_or(u8::MAX)))
}

fn feed_from_own_stdin(process: &LabProcess) {
    let mut buffer = [0; 4096];
    let mut input = std::io::stdin().lock();
    while let Ok(count @ 1..) = input.read(&mut buffer) {
        process.write_stdin(&buffer[..count]);
    }
    process.close_stdin();
}
