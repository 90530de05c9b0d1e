//! What a run costs its host, in instructions: on a lab host whose clocks count them.
//!
//! One host, one emulated processor: clients, guest and both halves of a pair take turns on it, and
//! what each process has had of it is what it executed. A client runs on the host too, so nothing
//! outside it is waited for while something is measured.

use std::collections::BTreeMap;
use std::path::Path;

use ftvmm_guest_images::GuestKernel;
use serde::{Deserialize, Serialize};

use crate::group::{Group, Member, Status};
use crate::guest_run::{GUEST_ADDRESS, GuestLab, SECOND_TAP};
use crate::lab::{Lab, LabError, at};
use crate::measure::WARM_UP;
use crate::pair::{ChannelWay, GuestFiles, READY, RunOptions};

/// Phases of a profile in which a thread works for nobody.
const WAIT: &str = "wait";
/// The ways to run the guest.
const SOLO: &str = "solo";
const RECORDED: &str = "recorded";
const PAIR: &str = "pair";
const IN_CLEAR: &str = "pair in clear";
const WAYS: [&str; 4] = [SOLO, RECORDED, PAIR, IN_CLEAR];
/// No failure is to be seen where time passes as instructions do.
const PATIENT: [&str; 2] = ["--failure-timeout-ms", "60000"];

/// Something that is done a number of times.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name in tables.
    pub title: &'static str,
    /// What one of it is called there.
    pub unit: &'static str,
    /// How `traffic` calls it; none is to let time pass.
    traffic: Option<&'static str>,
    count: u64,
    /// What `traffic` does before it counts.
    more: u64,
}

/// What is measured, in this order.
pub const WORKLOADS: [Workload; 5] = [
    Workload {
        title: "UDP echo",
        unit: "echo",
        traffic: Some("udp"),
        count: 1500,
        more: WARM_UP as u64,
    },
    Workload {
        title: "HTTP",
        unit: "request",
        traffic: Some("http"),
        count: 300,
        more: WARM_UP as u64,
    },
    Workload { title: "sent", unit: "MiB", traffic: Some("from"), count: 32, more: 0 },
    Workload { title: "received", unit: "MiB", traffic: Some("to"), count: 32, more: 0 },
    Workload { title: "idle", unit: "second", traffic: None, count: 20, more: 0 },
];

/// What one side spends on one unit of a workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Instructions of the process: the guest's, KVM's and its own.
    pub instructions: u64,
    /// Exits of the guest.
    pub exits: f64,
    /// Ticks by phase, all threads together. What another process executed while a thread was
    /// interrupted in a phase is in them too.
    pub phases: BTreeMap<String, u64>,
}

/// By workload and side: `solo`, `recorded`, `primary`, `backup`, and these two in clear.
pub type Costs = BTreeMap<String, BTreeMap<String, Cost>>;

/// What `ftvmm profile` prints.
#[derive(Clone, Debug, Deserialize)]
struct Profile {
    elapsed_ns: u64,
    cpu_ns: u64,
    threads: BTreeMap<String, BTreeMap<String, Spent>>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Spent {
    ticks: u64,
}

impl Profile {
    fn by_phase(&self) -> BTreeMap<String, u64> {
        let mut sum = BTreeMap::new();
        for (phase, spent) in self.threads.values().flatten() {
            *sum.entry(phase.clone()).or_default() += spent.ticks;
        }
        sum.remove(WAIT);
        sum
    }
}

/// What is known of a side at one moment.
struct Mark {
    profile: Profile,
    exit: u64,
}

impl Mark {
    /// Of what `ftvmm profile` and `ftvmm status --json` print.
    fn read(lines: &[&str]) -> Result<Self, serde_json::Error> {
        let profile = serde_json::from_str(lines[0])?;
        let status: Status = serde_json::from_str(lines[1])?;
        Ok(Self { profile, exit: status.exit })
    }
}

impl Workload {
    /// What one unit costs a side that was so before and after.
    fn cost(&self, before: &Mark, after: &Mark) -> Cost {
        let elapsed_ns = after.profile.elapsed_ns - before.profile.elapsed_ns;
        // What is idle is counted by its own clock: more passes than was asked for.
        let units = match self.traffic {
            Some(_) => (self.count + self.more) as f64,
            None => elapsed_ns as f64 / 1e9,
        };
        let each = |total: u64| (total as f64 / units).round() as u64;
        let [from, to] = [before, after].map(|mark| mark.profile.by_phase());
        let spent = |(phase, ticks): (String, u64)| {
            let more = ticks - from.get(&phase).copied().unwrap_or_default();
            (phase, each(more))
        };
        Cost {
            instructions: each(after.profile.cpu_ns - before.profile.cpu_ns),
            exits: (after.exit - before.exit) as f64 / units,
            phases: to.into_iter().map(spent).collect(),
        }
    }
}

/// The guest in one way to run it, with the sides that are looked at.
struct Running<'a> {
    lab: &'a Lab,
    sides: Vec<(&'static str, Member<'a>)>,
}

