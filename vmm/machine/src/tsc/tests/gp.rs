//! The #GP that CR4.TSD makes of a user's RDTSC, and every other one.

use super::super::code::GP_ENTRY;
use super::*;

const IDT: u64 = 0xffff_fe00_0000_0000;
const HANDLER: u64 = TEXT + 0x100;
const HANDLER_GPA: u64 = TEXT_GPA + 0x100;
const STACK: u64 = 0xffff_fe00_0000_2000;
const RSP: u64 = STACK + 0xf00;
const GDT: u64 = 0xffff_fe00_0000_3000;
/// The user's program.
const CODE: u64 = 0x40_0000;
const RDTSC: [u8; 2] = [0x0f, 0x31];

impl World {
    /// A world whose #GP handler begins with these bytes, and a user who executes `code`.
    fn with_user(mode: TscMode, handler: &[u8], code: &[u8]) -> Self {
        let mut world = Self::new(mode, KernelCode::default());
        for (address, gpa, flags) in
            [(IDT, 0x5000, 3), (STACK, 0x7000, 3), (GDT, 0x8000, 3), (CODE, 0xb000, 7)]
        {
            map(&world.memory, address, gpa, flags);
        }
        world.put(HANDLER_GPA, handler);
        world.put(0xb000, code);
        let low = HANDLER & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (HANDLER >> 16 & 0xffff) << 48;
        world.put(0x50d0, &[low, HANDLER >> 32].map(u64::to_le_bytes).concat());
        // At 0x28 the user's data, at 0x30 its 64-bit code.
        let segments = [0x00cf_f300_0000_ffffu64, 0x00af_fb00_0000_ffff];
        world.put(0x8028, &segments.map(u64::to_le_bytes).concat());
        let sregs = world.sregs();
        (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x7f);
        // An exit before, at which the handler is found.
        assert_eq!(world.exit(Exit::Hlt), None);
        world
    }

    /// The user's instruction has made a #GP and the handler is entered.
    fn enter_handler(&mut self, rflags: u64) -> Option<Trap> {
        let frame = [0, CODE, 0x33, rflags, 0x7fff, 0x2b];
        self.put(0x7f00, &frame.map(u64::to_le_bytes).concat());
        let regs = self.regs();
        (regs.rip, regs.rsp, regs.rax, regs.rflags) = (HANDLER, RSP, 0x55aa, 2);
        self.sregs().cs.selector = 0x10;
        self.cpu.take_did();
        self.exit(pio(GP_PORT, Direction::Read, 1))
    }

    fn counted(&self) -> (u64, u64) {
        (self.trap.counters().user_reads, self.trap.counters().passed_gps)
    }
}

#[test]
fn a_users_counter_is_answered_and_the_user_goes_on() {
    let mut world = World::with_user(TscMode::Trap, &[0x90, 0x90], &RDTSC);
    assert_eq!(world.bytes(HANDLER_GPA), GP_ENTRY);
    let trap = world.enter_handler(0x246).unwrap();
    assert_eq!((trap.port, trap.data), (GP_PORT, TSC));
    let regs = *world.regs();
    assert_eq!((regs.rip, regs.rsp, regs.rflags), (CODE + 2, 0x7fff, 0x246));
    assert_eq!((regs.rax, regs.rdx), (TSC & 0xffff_ffff, TSC >> 32));
    assert_eq!(world.sregs().cs.selector, 0x33);
    assert_eq!(world.cpu.take_did(), [Did::CompleteIo]);
    assert_eq!(world.counted(), (1, 0));
}

#[test]
fn a_user_that_is_stepped_gets_its_debug_exception() {
    let mut world = World::with_user(TscMode::Trap, &[0x90, 0x90], &RDTSC);
    world.cpu.state.get_mut().debug.dr6 = 0xffff_0ff3;
    world.enter_handler(0x346).unwrap();
    assert_eq!(world.cpu.state.get_mut().debug.dr6, 0xffff_4ff0, "a step, and no breakpoint");
    assert_eq!(world.cpu.take_did(), [Did::Raise(1, None), Did::CompleteIo]);
    assert_eq!(world.counted(), (1, 0));
}

