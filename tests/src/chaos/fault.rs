//! What goes wrong in a round: who, what and for how long.

use std::fmt;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use nix::libc::{SIGCONT, SIGSTOP};

use crate::group::Member;
use crate::lab::{Lab, LabError};

/// Whose part in the pair the victim has when the fault begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The host whose outputs reach the clients.
    Active,
    /// The host that follows it.
    Standby,
}

/// What a network does to the frames one host sends on the link, as netem(8) has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Netem {
    /// Frames get lost.
    Loss,
    /// Frames come late, each by another time.
    Delay,
    /// Frames overtake each other.
    Reorder,
    /// A bit of a frame is flipped. TCP's checksum finds most of them.
    Corrupt,
    /// Frames come twice.
    Duplicate,
}

impl Netem {
    const ALL: [Self; 5] = [Self::Loss, Self::Delay, Self::Reorder, Self::Corrupt, Self::Duplicate];

    fn words(self) -> &'static [&'static str] {
        match self {
            Self::Loss => &["loss", "5%"],
            Self::Delay => &["delay", "30ms", "25ms"],
            Self::Reorder => &["delay", "10ms", "reorder", "40%"],
            Self::Corrupt => &["corrupt", "1%"],
            Self::Duplicate => &["duplicate", "10%"],
        }
    }
}

/// One way for a pair to be in trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SIGKILL to `ftvmm`.
    KillProcess,
    /// The host is gone, as if its power had been cut.
    KillHost,
    /// SIGSTOP to `ftvmm`, and SIGCONT later.
    PauseProcess,
    /// The host stands still, as a virtual machine that is paused, clocks and all.
    PauseHost,
    /// Nothing passes between the hosts.
    CutLink,
    /// What the victim is sent on the link does not reach it; what it sends does.
    CutOneWay,
    /// The link is bad.
    Netem(Netem),
    /// The witness's folder is gone for a while, and nothing else is wrong.
    WitnessGone,
    /// The witness's folder is gone for a while, and the victim's process dies meanwhile.
    WitnessGoneAndKill,
    /// The roles change on the operator's order, and the victim's process dies at a moment of it.
    KillWhileSwitching,
    /// The standby is let go and attached again; the victim's process dies at a moment of it.
    KillWhileAttaching,
    /// The victim's process dies. A person starts its guest anew beside the survivor, which is
    /// refused, and a supervisor starts the process again with the command line it had.
    RestartOldCommand,
}

/// All kinds, so that each has its turn.
pub const KINDS: [Kind; 16] = [
    Kind::KillProcess,
    Kind::PauseProcess,
    Kind::CutLink,
    Kind::KillWhileAttaching,
    Kind::KillHost,
    Kind::Netem(Netem::ALL[0]),
    Kind::RestartOldCommand,
    Kind::CutOneWay,
    Kind::Netem(Netem::ALL[1]),
    Kind::PauseHost,
    Kind::KillWhileSwitching,
    Kind::Netem(Netem::ALL[2]),
    Kind::WitnessGone,
    Kind::Netem(Netem::ALL[3]),
    Kind::WitnessGoneAndKill,
    Kind::Netem(Netem::ALL[4]),
];

/// A fault with everything that chance decides about it.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// What.
    pub kind: Kind,
    /// Whom.
    pub victim: Victim,
    /// So long after the clients have begun.
    pub after: Duration,
    /// For so long, where it has an end.
    pub lasts: Duration,
}

impl Fault {
    /// The fault of this round. Kinds take turns; all else is the seed's.
    pub fn of_round(number: u64, rng: &mut Rng, failure_timeout: Duration) -> Self {
        let kinds = KINDS.len() as u64;
        let kind = KINDS[(number % kinds) as usize];
        let victim = if rng.u8(..3) == 0 { Victim::Standby } else { Victim::Active };
        let after = Duration::from_millis(rng.u64(..1500));
        // From a hiccup to well above the time after which the peer counts as dead.
        let lasts = failure_timeout.mul_f64(0.2 + 2.8 * rng.f64());
        Self { kind, victim, after, lasts }
    }

    /// Does it, and takes back what can be taken back. `victim` and `other` have their roles of
    /// before the fault.
    ///
    /// # Errors
    /// What the lab said.
    pub fn inject(
        &self,
        lab: &Lab,
        witness: &str,
        victim: &Member<'_>,
        other: &Member<'_>,
    ) -> Result<(), LabError> {
        let host = lab.host(victim.host);
        match self.kind {
            Kind::KillProcess | Kind::RestartOldCommand => victim.process.kill(),
            Kind::KillHost => host.kill(),
            Kind::PauseProcess => {
                victim.process.signal(SIGSTOP);
                thread::sleep(self.lasts);
                victim.process.signal(SIGCONT);
            }
            Kind::PauseHost => {
                host.pause()?;
                thread::sleep(self.lasts);
                host.resume()?;
            }
            Kind::CutLink => {
                host.set_link(false)?;
                thread::sleep(self.lasts);
                host.set_link(true)?;
            }
            Kind::CutOneWay => {
                host.set_link_deaf(true)?;
                thread::sleep(self.lasts);
                host.set_link_deaf(false)?;
            }
            Kind::Netem(netem) => {
                host.spoil_link(netem.words())?;
                thread::sleep(self.lasts);
                host.spoil_link(&[])?;
            }
            Kind::WitnessGone | Kind::WitnessGoneAndKill => {
                let folder = lab.share().join(witness);
                let away = lab.share().join(format!("{witness}-away"));
                let moved = |from, to| std::fs::rename(from, to).map_err(crate::lab::at(&folder));
                moved(&folder, &away)?;
                if self.kind == Kind::WitnessGoneAndKill {
                    victim.process.kill();
                }
                thread::sleep(self.lasts);
                moved(&away, &folder)?;
            }
            Kind::KillWhileSwitching => {
                let active = if self.victim == Victim::Active { victim } else { other };
                let order = active.order(&["switch"])?;
                thread::sleep(self.lasts / 20);
                victim.process.kill();
                order.wait()?;
            }
            Kind::KillWhileAttaching => {
                // The caller attaches; here is only the moment.
                thread::sleep(self.lasts / 10);
                victim.process.kill();
            }
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, victim, after, lasts } = self;
        write!(f, "{kind:?} of the {victim:?} after {after:.2?} for {lasts:.2?}")
    }
}
