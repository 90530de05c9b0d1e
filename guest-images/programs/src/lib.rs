//! What runs inside the test guest, as a library: the applets of `ftguest`, and the byte stream
//! that a client outside needs to check what it downloaded ([`stream`]).
//!
//! Invariants every applet keeps, because interrupts reach the guest only when it exits to the VMM:
//! - nothing spins on a flag that only an interrupt can change; waiting is a system call;
//! - nothing calls the blocking `getrandom`, hence no `HashMap` with its random state.

mod clockres;
pub mod compute;
mod discard;
pub mod echo;
pub mod http;
pub mod httpd;
mod jitter;
mod kexec;
pub mod ledger;
pub mod options;
pub mod param;
mod rdtsc;
pub mod selfcheck;
pub mod serve;
mod sigfpe;
pub mod stream;
pub mod tsccheck;

use std::io;

use options::Options;

/// One program of the multi-call binary.
pub struct Applet {
    /// The name it is called by.
    pub name: &'static str,
    /// Its arguments and what it does, for the usage text.
    pub usage: &'static str,
    run: fn(&Options) -> Result<(), AppletError>,
}

/// Every applet; the initramfs makes a link for each.
pub const APPLETS: &[Applet] = &[
    Applet {
        name: "clockres",
        usage: "[COUNT]   read the clock COUNT times, print some readings and its resolution",
        run: clockres::main,
    },
    Applet {
        name: "compute",
        usage: "ROUNDS|SECONDSs   compute, then print a checksum and the rounds done",
        run: compute::main,
    },
    Applet {
        name: "discardd",
        usage: "[--port 9] [--detach]   TCP server that reads everything and answers nothing",
        run: discard::main,
    },
    Applet {
        name: "echod",
        usage: "[--port 7] [--detach]   TCP and UDP echo server",
        run: echo::main,
    },
    Applet {
        name: "httpd",
        usage: "[--port 80] [--root /srv] [--detach]   files, and /bytes/N[/SEED]",
        run: httpd::main,
    },
    Applet {
        name: "jitter",
        usage: "[COUNT]   numbers of the kernel's jitter entropy generator, which is a module",
        run: jitter::main,
    },
    Applet {
        name: "kexec",
        usage: "KERNEL INITRAMFS CMDLINE   start another kernel at once",
        run: kexec::main,
    },
    Applet {
        name: "ledger",
        usage: "FILE [--check] [--count N] [--journal delete]   a database: transactions for ever",
        run: ledger::main,
    },
    Applet {
        name: "param",
        usage: "NAME [DEFAULT]   print a parameter of the kernel command line",
        run: param::main,
    },
    Applet {
        name: "rdtsc",
        usage: "[COUNT]   read the time stamp counter COUNT times, check that it only grows",
        run: rdtsc::main,
    },
    Applet {
        name: "selfcheck",
        usage: "[ROUNDS]   varied work, checked; prints `SELFCHECK ok HASH …`",
        run: selfcheck::main,
    },
    Applet {
        name: "sigfpe",
        usage: "[COUNT]   take COUNT faults of each kind of division by zero",
        run: sigfpe::main,
    },
    Applet {
        name: "spin",
        usage: "[ROUNDS]   compute in registers alone, then print a checksum",
        run: compute::spin,
    },
    Applet {
        name: "streamsum",
        usage: "[N [SEED]]   SHA-256 of /bytes/N, or of standard input without N",
        run: stream::main,
    },
    Applet {
        name: "tsccheck",
        usage: "[--hidden] [--aux-zero] [--faults 1000]   RDTSC in every shape, and #GPs",
        run: tsccheck::main,
    },
];

/// Why an applet failed.
#[derive(Debug, thiserror::Error)]
pub enum AppletError {
    /// There is no applet of this name.
    #[error("no applet {name:?}")]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// The arguments make no sense.
    #[error("bad argument {argument:?}: want {wanted}")]
    Usage {
        /// What was given.
        argument: String,
        /// What is accepted.
        wanted: &'static str,
    },
    /// The system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was attempted.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel command line has no such parameter and no default was given.
    #[error("the kernel command line has no {name}")]
    NoParameter {
        /// The parameter asked for.
        name: String,
    },
    /// A counter or a clock went backwards.
    #[error("time went back from {before} to {after}")]
    CounterWentBack {
        /// The earlier reading.
        before: u64,
        /// The later reading.
        after: u64,
    },
    /// A fault did not come, or came too often.
    #[error("{faults} faults came, not {wanted}")]
    Faults {
        /// How many signals there were.
        faults: u64,
        /// How many there should be.
        wanted: u64,
    },
    /// The guest computed something wrong.
    #[error("SELFCHECK failed: {0}")]
    SelfCheck(#[from] selfcheck::WrongResult),
    /// The database does not hold what was committed.
    #[error("LEDGER failed: {0}")]
    Ledger(#[from] ledger::BadLedger),
    /// The time stamp counter is not what it should be.
    #[error("TSCCHECK failed: {0}")]
    Tsc(#[from] tsccheck::WrongTsc),
}

impl AppletError {
    /// Adapter for `map_err`: what was being done when the system refused.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

/// Runs one applet to its end.
///
/// # Errors
/// What the applet says, or that there is none of this name.
pub fn run(name: &str, arguments: &[String]) -> Result<(), AppletError> {
    let applet = APPLETS
        .iter()
        .find(|applet| applet.name == name)
        .ok_or_else(|| AppletError::Unknown { name: name.to_owned() })?;
    (applet.run)(&Options::new(arguments))
}

/// One line for each applet.
pub fn usage() -> String {
    APPLETS.iter().map(|applet| format!("ftguest {} {}\n", applet.name, applet.usage)).collect()
}
