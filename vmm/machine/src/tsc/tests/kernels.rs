//! Code that comes later: what a hooked function is about to make executable, what appears in any
//! other way, and another kernel.

use super::super::kernel::tests::{HOOKED, SITES, image};
use super::super::symbols::tests::BASE;
use super::*;

const MODULE: u64 = 0xffff_ffff_a000_0000;
const MODULE_GPA: u64 = 0x9000;
const RDTSC: [u8; 2] = [0x0f, 0x31];
/// sub rsp, 8 ; xor eax, eax
const FUNCTION: [u8; 6] = [0x48, 0x83, 0xec, 0x08, 0x31, 0xc0];
/// Where the image of another kernel lies.
const IMAGE_GPA: u64 = 0x20_0000;

fn hooked_kernel() -> KernelCode {
    KernelCode { hooks: vec![Hook::choose(TEXT, &FUNCTION).unwrap()], ..Default::default() }
}

/// A guest that calls its hooked function for one page of a module.
fn calling() -> World {
    let mut world = World::new(TscMode::Trap, hooked_kernel());
    world.put(TEXT_GPA, &FUNCTION);
    world.put(TEXT_GPA, &code::HOOK);
    map(&world.memory, MODULE, MODULE_GPA, 1 | 1 << 63);
    world.put(MODULE_GPA, &[0x90; 0x1000]);
    world.put(MODULE_GPA + 0x10, &RDTSC);
    let regs = world.regs();
    (regs.rdi, regs.rsi, regs.rax) = (MODULE, 1, 0x55aa);
    world
}

#[test]
fn a_module_is_searched_before_it_runs_and_the_function_goes_on() {
    let mut world = calling();
    assert!(!world.trap.holds_interrupts());
    let trap = world.exit(pio(HOOK_PORT, Direction::Read, 1)).unwrap();
    assert_eq!((trap.port, trap.data), (HOOK_PORT, TEXT));
    assert_eq!(world.bytes(MODULE_GPA + 0x10), [0xe5, 0x55]);
    assert_eq!(world.trap.counters().new_sites, 1);
    // The guest stands at the instruction itself, which is there again.
    assert_eq!((world.regs().rip, world.regs().rax), (TEXT, 0x55aa));
    assert_eq!(world.bytes(TEXT_GPA), [0x48, 0x83]);
    assert_eq!(world.bytes(TEXT_GPA + 4), code::HOOK);
    assert!(world.trap.holds_interrupts());
    // At the second place it goes back, and nothing is searched twice.
    world.put(MODULE_GPA + 0x20, &RDTSC);
    world.regs().rip = TEXT + 4;
    let trap = world.exit(pio(HOOK_PORT, Direction::Read, 1)).unwrap();
    assert_eq!((trap.data, world.regs().rip), (TEXT + 4, TEXT + 4));
    assert_eq!((world.bytes(TEXT_GPA), world.bytes(TEXT_GPA + 4)), (code::HOOK, [0x31, 0xc0]));
    assert_eq!(world.bytes(MODULE_GPA + 0x20), RDTSC);
    assert!(!world.trap.holds_interrupts());
}

#[test]
fn a_port_read_that_is_no_hook_is_the_devices() {
    let mut world = calling();
    world.regs().rip = TEXT + 4;
    assert_eq!(world.exit(pio(HOOK_PORT, Direction::Read, 1)), None, "nobody came by the first");
    world.regs().rip = TEXT;
    world.sregs().cs.selector = 0x33;
    assert_eq!(world.exit(pio(HOOK_PORT, Direction::Read, 1)), None, "a user");
    assert_eq!(world.trap.counters().new_sites, 0);
}

