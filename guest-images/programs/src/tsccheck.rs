//! `tsccheck`: RDTSC and RDTSCP in every shape user mode has, and the #GPs beside them.
//!
//! The programs are a few bytes each, written to fixed places in a page: what is checked is where
//! exactly they stand and what exactly they leave. Two modes: by default the instructions must
//! work, with `--hidden` they must fault. `--aux-zero` also wants zero from RDTSCP in RCX, which a
//! physical CPU gives a number.

mod machine_code;

use std::sync::mpsc;
use std::thread;

use nix::libc;

use crate::AppletError;
use crate::options::Options;
use crate::stream::mix;
use machine_code::{CodePages, PAGE_BYTES, Registers, faults_during, steps_during};

const RDTSC: &[u8] = &[0x0f, 0x31];
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];
const RET: u8 = 0xc3;
const DEFAULT_FAULTS: u64 = 1000;
/// Linux's selectors (arch/x86/include/asm/segment.h) and the first entry of the local table.
const USER32_CS: u16 = 0x23;
const USER_CS: u16 = 0x33;
const LOCAL_CS: u16 = 0x07;

/// What a check found wrong.
#[derive(Debug, thiserror::Error)]
#[error("{check}: {what}")]
pub struct WrongTsc {
    check: &'static str,
    what: String,
}

struct Checks {
    pages: CodePages,
    last: u64,
    reads: u64,
    hash: u64,
    aux_zero: bool,
}

type Outcome = Result<(), String>;
type Check = fn(&mut Checks, u64) -> Outcome;

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let faults = options.named("--faults", DEFAULT_FAULTS, "a number of faults")?;
    let pages = CodePages::map().map_err(AppletError::io("code pages"))?;
    let aux_zero = options.flag("--aux-zero");
    let mut checks = Checks { pages, last: 0, reads: 0, hash: 0, aux_zero };
    let list: &[(&'static str, Check)] = if options.flag("--hidden") {
        &[("hidden", hidden), ("faults", genuine_faults)]
    } else {
        &[
            ("plain", plain),
            ("boundaries", boundaries),
            ("narrow", narrow),
            ("stepped", stepped),
            ("forbidden", forbidden),
            ("faults", genuine_faults),
        ]
    };
    for (check, run) in list {
        run(&mut checks, faults).map_err(|what| WrongTsc { check, what })?;
        println!("tsccheck {check}");
    }
    println!("TSCCHECK ok {:016x} reads={}", checks.hash, checks.reads);
    Ok(())
}

impl Checks {
    fn reading(&mut self, what: &str, got: &Registers, scp: bool) -> Outcome {
        if (got.rax | got.rdx) >> 32 != 0 {
            return Err(format!("{what}: upper halves not zero: {got:x?}"));
        }
        if scp && (got.rcx >> 32 != 0 || self.aux_zero && got.rcx != 0) {
            return Err(format!("{what}: RCX is {:#x}", got.rcx));
        }
        if !scp && got.rcx != u64::MAX {
            return Err(format!("{what}: RCX became {:#x}", got.rcx));
        }
        let now = got.rdx << 32 | got.rax;
        if now < self.last {
            return Err(format!("{what}: the counter went from {} to {now}", self.last));
        }
        self.hash = mix(self.hash ^ now);
        (self.last, self.reads) = (now, self.reads + 1);
        Ok(())
    }
}

fn plain(checks: &mut Checks, _: u64) -> Outcome {
    for round in 0..100 {
        for (code, scp) in [(RDTSC, false), (RDTSCP, true)] {
            let got = checks.pages.call(0, &[code, &[RET]].concat());
            checks.reading(&format!("round {round}"), &got, scp)?;
        }
    }
    Ok(())
}

/// Every prefix, at every distance from the end of a page.
fn boundaries(checks: &mut Checks, _: u64) -> Outcome {
    let prefixes: &[&[u8]] = &[&[], &[0x66], &[0xf2], &[0x48], &[0x2e, 0x67, 0x4f], &[0x3e; 12]];
    for prefix in prefixes {
        for (code, scp) in [(RDTSC, false), (RDTSCP, true)] {
            let code = [*prefix, code, &[RET]].concat();
            for before in 0..code.len() {
                let got = checks.pages.call(PAGE_BYTES - before, &code);
                checks.reading(&format!("{code:02x?}, {before} bytes before"), &got, scp)?;
            }
        }
    }
    Ok(())
}

/// 32-bit code, and 16-bit code where the kernel lets a program have a segment for it.
fn narrow(checks: &mut Checks, _: u64) -> Outcome {
    let mut selectors = vec![(USER32_CS, 32)];
    if checks.pages.make_16_bit_segment() {
        selectors.push((LOCAL_CS, 16));
    }
    for (selector, bits) in selectors {
        for prefix in [&[][..], &[0x66], &[0x2e, 0x67]] {
            for (code, scp) in [(RDTSC, false), (RDTSCP, true)] {
                let code = [prefix, code].concat();
                let got = checks.pages.call_narrow(selector, bits, USER_CS, &code);
                checks.reading(&format!("{bits} bits, {code:02x?}"), &got, scp)?;
            }
        }
    }
    Ok(())
}

