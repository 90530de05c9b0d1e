//! Where two executions part: the first exit, register and page that differ.

use ftvmm_replication::check::{Check as StateCheck, RIP};
use ftvmm_replication::{Event, Record};
use ftvmm_tests::guest_run::GuestLab;
use ftvmm_tests::lab::Ended;
use object::build::elf::{Builder, SectionData};
use object::elf;

use super::{DIVERGENCE, Recording, UNTIL, diff, record_again, records};

/// The checks a recording of the shared folder has.
fn checks(site: &GuestLab, name: &str) -> Vec<(u64, StateCheck)> {
    let log = std::fs::read(site.outside(name)).unwrap();
    let check = |record: Record| match record.event {
        Event::Check(check) => Some((record.at.0, *check)),
        _ => None,
    };
    records(&log).into_iter().filter_map(check).collect()
}

/// The first of `exits` exits among which no slice puts a faulty guest right.
fn without_slices(whole: &Recording, exits: u64) -> u64 {
    let slices = records(&whole.log);
    let slices = slices.iter().filter(|record| matches!(record.event, Event::Slice(_)));
    slices.map(|record| record.at.0).fold(UNTIL, |from, slice| match slice {
        slice if (from..from + exits).contains(&slice) => slice + 1,
        _ => from,
    })
}

/// Records two replays, the second with a fault, and compares them.
fn differ(
    site: &GuestLab,
    whole: &Recording,
    fault: &str,
    flags: &[&str],
    more: &[&str],
) -> String {
    let sound = record_again(site, whole, "sound.log", flags);
    assert_eq!(sound.ended, Ended::Status(0), "{}", sound.errors);
    record_again(site, whole, "faulty.log", &[flags, &["--inject-fault", fault]].concat());
    let (ended, said, errors) = diff(site, "sound.log", "faulty.log", more);
    assert_eq!(ended, DIVERGENCE, "{said}{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    said
}

pub fn a_register_that_differs_is_found(site: &GuestLab, whole: &Recording) {
    const R15: usize = 15;
    const RSP: usize = 6;
    const CADENCE: u64 = 16;
    const EXITS: u64 = 40 * CADENCE;
    let first = without_slices(whole, EXITS);
    let (from, until) = (first.to_string(), (first + EXITS).to_string());
    let window = ["--check-from", &from, "--until", &until];
    record_again(site, whole, "every.log", &[&window[..], &["--check-every", "1"]].concat());
    let every = checks(site, "every.log");
    // Two port accesses of one driver in a row, between which no function that uses r15 returns.
    let (n, check) = every
        .windows(2)
        .filter(|pair| pair[0].0 > first + CADENCE && pair[1].0 == pair[0].0 + 1)
        .filter(|pair| pair[1].0.is_multiple_of(CADENCE))
        .find_map(|pair| {
            let [one, two] = [&pair[0].1.cpu, &pair[1].1.cpu];
            let apart = |index: usize| one.registers[index].abs_diff(two.registers[index]);
            let is_port = matches!(two.code.first(), Some(0xec | 0xee));
            (apart(R15) == 0 && apart(RSP) <= 64 && apart(RIP) < 0x100 && is_port)
                .then_some((pair[0].0, two.clone()))
        })
        .unwrap();
    let fault = format!("reg:r15:3@{n}");

    let coarse = [&window[..], &["--check-every", "16"]].concat();
    let said = differ(site, whole, &fault, &coarse, &[]);
    let advice = said.lines().last().unwrap();
    assert!(said.contains(&format!("exit {}: the last", n + 1 - CADENCE)), "{said}");
    let flags: Vec<&str> = advice.split("FILE ").last().unwrap().split(' ').collect();

    let rip = check.registers[RIP];
    let vmlinux = site.inside("vmlinux");
    site.write("vmlinux", &kernel_with_function("port_access", rip - 0x10)).unwrap();
    let said = differ(site, whole, &fault, &flags, &["--vmlinux", &vmlinux]);
    let instruction = if check.code[0] == 0xec { "in al, dx" } else { "out dx, al" };
    for line in [
        format!("exit {n}: the last that is known to be the same, at "),
        format!(
            "exit {}: the first that differs, at {rip:#x} <port_access+0x10>: {instruction}\n",
            n + 1
        ),
        format!("- r15 {:#x}\n+ r15 {:#x}\n", check.registers[R15], check.registers[R15] ^ 8),
        "memory is the same\n".to_owned(),
    ] {
        assert!(said.contains(&line), "{line:?} is not in:\n{said}");
    }
}

/// An ELF file with one function and nothing else.
fn kernel_with_function(name: &str, address: u64) -> Vec<u8> {
    let mut elf = Builder::new(object::Endianness::Little, true);
    (elf.header.e_type, elf.header.e_machine) = (elf::ET_EXEC, elf::EM_X86_64);
    let mut section = |name: &'static str, sh_type, data| {
        let section = elf.sections.add();
        (section.name, section.sh_type, section.data) = (name.into(), sh_type, data);
        section.sh_addralign = 1;
        section.id()
    };
    let code = SectionData::Data(vec![0xf4; 0x100].into());
    let text = section(".text", elf::SHT_PROGBITS, code);
    section(".symtab", elf::SHT_SYMTAB, SectionData::Symbol);
    section(".strtab", elf::SHT_STRTAB, SectionData::String);
    section(".shstrtab", elf::SHT_STRTAB, SectionData::SectionString);
    let section = elf.sections.get_mut(text);
    (section.sh_addr, section.sh_offset) = (address, 0x1000);
    section.sh_flags = elf::SHF_ALLOC | elf::SHF_EXECINSTR;
    let symbol = elf.symbols.add();
    (symbol.name, symbol.section, symbol.st_value) = (name.into(), Some(text), address);
    symbol.st_info = elf::SymbolInfo::new(elf::STB_GLOBAL, elf::STT_FUNC);
    let mut bytes = Vec::new();
    elf.write(&mut bytes).unwrap();
    bytes
}