#[test]
fn only_mapped_memory_of_the_kernel_is_searched() {
    for (address, pages, found) in [
        (MODULE, 1, 1),
        (MODULE + 0x800, 1, 1),
        (MODULE, 3, 1),
        (MODULE, 0, 0),
        (MODULE, u64::MAX, 0),
        (0x40_0000, 1, 0),
        (MODULE - 0x1000, 2, 0),
        (u64::MAX - 0xfff, 2, 0),
    ] {
        let mut world = calling();
        // Behind the last address there is nothing, least of all the first.
        map(&world.memory, u64::MAX - 0xfff, 0xc000, 1);
        map(&world.memory, 0, MODULE_GPA, 7);
        map(&world.memory, 0x40_0000, MODULE_GPA, 7);
        (world.regs().rdi, world.regs().rsi) = (address, pages);
        world.exit(pio(HOOK_PORT, Direction::Read, 1)).unwrap();
        assert_eq!(world.trap.counters().new_sites, found, "{address:#x} {pages}");
    }
}

#[test]
fn code_that_came_in_no_such_way_is_counted_and_the_first_are_named() {
    let mut world = World::trapping();
    map(&world.memory, MODULE, MODULE_GPA, 1);
    world.put(MODULE_GPA, &[0x90; 0x1000]);
    world.put(MODULE_GPA, &RDTSC.repeat(100));
    world.exit_at(16, Exit::Hlt);
    assert_eq!(world.trap.counters().late_sites, 0, "no user program yet");
    map(&world.memory, 0x40_0000, 0xb000, 7);
    world.exit_at(32, Exit::Hlt);
    let counters = world.trap.counters().clone();
    let named: Vec<u64> = (0..LATE_ADDRESSES_MAX as u64).map(|n| MODULE + 2 * n).collect();
    assert_eq!((counters.late_sites, counters.late_addresses), (100, named));
    assert_eq!(world.bytes(MODULE_GPA), [0xe5, 0x55]);
    // It looks seldom from then on, and counts on.
    world.put(MODULE_GPA + 0x800, &RDTSC);
    world.exit_at(48, Exit::Hlt);
    assert_eq!(world.trap.counters().late_sites, 100);
    world.exit_at(4096, pio(0x64, Direction::Read, 1));
    assert_eq!(world.trap.counters().late_sites, 101);
    assert_eq!(world.trap.counters().late_addresses.len(), LATE_ADDRESSES_MAX);
    world.trap.warn_of_late_sites();
}

#[test]
fn a_hook_the_guest_overwrote_is_put_back_at_the_next_look() {
    let mut world = calling();
    map(&world.memory, 0x40_0000, 0xb000, 7);
    world.put(TEXT_GPA, &[0x53, 0x55]);
    world.exit_at(16, Exit::Hlt);
    assert_eq!(world.bytes(TEXT_GPA), code::HOOK);
    world.exit(pio(HOOK_PORT, Direction::Read, 1)).unwrap();
    assert_eq!(world.bytes(TEXT_GPA), [0x53, 0x55], "what the guest put there");
}

/// A guest in which another kernel starts: it stands in its code.
fn other_kernel(known: KernelCode) -> World {
    let mut world = World::new(TscMode::Trap, known);
    let image = image();
    for (number, page) in image.chunks(0x1000).enumerate() {
        let at = 0x1000 * number as u64;
        map(&world.memory, BASE + at, IMAGE_GPA + at, 1);
        world.put(IMAGE_GPA + at, page);
    }
    world.regs().rip = BASE + 0x30;
    world
}

fn site(world: &World) -> [u8; 2] {
    world.bytes(IMAGE_GPA + SITES[0] as u64)
}

#[test]
fn another_kernel_is_patched_once_when_it_comes_to_efer() {
    let mut world = other_kernel(KernelCode::default());
    world.at_efer();
    assert_eq!((site(&world), world.trap.counters().other_kernels), ([0xe5, 0x55], 1));
    assert_eq!(world.bytes(IMAGE_GPA + HOOKED as u64), code::HOOK);
    assert!(world.trap.save().hooks[0].stands_at(BASE + HOOKED as u64));
    // It is known now, and stays so when a machine goes on elsewhere.
    let mut other = other_kernel(KernelCode::default());
    other.trap.restore(world.trap.save());
    other.memory = world.memory.clone();
    for world in [&mut world, &mut other] {
        let before = world.trap.counters().other_kernels;
        world.at_efer();
        assert_eq!(world.trap.counters().other_kernels, before);
    }
    // After a reset the first kernel is there, and the other is another again.
    world.trap.reset();
    assert!(world.trap.save().hooks.is_empty());
}

