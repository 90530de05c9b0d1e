//! `cargo xtask lab`: runs one command on host `a` of a fresh lab.

use std::error::Error;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ftvmm_tests::clock;
use ftvmm_tests::lab::{Backend, Lab, LabConfig, LabProcess};
use ftvmm_tests::progress::Step;

use crate::cargo;

/// Arguments of `cargo xtask lab`.
#[derive(clap::Args)]
pub struct LabArguments {
    /// Number of hosts; the command runs on the first, `b` is reached at 10.77.0.2
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    hosts: u8,
    /// Memory of each host in MiB
    #[arg(long, value_name = "MiB", default_value_t = 1024)]
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

/// Runs the command; its exit status is ours.
pub fn run(arguments: &LabArguments) -> Result<ExitCode, Box<dyn Error>> {
    let agent = cargo::build("ftvmm-tests", "lab-agent")?;
    let mut programs = arguments.copy.clone();
    if !arguments.no_ftvmm {
        programs.push(cargo::build("ftvmm", "ftvmm")?);
    }
    let folder = match &arguments.log_dir {
        Some(folder) => folder.clone(),
        None => default_folder(),
    };
    let config = LabConfig {
        backend: Backend::Lab,
        hosts: usize::from(arguments.hosts),
        memory_mib: arguments.mem,
        folder,
        silence: Duration::from_secs(arguments.silence),
        agent,
    };
    let step = Step::start("starting the lab");
    let lab = Lab::start(config)?;
    drop(step);
    for program in &programs {
        lab.install(program)?;
    }
    eprintln!("logs: {}", lab.folder().display());
    let process = Arc::new(lab.host(0).spawn_visible(&arguments.command)?);
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

fn default_folder() -> PathBuf {
    let seconds = clock::since_epoch().as_secs();
    PathBuf::from(format!("out/lab/{seconds}-{}", std::process::id()))
}
