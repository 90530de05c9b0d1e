//! `ftvmm log diff A B`: where two recordings of the same inputs part, and in what.
//!
//! Details go to standard output, a line of A with `-` before it, one of B with `+`; what is found,
//! in one line, is the error message, so that it can be seen where only that is kept.

use std::path::Path;

use ftvmm_replication::check::{MemoryCheck, RIP};
use ftvmm_replication::log_diff::{
    CompareError, LogComparison, LogDifference, StateDifference, compare,
};
use ftvmm_replication::{Check, CpuCheck, Record};

use super::CommandError;
use super::disassembly::Symbols;
use super::print::print_line;
use super::recording::{damaged, open_log};

/// Names at most so many pages.
const PAGES_NAMED: usize = 32;

/// Compares two recordings.
///
/// # Errors
/// A divergence when they differ; when a file cannot be used.
pub fn diff(left: &Path, right: &Path, vmlinux: Option<&Path>) -> Result<(), CommandError> {
    let symbols = vmlinux.map(Symbols::read).transpose()?.unwrap_or_default();
    let (mut a, mut b) = (open_log(left)?, open_log(right)?);
    let (own, theirs) = (&a.header().build, &b.header().build);
    if own != theirs {
        print_line(format_args!("made by different builds: {own} and {theirs}"))?;
    }
    let LogComparison { checks_compared, checks_alone, difference } = compare(&mut a, &mut b)
        .map_err(|CompareError { in_second, cause }| {
            damaged(if in_second { right } else { left })(cause)
        })?;
    print_line(format_args!(
        "{checks_compared} checks compared, {checks_alone} in one of the two only"
    ))?;
    let Some(difference) = difference else {
        return print_line("the two recordings say the same");
    };
    print_line(format_args!("- {}\n+ {}", left.display(), right.display()))?;
    match &difference {
        LogDifference::Record { a, b, .. } => {
            print_line(format_args!("- {}\n+ {}", record(a.as_ref()), record(b.as_ref())))?;
        }
        LogDifference::State(state) => {
            describe(state, &symbols).iter().try_for_each(print_line)?;
        }
        LogDifference::Fingerprint(_)
        | LogDifference::RtcEpoch { .. }
        | LogDifference::Start { .. }
        | LogDifference::Horizon { .. } => {}
    }
    Err(CommandError::Divergence(difference.to_string()))
}

fn record(record: Option<&Record>) -> String {
    record.map_or_else(|| "end of log".to_owned(), Record::to_string)
}

fn describe(found: &StateDifference, symbols: &Symbols) -> Vec<String> {
    let StateDifference { at, agreed, before, a, b } = found;
    let place = |cpu: &CpuCheck| symbols.place(cpu.registers[RIP], &cpu.code);
    let mut lines = Vec::new();
    let mut pair = |what: &str, own: String, theirs: String| {
        lines.extend([format!("- {what} {own}"), format!("+ {what} {theirs}")]);
    };
    if a.chain != b.chain {
        pair("digest of exits", format!("{:016x}", a.chain), format!("{:016x}", b.chain));
    }
    for (name, own, theirs) in a.differing_registers(b) {
        pair(name, format!("{own:#x}"), format!("{theirs:#x}"));
    }
    if a.differs_elsewhere(b) {
        let what = "digest of segment, control, FPU and model-specific registers";
        pair(what, format!("{:016x}", a.cpu.digest), format!("{:016x}", b.cpu.digest));
    }
    if (a.cpu.registers[RIP], &a.cpu.code) != (b.cpu.registers[RIP], &b.cpu.code) {
        pair("at", place(&a.cpu), place(&b.cpu));
    }
    lines.extend(memory(a, b));
    let same = before.as_ref().map_or_else(String::new, |cpu| format!(", at {}", place(cpu)));
    let mut head = vec![format!("exit {agreed}: the last that is known to be the same{same}")];
    head.push(format!("exit {at}: the first that differs, at {}", place(&a.cpu)));
    if !found.is_exact() {
        let (from, until) = (agreed.next(), at.next());
        lines.push(format!(
            "what is between can be compared too: replay both with --record FILE --check-every 1 \
             --check-memory-every 1 --check-from {from} --until {until}"
        ));
    }
    [head, lines].concat()
}

