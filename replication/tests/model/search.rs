//! Depth first through all states, each once.

use core::fmt::{self, Write as _};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use xxhash_rust::xxh3::Xxh3Default;

use crate::world::{Step, World};

/// One in so many states is healed: those after it are tried too, and come from the same trouble.
const HEALED_ONE_IN: u128 = 4;

/// What a search came to.
#[derive(Default)]
pub struct Found {
    pub states: u64,
    pub steps: u64,
    /// States from which the pair had to come together again.
    pub healed: u64,
    pub depth: usize,
    /// What does not hold, and the way there.
    pub violation: Option<String>,
}

/// A state on the way, and what is not tried there yet.
struct Place {
    world: World,
    by: Option<Step>,
    untried: Vec<Step>,
}

/// A digest of whatever can be printed.
#[derive(Default)]
struct Digest(Xxh3Default);

impl fmt::Write for Digest {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

/// Two states of the same digest are one; 128 bits make another case unlikely.
fn digest(world: &World) -> u128 {
    let mut digest = Digest::default();
    let World { bounds, order: _, now_ns, hosts, net, witness, checker, crashes } = world;
    let around = (bounds, now_ns, net, witness, checker, *crashes > 0);
    write!(digest, "{around:?}").expect("a digest takes everything");
    for host in hosts {
        let own = (host.life, host.mode, &host.guest, host.disk, &host.pending, host.horizon);
        let rest = (host.sends, host.claim, host.connected, host.overrides, host.gone);
        write!(digest, "{own:?}{rest:?}").expect("a digest takes everything");
        // What a host that is gone thought does not matter.
        if !host.gone {
            write!(digest, "{:?}", host.session.state()).expect("a digest takes everything");
        }
    }
    digest.0.digest128()
}

fn text_of(panic: &(dyn core::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Tries every schedule, up to the first in which something does not hold.
pub fn search(world: World) -> Found {
    let mut found = Found::default();
    let mut seen = BTreeSet::from([digest(&world)]);
    let untried = world.steps();
    let mut way = vec![Place { world, by: None, untried }];
    found.states = 1;
    while let Some(place) = way.last_mut() {
        let Some(step) = place.untried.pop() else {
            way.pop();
            continue;
        };
        let mut next = place.world.clone();
        found.steps += 1;
        let result = catch_unwind(AssertUnwindSafe(|| {
            next.take(step);
            next
        }));
        let result = result.and_then(|next| {
            let digest = digest(&next);
            if !seen.insert(digest) {
                return Ok(None);
            }
            found.states += 1;
            // Elsewhere a fault or a pause may still come; the states after it are tried too.
            let is_drawn = digest.is_multiple_of(HEALED_ONE_IN);
            if next.bounds.faults == 0 && next.bounds.pauses == 0 && is_drawn {
                found.healed += 1;
                catch_unwind(AssertUnwindSafe(|| next.clone().heal()))?;
            }
            Ok(Some(next))
        });
        match result {
            Ok(None) => {}
            Ok(Some(world)) => {
                let untried = world.steps();
                way.push(Place { world, by: Some(step), untried });
                found.depth = found.depth.max(way.len());
            }
            Err(panic) => {
                let steps: Vec<_> = way.iter().filter_map(|place| place.by).collect();
                let what = text_of(&*panic);
                found.violation = Some(format!("{what}, after {steps:?}, then {step:?}"));
                return found;
            }
        }
    }
    found
}