/// Measures everything on one host.
///
/// # Errors
/// What the lab or a run said.
pub fn measure(
    folder: &Path,
    mut said: impl FnMut(&str),
) -> Result<Costs, Box<dyn std::error::Error>> {
    let site = GuestLab::start_counting(folder)?;
    let files = GuestFiles::of(&site, GuestKernel::Tiny);
    let mut costs = Costs::new();
    for way in WAYS {
        said(&format!("{way}: boot"));
        let channel = if way == IN_CLEAR { ChannelWay::InClear } else { ChannelWay::Proved };
        let options = RunOptions { channel, ..RunOptions::default() };
        let group = Group::new(&site.lab, &files, options)?;
        let running = start(&site, &group, way)?;
        // Addresses are resolved and caches are warm before anything counts.
        running.script(&[running.traffic("udp", 20)])?;
        for workload in &WORKLOADS {
            said(&format!("{way}: {}", workload.title));
            for (side, cost) in running.cost(workload)? {
                costs.entry(workload.title.to_owned()).or_default().insert(side.to_owned(), cost);
            }
        }
        running.stop()?;
    }
    Ok(costs)
}

fn start<'a>(
    site: &'a GuestLab,
    group: &Group<'a>,
    way: &'static str,
) -> Result<Running<'a>, Box<dyn std::error::Error>> {
    let profile = |name: &str| site.inside(format!("profile-{name}.json"));
    let lab = &site.lab;
    let mut sides = Vec::new();
    match way {
        PAIR | IN_CLEAR => {
            let of_primary = profile("primary");
            let of_backup = profile("backup");
            let patient = |profile| [&PATIENT[..], &["--profile", profile]].concat();
            let primary = group.start_primary(0, &patient(&of_primary))?;
            let backup = group.through(SECOND_TAP).join(0, 0, &patient(&of_backup))?;
            sides.extend(match way {
                PAIR => [("primary", primary), ("backup", backup)],
                _ => [("primary in clear", primary), ("backup in clear", backup)],
            });
        }
        way => {
            let (of_run, log) = (profile(way), site.inside("cost.log"));
            let mut words = vec!["--role", "solo", "--profile", &of_run];
            if way == RECORDED {
                words.extend(["--record", &log, "--overwrite"]);
            }
            sides.push((way, group.launch(0, &words)?));
        }
    }
    let running = Running { lab, sides };
    let (_, active) = &running.sides[0];
    if !active.process.wait_for_stdout(READY)? {
        let said = String::from_utf8_lossy(&active.process.stderr()).into_owned();
        return Err(format!("{way}: ended while booting: {said}").into());
    }
    if running.sides.len() > 1 {
        active.wait_protected()?;
    }
    Ok(running)
}

