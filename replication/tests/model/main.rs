//! Every schedule of a small world: two hosts, a witness, a few outputs and a flush.
//!
//! The simulator (`tests/sim`) draws schedules of a large world; this search leaves nothing out of
//! a small one. The hosts are the product's [`Session`](ftvmm_replication::Session)s, the witness
//! decides with [`ftvmm_replication::witness::claim`]. Around them are a guest whose history is the
//! list of its inputs, its disk, and a connection whose messages arrive at any time (`world`).
//! Whatever may happen next is tried, depth first; states that were seen are not entered again
//! (`search`). What must hold is judged from outside (`check`), and from every state in which the
//! faults are used up the pair must come together again (`heal`).
//!
//! `FTVMM_MODEL_SCALE=<n>` allows n more faults and n more outputs in each scenario; the default is
//! 0. Decision 0036 has the bounds and what they leave out.
#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod check;
#[path = "../fingerprint/mod.rs"]
mod fingerprint;
mod guest;
mod heal;
mod host;
mod perform;
mod search;
mod store;
mod world;

use search::{Found, search};
use world::{Bounds, Order, World};

/// More of everything, from the environment.
fn scale() -> u8 {
    std::env::var("FTVMM_MODEL_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Searches a scenario and prints how many states it has.
fn explore(name: &str, world: World) -> Found {
    let bounds = world.bounds;
    let found = search(world);
    println!(
        "{name:<34} {:>8} states {:>9} steps {:>6} healed, depth {:>3}; {bounds:?}",
        found.states, found.steps, found.healed, found.depth
    );
    found
}

/// Explores a scenario in which everything must hold.
fn holds(name: &str, world: World) {
    let found = explore(name, world);
    if let Some(violation) = found.violation {
        panic!("{name}: {violation}");
    }
    assert!(found.states > 100 && found.healed > 0, "{name}: the search goes nowhere");
}

fn bounds() -> Bounds {
    let more = scale();
    Bounds { outputs: 2 + more, faults: 1 + more, beats: 1, ..Bounds::default() }
}

#[test]
fn a_pair_that_starts() {
    holds("a pair that starts", World::cold(Bounds { outputs: 1 + scale(), ..bounds() }));
}

#[test]
fn a_pair_that_runs() {
    holds("a pair that runs", World::pair(bounds()));
}

#[test]
fn a_pair_with_a_host_that_stands_still() {
    let bounds = Bounds { outputs: 1 + scale(), faults: scale(), pauses: 2, ..bounds() };
    holds("a host that stands still", World::pair(bounds));
}

#[test]
fn a_pair_that_changes_its_roles() {
    let bounds = Bounds { outputs: 1, orders: 1, beats: scale(), ..bounds() };
    holds("roles that change", World::pair(bounds).with_order(Order::Switch));
}

#[test]
fn a_backup_that_is_let_go() {
    let bounds = Bounds { outputs: 1, orders: 1, ..bounds() };
    holds("a backup that is let go", World::pair(bounds).with_order(Order::Detach));
}

#[test]
fn a_guest_alone_that_gets_a_backup() {
    holds("a backup that joins", World::alone(bounds()));
}

#[test]
fn a_host_started_again_with_the_old_command_line() {
    let bounds = Bounds { outputs: 1, orders: 1, ..bounds() };
    holds("the old command line again", World::pair(bounds).with_order(Order::OldCommand));
}

#[test]
fn a_guest_that_runs_is_not_started_alone_again() {
    let bounds = Bounds { outputs: 1, orders: 1, ..bounds() };
    holds("started alone beside a pair", World::pair(bounds).with_order(Order::StartAlone));
}

/// The search finds what comes of a witness that grants whatever is asked for: two machines are
/// live, or a guest that begins anew answers clients of the old one.
#[test]
fn an_operator_who_overrides_the_witness_is_found_out() {
    let bounds = Bounds { outputs: 1, orders: 1, ..bounds() };
    let found = explore("overridden", World::pair(bounds).with_order(Order::StartAnyway));
    println!("{}", found.violation.expect("a second machine is live"));
}
