//! Differences of small logs: found at the right exit, whatever the cadence of the checks.

use ftvmm_devices::Input;

use super::*;
use crate::check::{CpuCheck, MemoryCheck, PageHash, RIP};
use crate::log_stat::tests::{file, records};
use crate::record::{End, EndReason};
use crate::slice::Slice;

fn comparison(a: &[u8], b: &[u8]) -> LogComparison {
    let (mut a, mut b) = (LogReader::new(a).unwrap(), LogReader::new(b).unwrap());
    compare(&mut a, &mut b).unwrap()
}

fn difference(a: &[u8], b: &[u8]) -> Option<LogDifference> {
    comparison(a, b).difference
}

/// A log of a guest that goes wrong at exits: `rax` after `bad_register`, a page after `bad_page`.
/// It has checks every `every` exits, with memory every `memory_every`.
fn log(every: u64, memory_every: u64, bad_register: u64, bad_page: u64) -> Vec<u8> {
    let mut records = Vec::new();
    for at in 1..=40 {
        if at % 7 == 0 {
            let event = Event::Input(Input::Time { now_ns: at * 1000 });
            records.push(Record { at: Ordinal(at), event });
        }
        if at % every == 0 {
            let mut cpu = CpuCheck { digest: at, ..CpuCheck::default() };
            (cpu.registers[0], cpu.registers[RIP]) = (at, 0x1000 + at);
            if at > bad_register {
                cpu.registers[0] ^= 4;
                cpu.digest ^= 4;
            }
            let is_bad = at > bad_page;
            let changed = vec![
                PageHash { page: 0x10, hash: at as u32 },
                PageHash { page: 0x20, hash: u32::from(is_bad) },
            ];
            let digest = at << 1 | u64::from(is_bad);
            let memory = at.is_multiple_of(memory_every).then_some(MemoryCheck {
                digest,
                changed,
                renews_copy: true,
            });
            let check = Check { chain: at, cpu, memory };
            records.push(Record { at: Ordinal(at), event: Event::Check(Box::new(check)) });
        }
    }
    let reason = EndReason::PowerOff;
    let end = End { state_digest: [7; 32], chain: 2, outputs: 3, reason };
    records.push(Record { at: Ordinal(41), event: Event::End(end) });
    file(&records, 5, 0)
}

const NEVER: u64 = u64::MAX;

fn state(a: &[u8], b: &[u8]) -> StateDifference {
    match difference(a, b) {
        Some(LogDifference::State(state)) => *state,
        other => panic!("{other:?}"),
    }
}

#[test]
fn grouping_makes_no_difference() {
    let found = comparison(&file(&records(), 1, 5), &file(&records(), 6, 5));
    let same = LogComparison { checks_compared: 1, checks_alone: 0, difference: None };
    assert_eq!(found, same);
}

#[test]
fn each_kind_of_difference_is_named() {
    let base = file(&records(), 2, 5);
    let epoch = difference(&base, &file(&records(), 2, 6));
    assert_eq!(epoch, Some(LogDifference::RtcEpoch { a_s: 5, b_s: 6 }));

    let mut other = records();
    other[3].event = Event::Input(Input::ConsoleRx { bytes: b"ps\n".to_vec() });
    let found = difference(&base, &file(&other, 2, 5)).unwrap();
    assert_eq!(found.to_string(), "records differ at exit 9");
    let LogDifference::Record { a: Some(a), b: Some(b), .. } = found else { panic!("{found:?}") };
    assert_eq!(a.to_string(), "9 console-rx \"ls\\n\"");
    assert_eq!(b.to_string(), "9 console-rx \"ps\\n\"");

    let found = difference(&base, &file(&records()[..8], 2, 5)).unwrap();
    assert!(matches!(&found, LogDifference::Record { at: Ordinal(12), a: Some(_), b: None }));
    assert_eq!(found.to_string(), "the second recording ends before exit 12");

    let cut = &base[..base.len() - 7];
    let found = difference(&base, cut).unwrap();
    assert_eq!(found, LogDifference::Horizon { a: Ordinal(20), b: Ordinal(19) });
}