impl Running<'_> {
    fn program(&self, name: &str) -> String {
        self.lab.host(0).share().join("bin").join(name).display().to_string()
    }

    /// Runs a script on the host and returns what it prints.
    fn script(&self, lines: &[String]) -> Result<String, Box<dyn std::error::Error>> {
        let script = format!("set -e\n{}", lines.join("\n"));
        let said = self.lab.host(0).run(&["busybox", "sh", "-c", &script])?;
        match said.ended.success() {
            true => Ok(said.text()),
            false => Err(format!("{script}: {}", String::from_utf8_lossy(&said.stderr)).into()),
        }
    }

    fn traffic(&self, what: &str, count: u64) -> String {
        format!("{} {what} {GUEST_ADDRESS} {count}", self.program("traffic"))
    }

    /// Two lines for each side.
    fn mark(&self) -> Vec<String> {
        let asked = self.sides.iter().flat_map(|(_, member)| {
            let ask = |words: &str| {
                format!("{} {words} --control {}", self.program("ftvmm"), member.control())
            };
            [ask("profile"), ask("status --json")]
        });
        asked.collect()
    }

    /// What each side spends on one unit. All of it is one command of the host: while the host
    /// waits for this machine, its guests idle for as long as that takes.
    fn cost(
        &self,
        workload: &Workload,
    ) -> Result<Vec<(&'static str, Cost)>, Box<dyn std::error::Error>> {
        let work = match workload.traffic {
            Some(what) => self.traffic(what, workload.count),
            None => format!("busybox sleep {}", workload.count),
        };
        let printed = self.script(&[self.mark(), vec![work], self.mark()].concat())?;
        let lines: Vec<&str> = printed.lines().collect();
        let marks = lines.chunks_exact(2).map(Mark::read).collect::<Result<Vec<_>, _>>()?;
        let (before, after) = marks.split_at(self.sides.len());
        let sides = self.sides.iter().map(|(side, _)| *side);
        let costs = sides.zip(before.iter().zip(after));
        Ok(costs.map(|(side, (before, after))| (side, workload.cost(before, after))).collect())
    }

    fn stop(&self) -> Result<(), Box<dyn std::error::Error>> {
        let (_, active) = &self.sides[0];
        active.process.signal(nix::libc::SIGTERM);
        for (_, member) in &self.sides {
            member.process.wait()?;
        }
        Ok(())
    }
}

/// Reads costs that were saved.
///
/// # Errors
/// When they are not there or are none.
pub fn read(path: &Path) -> Result<Costs, LabError> {
    let text = std::fs::read_to_string(path).map_err(at(path))?;
    serde_json::from_str(&text).map_err(|e| at(path)(e.into()))
}

fn by_side(costs: &Costs) -> BTreeMap<(&str, &str), u64> {
    let mut all = BTreeMap::new();
    for (workload, sides) in costs {
        all.extend(sides.iter().map(|(side, cost)| ((&**workload, &**side), cost.instructions)));
    }
    all
}

/// Which instructions have grown by more than `percent` from `saved` to `found`, one line for each;
/// and what is measured but not saved, or the other way round.
pub fn grown(saved: &Costs, found: &Costs, percent: u64) -> Vec<String> {
    let mut lines = Vec::new();
    let (saved, mut found) = (by_side(saved), by_side(found));
    for ((workload, side), was) in saved {
        match found.remove(&(workload, side)) {
            None => lines.push(format!("{workload}, {side}: is not measured any more")),
            Some(is) if u128::from(is) * 100 > u128::from(was) * u128::from(100 + percent) => {
                let more = (is as f64 / was as f64 - 1.0) * 100.0;
                lines.push(format!("{workload}, {side}: {is}, was {was} ({more:+.1} %)"));
            }
            Some(_) => {}
        }
    }
    lines.extend(found.into_keys().map(|(workload, side)| format!("{workload}, {side}: is new")));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(instructions: u64) -> Costs {
        let cost = Cost { instructions, ..Cost::default() };
        Costs::from([("idle".to_owned(), BTreeMap::from([("solo".to_owned(), cost)]))])
    }

    #[test]
    fn what_grows_by_more_than_is_allowed_is_named() {
        assert!(grown(&costs(1000), &costs(1050), 5).is_empty());
        assert!(grown(&costs(1000), &costs(10), 5).is_empty());
        assert_eq!(grown(&costs(1000), &costs(1051), 5), ["idle, solo: 1051, was 1000 (+5.1 %)"]);
        assert_eq!(grown(&costs(1), &Costs::new(), 5), ["idle, solo: is not measured any more"]);
        assert_eq!(grown(&Costs::new(), &costs(1), 5), ["idle, solo: is new"]);
        assert!(grown(&costs(u64::MAX), &costs(u64::MAX), 5).is_empty());
    }
}