#[test]
fn a_kernel_without_symbols_is_another_only_when_the_first_could_be_told() {
    let unknown = |known: KernelCode| {
        let mut world = World::new(TscMode::Trap, known);
        world.at_efer();
        (world.trap.counters().other_kernels, world.trap.save().hooks.len())
    };
    let marked = KernelCode { marks: vec![(TEXT, [1, 2])], ..hooked_kernel() };
    assert_eq!(unknown(hooked_kernel()), (0, 1));
    assert_eq!(unknown(marked), (1, 0), "the hooks were the first kernel's");
    let in_place = KernelCode { marks: vec![(TEXT, [0x90, 0x90])], ..hooked_kernel() };
    assert_eq!(unknown(in_place), (0, 1));
}

#[test]
fn only_a_kernel_that_runs_where_kernels_run_is_patched() {
    let changes: [fn(&mut World); 4] = [
        |world| world.sregs().cs.selector = 0x33,
        |world| world.regs().rip = 0x10_0000,
        |world| world.sregs().efer = 0,
        |world| world.regs().rip = BASE - 0x10_0000,
    ];
    for change in changes {
        let mut world = other_kernel(KernelCode::default());
        change(&mut world);
        world.at_efer();
        assert_eq!((site(&world), world.trap.counters().other_kernels), (RDTSC, 0));
    }
}

#[test]
fn a_cr4_that_was_written_behind_the_traps_gets_its_bit_back() {
    let mut world = World::trapping();
    world.write_cr4(0x20 | TSD);
    world.at_efer();
    assert_eq!(world.shown_cr4(), 0x20 | TSD, "the guest's bit stays");
    world.sregs().cr4 = 0x20;
    world.regs().rip = TEXT;
    world.at_efer();
    assert_eq!((world.sregs().cr4, world.shown_cr4()), (0x20 | TSD, 0x20));
}

#[test]
fn code_on_the_last_page_of_all_addresses_is_found_too() {
    let mut world = World::trapping();
    let last = u64::MAX - 0xfff;
    map(&world.memory, 0x40_0000, 0xb000, 7);
    map(&world.memory, last, MODULE_GPA, 1);
    world.put(MODULE_GPA, &[0x90; 0x1000]);
    world.put(MODULE_GPA + 0xffe, &RDTSC);
    world.exit_at(16, Exit::Hlt);
    assert_eq!(world.trap.counters().late_addresses, [u64::MAX - 1]);
    assert_eq!(world.bytes(MODULE_GPA + 0xffe), [0xe5, 0x55]);
    // The same page is a kernel's own where its section reaches so far.
    let section = kernel::Section { addresses: last..u64::MAX, decoys: [0xffe].into() };
    world.put(MODULE_GPA + 0xffe, &RDTSC);
    let kernel = KernelCode { sections: vec![section], ..Default::default() };
    world.trap = TscTrap::new(TscMode::Trap, kernel);
    world.exit_at(16, Exit::Hlt);
    assert_eq!(world.trap.counters().late_sites, 0, "it was there from the start");
}

#[test]
fn what_shares_a_large_page_with_the_kernel_is_no_module() {
    let late = |address| {
        let mut world = World::trapping();
        map(&world.memory, 0x40_0000, 0xb000, 7);
        map(&world.memory, address, MODULE_GPA, 1);
        world.put(MODULE_GPA, &RDTSC);
        let section = kernel::Section { addresses: TEXT..TEXT + 0x800, decoys: [].into() };
        let kernel = KernelCode { sections: vec![section], ..Default::default() };
        world.trap = TscTrap::new(TscMode::Trap, kernel);
        world.exit_at(16, Exit::Hlt);
        world.trap.counters().late_sites
    };
    assert_eq!((late(TEXT + 0x1f_f000), late(TEXT + 0x20_0000)), (0, 1));
    assert_eq!(late(TEXT - 0x1000), 1);
}