/// Stepped with the trap flag, a program must stop behind the same bytes whether they read the
/// counter or not.
fn stepped(checks: &mut Checks, _: u64) -> Outcome {
    let harmless: &[u8] = &[0x66, 0x90, 0x0f, 0x1f, 0x00, 0x90];
    let reading = &[RDTSC, RDTSCP, &[0x90]].concat();
    let [wanted, got] = [harmless, reading].map(|code| {
        // pushf ; or qword [rsp], 0x100 ; popf ; ... ; pushf ; and qword [rsp], ~0x100 ; popf ; ret
        let on = [0x9c, 0x48, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d];
        let off = [0x9c, 0x48, 0x81, 0x24, 0x24, 0xff, 0xfe, 0xff, 0xff, 0x9d, RET];
        let code = [&on, code, &off].concat();
        steps_during(|| checks.pages.call(0, &code))
    });
    if wanted.len() < 3 || wanted != got {
        return Err(format!("stops at {got:x?} instead of {wanted:x?}"));
    }
    Ok(())
}

fn set_tsc(mode: libc::c_int) -> Outcome {
    // SAFETY: PR_SET_TSC takes one number and touches no memory.
    let answer = unsafe { libc::prctl(libc::PR_SET_TSC, mode) };
    if answer == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().to_string()) }
}

/// A thread that has forbidden itself the counter faults, beside one that has not.
fn forbidden(checks: &mut Checks, _: u64) -> Outcome {
    let (ask, asked) = mpsc::channel::<()>();
    let (answer, answered) = mpsc::channel::<()>();
    let forbidding = thread::spawn(move || -> Outcome {
        let pages = CodePages::map().map_err(|e| e.to_string())?;
        set_tsc(libc::PR_TSC_SIGSEGV)?;
        while asked.recv().is_ok() {
            for code in [RDTSC, RDTSCP] {
                faults_once(&pages, code)?;
            }
            answer.send(()).map_err(|e| e.to_string())?;
        }
        set_tsc(libc::PR_TSC_ENABLE)?;
        let faults = faults_during(RDTSC.len(), || pages.call(0, &[RDTSC, &[RET]].concat()));
        if faults.is_empty() { Ok(()) } else { Err("still forbidden".into()) }
    });
    for round in 0..10 {
        let alive = ask.send(()).is_ok() && answered.recv().is_ok();
        if !alive {
            break;
        }
        let got = checks.pages.call(0, &[RDTSC, &[RET]].concat());
        checks.reading(&format!("round {round}"), &got, false)?;
    }
    drop(ask);
    forbidding.join().map_err(|_| "the thread panicked".to_string())?
}

fn faults_once(pages: &CodePages, code: &[u8]) -> Outcome {
    let faults = faults_during(code.len(), || pages.call(0, &[code, &[RET]].concat()));
    let wanted = [pages.address(0)];
    if faults == wanted {
        Ok(())
    } else {
        Err(format!("{code:02x?} faulted at {faults:x?} instead of {wanted:x?}"))
    }
}

fn hidden(checks: &mut Checks, _: u64) -> Outcome {
    [RDTSC, RDTSCP].iter().try_for_each(|code| faults_once(&checks.pages, code))
}

/// #GPs that are none of ours: each is reported where it happened, and leaves every register alone.
fn genuine_faults(checks: &mut Checks, count: u64) -> Outcome {
    // hlt ; cli ; wbinvd ; mov rax, cr4 ; int 0x10 ; mov al, [non-canonical rbx] ; lgdt [rax]
    let instructions: &[&[u8]] = &[
        &[0xf4],
        &[0xfa],
        &[0x0f, 0x09],
        &[0x0f, 0x20, 0xe0],
        &[0xcd, 0x10],
        &[0x8a, 0x03],
        &[0x0f, 0x01, 0x10],
    ];
    let start = checks.pages.address(0);
    for (number, code) in (0..count).zip(instructions.iter().cycle()) {
        let pattern = mix(number) | 1;
        // mov rbx, non-canonical ; mov rax, pattern ; … ; ret
        let mut program = vec![0x48, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x48, 0xb8];
        program.extend(pattern.to_le_bytes());
        let at = start + program.len() as u64;
        program.extend(*code);
        program.push(RET);
        let mut got = Registers::default();
        let faults = faults_during(code.len(), || {
            got = checks.pages.call(0, &program);
            got
        });
        if faults != [at] {
            return Err(format!("{code:02x?} faulted at {faults:x?} instead of {at:#x}"));
        }
        if (got.rax, got.rcx, got.rdx) != (pattern, u64::MAX, u64::MAX) {
            return Err(format!("{code:02x?} changed registers: {got:x?}"));
        }
    }
    Ok(())
}