#[test]
fn another_cadence_is_no_difference() {
    let found = comparison(&log(1, 10, NEVER, NEVER), &log(6, 12, NEVER, NEVER));
    assert_eq!(found, LogComparison { checks_compared: 6, checks_alone: 34, difference: None });
    let found = comparison(&log(6, 12, NEVER, NEVER), &log(1, 10, NEVER, NEVER));
    assert_eq!((found.checks_compared, found.checks_alone), (6, 34));
}

#[test]
fn a_register_is_found_at_its_exit() {
    let found = state(&log(1, 10, NEVER, NEVER), &log(1, 10, 16, NEVER));
    assert_eq!((found.at, found.agreed), (Ordinal(17), Ordinal(16)));
    assert!(found.is_exact());
    assert_eq!(found.before.as_ref().unwrap().registers[RIP], 0x1010);
    let registers: Vec<_> = found.a.differing_registers(&found.b).collect();
    assert_eq!(registers, [("rax", 17, 17 ^ 4)]);
    assert!(!found.a.memory_differs(&found.b));
    let text = LogDifference::State(Box::new(found)).to_string();
    assert_eq!(text, "state differs at exit 17");
}

#[test]
fn between_checks_of_different_cadence_there_is_a_range() {
    let found = state(&log(4, 8, NEVER, NEVER), &log(6, 6, 16, NEVER));
    assert_eq!((found.at, found.agreed), (Ordinal(24), Ordinal(12)));
    assert!(!found.is_exact());
    let text = LogDifference::State(Box::new(found)).to_string();
    assert_eq!(text, "state differs after exit 12, at or before exit 24");
}

#[test]
fn a_page_is_found_and_its_range_ends_where_memory_was_compared() {
    let found = state(&log(1, 10, NEVER, NEVER), &log(1, 5, NEVER, 23));
    assert_eq!((found.at, found.agreed), (Ordinal(30), Ordinal(20)));
    let (a, b) = (found.a.memory.unwrap(), found.b.memory.unwrap());
    let pages = a.differing_pages(&b);
    assert_eq!(pages.len(), 1);
    assert_eq!((pages[0].page, pages[0].own, pages[0].theirs), (0x20, Some(0), Some(1)));
}

#[test]
fn an_input_that_differs_before_a_check_comes_first() {
    let (a, mut other) = (file(&records(), 2, 5), records());
    other[0].event = Event::Input(Input::Time { now_ns: 10_000_001 });
    let Event::Check(check) = &mut other[2].event else { panic!("{other:?}") };
    check.chain += 1;
    assert_eq!(
        difference(&a, &file(&other, 2, 5)).unwrap().to_string(),
        "records differ at exit 3"
    );
    // The check of exit 4 stands before an input only one of them was given at exit 9.
    let mut other = records();
    other.remove(3);
    let found = difference(&a, &file(&other, 2, 5)).unwrap();
    assert!(matches!(found, LogDifference::Record { at: Ordinal(9), a: Some(_), b: Some(_) }));
}

#[test]
fn a_slice_both_have_is_a_point_where_they_agree() {
    let slice = |at| {
        let slice = Slice { pages: vec![], cpu: Some(vec![1]) };
        Record { at: Ordinal(at), event: Event::Slice(slice) }
    };
    let check = |at, chain| {
        let check = Check { chain, ..Check::default() };
        Record { at: Ordinal(at), event: Event::Check(Box::new(check)) }
    };
    let a = file(&[check(1, 0), slice(8), check(9, 0)], 5, 0);
    let b = file(&[check(1, 0), slice(8), check(9, 1)], 5, 0);
    let found = state(&a, &b);
    assert_eq!((found.at, found.agreed, found.before), (Ordinal(9), Ordinal(8), None));
}

#[test]
fn the_damaged_log_is_named() {
    let whole = file(&records(), 1, 5);
    let mut damaged = whole.clone();
    let at = damaged.len() / 2;
    damaged[at] ^= 1;
    for (in_second, a, b) in [(true, &whole, &damaged), (false, &damaged, &whole)] {
        let (mut a, mut b) = (LogReader::new(&**a).unwrap(), LogReader::new(&**b).unwrap());
        assert_eq!(compare(&mut a, &mut b).unwrap_err().in_second, in_second);
    }
}
