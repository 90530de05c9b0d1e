//! The determinism stress: random guests, each recorded once and replayed twice.
//!
//! A case follows from a seed and a number. It is a list of parts: blocks of a bare guest
//! ([`bare`]) or commands of a Linux guest ([`linux`]), sometimes with Debian's kernel ([`cloud`]).
//! A replay must end with the same digest of registers, memory and devices, after the same exits,
//! inputs and outputs, and have printed the same. When it does not, parts are left out as long as
//! the failure stays ([`minimise()`]), and what is left is kept with its recording.

pub mod bare;
pub mod cloud;
mod error;
pub mod linux;
mod minimise;
mod session;
mod trial;

use fastrand::Rng;

use bare::{BareGuest, Features};
use cloud::CloudGuest;
use linux::LinuxGuest;

pub use error::StressError;
pub use minimise::minimise;
pub use session::{Settings, Summary, run};
pub use trial::Trial;

/// One case in so many is a Linux guest, which takes some ten times as long.
const LINUX_SHARE: u64 = 10;

/// One in so many boots Debian's cloud kernel, which takes ten times as long again.
const CLOUD_SHARE: u64 = 40;

/// What kind of guest a case runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A kernel of random blocks.
    Bare,
    /// The tiny Linux guest with a random script.
    Linux,
    /// Debian's cloud kernel: modules, another kernel, floating-point faults.
    Cloud,
}

enum Plan {
    Bare { guest: BareGuest, typing_pause_us: u32 },
    Linux(LinuxGuest),
    Cloud(CloudGuest),
}

/// A case: what is run, before it is.
pub struct Case {
    /// Its number under its seed.
    pub number: u64,
    plan: Plan,
}

impl Case {
    /// The case `number` of `seed`; `only` decides its kind, which else is drawn.
    pub fn random(seed: u64, number: u64, only: Option<Kind>, features: Features) -> Self {
        let own = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number);
        let mut rng = Rng::with_seed(own);
        let drawn = if number % CLOUD_SHARE == CLOUD_SHARE - 1 {
            Kind::Cloud
        } else if number % LINUX_SHARE == LINUX_SHARE - 1 {
            Kind::Linux
        } else {
            Kind::Bare
        };
        let plan = match only.unwrap_or(drawn) {
            Kind::Bare => {
                let guest = BareGuest::random(rng.u64(..), features);
                let typing_pause_us = if guest.listens() { rng.u32(500..20_000) } else { 0 };
                Plan::Bare { guest, typing_pause_us }
            }
            Kind::Linux => Plan::Linux(LinuxGuest::random(&mut rng)),
            Kind::Cloud => Plan::Cloud(CloudGuest::random(&mut rng)),
        };
        Self { number, plan }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self.plan {
            Plan::Bare { .. } => Kind::Bare,
            Plan::Linux(_) => Kind::Linux,
            Plan::Cloud(_) => Kind::Cloud,
        }
    }

    /// What its parts are called.
    pub fn parts(&self) -> Vec<&str> {
        match &self.plan {
            Plan::Bare { guest, .. } => guest.parts(),
            Plan::Linux(guest) => guest.parts(),
            Plan::Cloud(guest) => guest.parts(),
        }
    }

    /// All its parts, by number.
    pub fn all(&self) -> Vec<usize> {
        (0..self.parts().len()).collect()
    }
}