fn memory(a: &Check, b: &Check) -> Vec<String> {
    let (Some(own), Some(theirs)) = (&a.memory, &b.memory) else {
        return vec!["memory was not compared at this exit".into()];
    };
    if own.digest == theirs.digest {
        return vec!["memory is the same".into()];
    }
    differing_pages(own, theirs)
}

fn differing_pages(own: &MemoryCheck, theirs: &MemoryCheck) -> Vec<String> {
    let pages = own.differing_pages(theirs);
    let content = |hash: Option<u32>| {
        hash.map_or_else(|| "unchanged".to_owned(), |hash| format!("changed, hash {hash:08x}"))
    };
    let named = pages.iter().take(PAGES_NAMED).flat_map(|entry| {
        let address = entry.page << 12;
        [('-', entry.own), ('+', entry.theirs)]
            .map(|(side, hash)| format!("{side} page at {address:#x} {}", content(hash)))
    });
    let mut lines: Vec<_> = named.collect();
    match pages.len() {
        0 => lines.push("memory differs in pages that changed before".into()),
        count if count > PAGES_NAMED => {
            lines.push(format!("and {} more pages", count - PAGES_NAMED));
        }
        _ => {}
    }
    lines
}

#[cfg(test)]
mod tests {
    use ftvmm_replication::{Ordinal, PageHash};

    use super::*;

    fn check(rax: u64, pages: &[(u64, u32)]) -> Check {
        let mut cpu = CpuCheck { digest: rax, code: vec![0xec], ..CpuCheck::default() };
        (cpu.registers[0], cpu.registers[RIP]) = (rax, 0x1000);
        let changed: Vec<_> = pages.iter().map(|&(page, hash)| PageHash { page, hash }).collect();
        let digest = pages.iter().map(|(_, hash)| u64::from(*hash)).sum();
        let memory = MemoryCheck { digest, changed, renews_copy: false };
        Check { chain: 7, cpu, memory: Some(memory) }
    }

    fn found(agreed: u64, a: Check, b: Check) -> String {
        let before = Some(check(1, &[]).cpu);
        let found = StateDifference { at: Ordinal(17), agreed: Ordinal(agreed), before, a, b };
        describe(&found, &Symbols::default()).join("\n")
    }

    #[test]
    fn registers_and_pages_are_shown_side_by_side() {
        let text = found(16, check(0x11, &[(1, 5), (3, 9)]), check(0x15, &[(1, 5), (2, 6)]));
        let expected = "exit 16: the last that is known to be the same, at 0x1000: in al, dx\n\
                        exit 17: the first that differs, at 0x1000: in al, dx\n\
                        - rax 0x11\n\
                        + rax 0x15\n\
                        - page at 0x2000 unchanged\n\
                        + page at 0x2000 changed, hash 00000006\n\
                        - page at 0x3000 changed, hash 00000009\n\
                        + page at 0x3000 unchanged";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_is_not_in_the_general_registers_is_told() {
        let (a, mut b) = (check(1, &[]), check(1, &[]));
        b.cpu.digest = 2;
        b.chain = 8;
        b.memory = None;
        let text = found(16, a, b);
        assert!(text.contains("- digest of segment, control"), "{text}");
        assert!(text.contains("+ digest of exits 0000000000000008"), "{text}");
        assert!(text.contains("memory was not compared"), "{text}");
    }

    #[test]
    fn many_pages_are_counted() {
        let pages: Vec<_> = (0..40).map(|page| (page, 1)).collect();
        let text = found(16, check(1, &pages), check(1, &[]));
        assert_eq!(text.lines().filter(|line| line.starts_with("- page")).count(), 32);
        assert!(text.ends_with("and 8 more pages"), "{text}");
    }

    #[test]
    fn a_range_says_how_to_narrow_it() {
        let text = found(12, check(1, &[]), check(2, &[]));
        assert!(text.ends_with("--check-from 13 --until 18"), "{text}");
    }
}