#[test]
fn any_other_fault_goes_on_as_if_the_handlers_own_bytes_stood_there() {
    // cld ; push 13, and the user's hlt.
    let mut world = World::with_user(TscMode::Trap, &[0xfc, 0x6a, 0x0d], &[0xf4]);
    let trap = world.enter_handler(0x246).unwrap();
    assert_eq!((trap.port, trap.data), (GP_PORT, 0));
    let regs = *world.regs();
    assert_eq!((regs.rip, regs.rsp, regs.rax), (HANDLER + 3, RSP - 8, 0x55aa));
    assert_eq!(world.memory.read_obj::<u64>(GuestAddress(0x7ef8)).unwrap(), 13);
    assert_eq!(world.cpu.take_did(), [Did::CompleteIo, Did::CompleteIo]);
    assert_eq!(world.bytes(HANDLER_GPA), GP_ENTRY);
    assert_eq!(world.counted(), (0, 1));
}

#[test]
fn what_only_a_step_can_do_is_stepped_over_with_the_handlers_bytes_in_place() {
    // clac, one instruction of three bytes; and push rax ; nop, two of one.
    for (handler, steps) in [(&[0x0f, 0x01, 0xca][..], &[3][..]), (&[0x50, 0x90], &[1, 1])] {
        let mut world = World::with_user(TscMode::Trap, handler, &[0xf4]);
        world.cpu.watched = HANDLER_GPA;
        world.cpu.step_bytes = steps.to_vec().into();
        world.enter_handler(0x246).unwrap();
        let own = [handler[0], handler[1]];
        let did: Vec<Did> =
            [Did::CompleteIo].into_iter().chain(steps.iter().map(|_| Did::Step(own))).collect();
        assert_eq!(world.cpu.take_did(), did);
        let length: u64 = steps.iter().sum();
        let regs = *world.regs();
        assert_eq!((regs.rip, regs.rax), (HANDLER + length, 0x55aa), "{handler:02x?}");
        assert_eq!(world.bytes(HANDLER_GPA), GP_ENTRY);
    }
}

#[test]
fn a_guest_that_forbade_the_counter_gets_its_fault() {
    let mut world = World::with_user(TscMode::Trap, &[0x90, 0x90], &RDTSC);
    world.write_cr4(0x20 | TSD).unwrap();
    assert_eq!(world.enter_handler(0x246).unwrap().data, 0);
    assert_eq!((world.regs().rip, world.counted()), (HANDLER + 2, (0, 1)));
    world.write_cr4(0x20).unwrap();
    assert_eq!(world.enter_handler(0x246).unwrap().data, TSC);
}

#[test]
fn a_guest_whose_counter_is_hidden_keeps_its_handler() {
    let mut world = World::with_user(TscMode::Hide, &[0x90, 0x90], &RDTSC);
    assert_eq!(world.bytes(HANDLER_GPA), [0x90, 0x90]);
    assert_eq!(world.enter_handler(0x246), None);
    assert_eq!(world.counted(), (0, 0));
}

#[test]
fn an_access_that_is_not_the_handlers_is_the_devices() {
    let mut world = World::with_user(TscMode::Trap, &[0x90, 0x90], &RDTSC);
    world.regs().rip = HANDLER + 1;
    assert_eq!(world.exit(pio(GP_PORT, Direction::Read, 1)), None);
    world.regs().rip = HANDLER;
    world.sregs().cs.selector = 0x33;
    assert_eq!(world.exit(pio(GP_PORT, Direction::Read, 1)), None);
    assert_eq!(world.counted(), (0, 0));
}

#[test]
fn page_tables_that_lead_elsewhere_are_seen_at_every_256th_exit() {
    let mut world = World::with_user(TscMode::Trap, &[0x90, 0x90], &RDTSC);
    map(&world.memory, TEXT, 0x9000, 1);
    world.put(0x9000, &[0x90; 0x1000]);
    world.exit_at(255, Exit::Hlt);
    assert_eq!(world.bytes(0x9100), [0x90, 0x90]);
    world.exit_at(256, Exit::Hlt);
    assert_eq!((world.bytes(0x9100), world.bytes(HANDLER_GPA)), (GP_ENTRY, [0x90, 0x90]));
}
