//! `selfcheck`: varied work whose every result is checked, summed up in two hashes.
//!
//! - `work=` covers what does not depend on time or chance: the same for a number of rounds on
//!   every machine.
//! - the hash after `ok` covers, in order, also what does: random bytes, clock readings, process
//!   ids, ports. A replay prints the line of its recording; two boots print different ones.
//!
//! Whatever runs side by side is collected in a fixed order, so that neither hash depends on a
//! scheduler.

mod checks;

use nix::sys::signal::{SigSet, Signal};
use sha2::{Digest, Sha256};

use crate::AppletError;
use crate::options::Options;
use crate::stream::hex;

/// What a check found wrong.
#[derive(Debug, thiserror::Error)]
#[error("{check} in round {round}: {what}")]
pub struct WrongResult {
    check: &'static str,
    round: u64,
    what: String,
}

/// Both hashes while the work goes on.
#[derive(Default)]
struct Findings {
    work: Sha256,
    run: Sha256,
}

impl Findings {
    /// A result that is the same every time.
    fn fixed(&mut self, bytes: impl AsRef<[u8]>) {
        self.work.update(&bytes);
        self.run.update(&bytes);
    }

    /// A result that another boot would not give.
    fn varying(&mut self, bytes: impl AsRef<[u8]>) {
        self.run.update(bytes);
    }

    fn line(self, rounds: u64) -> String {
        let run = hex(&self.run.finalize());
        let work = hex(&self.work.finalize());
        format!("SELFCHECK ok {} rounds={rounds} work={}", &run[..32], &work[..32])
    }
}

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let rounds = options.position(0, "a number of rounds")?.unwrap_or(1);
    // Before any thread exists, so that every thread inherits it and the signals stay for `wait`.
    SigSet::from_iter([Signal::SIGUSR1, Signal::SIGALRM])
        .thread_block()
        .map_err(|errno| AppletError::io("sigmask")(errno.into()))?;
    let mut findings = Findings::default();
    for round in 0..rounds {
        for (check, run) in checks::ALL {
            findings.fixed(check);
            run(&mut findings, round).map_err(|error| {
                let what = error.to_string();
                WrongResult { check, round, what }
            })?;
        }
    }
    println!("{}", findings.line(rounds));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_varies_leaves_the_work_hash_alone_and_nothing_else() {
        let line = |fixed: &str, varying: &str| {
            let mut findings = Findings::default();
            findings.fixed(fixed);
            findings.varying(varying);
            findings.line(1)
        };
        let part = |line: String, at: usize| line.split(' ').nth(at).unwrap().to_owned();
        assert_ne!(part(line("a", "b"), 2), part(line("a", "c"), 2));
        assert_eq!(part(line("a", "b"), 4), part(line("a", "c"), 4));
        assert_ne!(part(line("a", "b"), 4), part(line("d", "b"), 4));
        assert_eq!(line("a", "b"), line("a", "b"));
    }
}