pub fn a_page_that_differs_is_found(site: &GuestLab, whole: &Recording) {
    // The first 64 KiB are the firmware's; Linux leaves them alone.
    const ADDRESS: u64 = 0x8000;
    const EXITS: u64 = 20;
    let first = without_slices(whole, EXITS);
    let (from, until) = (first.to_string(), (first + EXITS).to_string());
    let window = ["--check-from", &from, "--until", &until];
    let flags = [&window[..], &["--check-memory-every", "1"]].concat();
    let at = first + EXITS / 2;
    let said = differ(site, whole, &format!("mem:{ADDRESS:#x}:0@{at}"), &flags, &[]);
    for line in [
        format!("exit {at}: the last"),
        format!("exit {}: the first", at + 1),
        format!("- page at {ADDRESS:#x} unchanged\n+ page at {ADDRESS:#x} changed, hash "),
    ] {
        assert!(said.contains(&line), "{line:?} is not in:\n{said}");
    }
    assert_eq!(said.lines().filter(|line| line.contains("page at")).count(), 2, "{said}");
    let lists_it = |check: &StateCheck| {
        check.memory.iter().any(|memory| memory.changed.iter().any(|p| p.page == ADDRESS >> 12))
    };
    for (exit, check) in checks(site, "faulty.log") {
        assert_eq!(lists_it(&check), exit > at, "exit {exit}");
    }

    // A replay that is compared on the way stops, and its recording has what it stopped for.
    let sound = std::fs::read(site.outside("sound.log")).unwrap();
    let (stopped, fault) = (site.inside("stopped.log"), format!("mem:{ADDRESS:#x}:0@{at}"));
    let more = ["--record", &stopped, "--inject-fault", &fault];
    let answer = whole.replay(site, &sound, &more);
    let says =
        format!("divergence at exit {}: 1 pages of memory differ: {:#x}", at + 1, ADDRESS >> 12);
    assert_eq!(answer.ended, DIVERGENCE, "{}", answer.errors);
    assert!(answer.errors.contains(&says), "{says:?} is not in: {}", answer.errors);
    let (ended, again, _) = diff(site, "sound.log", "stopped.log", &[]);
    assert_eq!((ended, again.replace("stopped", "faulty")), (DIVERGENCE, said));
}
