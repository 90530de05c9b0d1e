//! Segment descriptors as `IRET` to user mode loads them (AMD APM vol. 2, 4.7 and 4.8).

use kvm_bindings::{kvm_segment, kvm_sregs};

use super::paging::AddressSpace;

const USER_PRIVILEGE: u8 = 3;
/// The selector's bit that names the local table.
const LOCAL_TABLE: u16 = 4;
/// Descriptor types of code segments have this bit, those of data segments do not.
const TYPE_CODE: u8 = 8;
const TYPE_CONFORMING: u8 = 4;
const TYPE_WRITABLE: u8 = 2;

/// What a segment must be to be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// CS.
    Code,
    /// SS.
    Stack,
}

/// The segment `selector` names, if `IRET` to user mode would load it into CS or SS.
pub fn load(
    space: &AddressSpace<'_>,
    sregs: &kvm_sregs,
    selector: u16,
    purpose: Purpose,
) -> Option<kvm_segment> {
    let (base, limit) = if selector & LOCAL_TABLE == 0 {
        (sregs.gdt.base, u32::from(sregs.gdt.limit))
    } else if sregs.ldt.unusable == 0 && sregs.ldt.present != 0 {
        (sregs.ldt.base, sregs.ldt.limit)
    } else {
        return None;
    };
    let offset = u32::from(selector & !7);
    if offset == 0 && selector & LOCAL_TABLE == 0 || offset + 7 > limit {
        return None;
    }
    let raw = u64::from_le_bytes(space.read(base.wrapping_add(offset.into()))?);
    let segment = unpack(raw, selector);
    let code = segment.type_ & TYPE_CODE != 0;
    let fits = segment.s != 0
        && segment.present != 0
        && selector & 3 == u16::from(USER_PRIVILEGE)
        && match purpose {
            Purpose::Code if segment.type_ & TYPE_CONFORMING != 0 => code,
            Purpose::Code => code && segment.dpl == USER_PRIVILEGE,
            Purpose::Stack => {
                !code && segment.type_ & TYPE_WRITABLE != 0 && segment.dpl == USER_PRIVILEGE
            }
        };
    fits.then_some(segment)
}

fn unpack(raw: u64, selector: u16) -> kvm_segment {
    let bits = |from: u32, count: u32| (raw >> from & ((1 << count) - 1)) as u32;
    let g = bits(55, 1) as u8;
    let limit = bits(0, 16) | bits(48, 4) << 16;
    kvm_segment {
        base: u64::from(bits(16, 24) | bits(56, 8) << 24),
        limit: if g == 0 { limit } else { limit << 12 | 0xfff },
        selector,
        // Loading a segment marks it accessed.
        type_: bits(40, 4) as u8 | 1,
        present: bits(47, 1) as u8,
        dpl: bits(45, 2) as u8,
        db: bits(54, 1) as u8,
        s: bits(44, 1) as u8,
        l: bits(53, 1) as u8,
        g,
        avl: bits(52, 1) as u8,
        unusable: 0,
        padding: 0,
    }
}

/// 16, 32 or 64: how the code in this segment is decoded, in long mode.
pub fn code_bits(code: &kvm_segment) -> u32 {
    match (code.l, code.db) {
        (1, _) => 64,
        (_, 1) => 32,
        _ => 16,
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::paging::tests::{guest, map};
    use super::*;

    const GDT: u64 = 0xffff_ffff_8200_0000;
    const LDT: u64 = GDT + 0x800;

    #[test]
    fn loads_what_iret_would_and_nothing_else() {
        let (memory, mut sregs) = guest();
        map(&memory, GDT, 0x5000, 3);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 0x4f;
        sregs.ldt = kvm_segment { base: LDT, limit: 15, present: 1, ..Default::default() };
        // Linux's table: kernel code, kernel data, user 32-bit code, user data, user code, at 2 to
        // 6.
        let table: [u64; 10] = [
            0,
            0x00cf_9b00_0000_ffff,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_7b00_0000_ffff, // not present
            0x00cf_f100_0000_ffff, // data that cannot be written
            0x12cf_ff34_5678_ffff, // conforming, base 0x12345678
        ];
        for (index, raw) in table.iter().enumerate() {
            memory.write_obj(*raw, GuestAddress(0x5000 + 8 * index as u64)).unwrap();
        }
        // 16-bit code of 64 KiB at 0x10000.
        memory.write_obj(0x0000_fb01_0000_ffffu64, GuestAddress(0x5800)).unwrap();
        let space = AddressSpace::new(&memory, &sregs);
        let code = |selector| load(&space, &sregs, selector, Purpose::Code);
        let stack = |selector| load(&space, &sregs, selector, Purpose::Stack);

        assert_eq!(code_bits(&code(0x33).unwrap()), 64);
        let compatible = code(0x23).unwrap();
        assert_eq!((code_bits(&compatible), compatible.limit, compatible.dpl), (32, u32::MAX, 3));
        let local = code(0x07).unwrap();
        assert_eq!((code_bits(&local), local.base, local.limit), (16, 0x1_0000, 0xffff));
        assert_eq!(code(0x4b).unwrap().base, 0x1234_5678);
        assert!(stack(0x2b).is_some());
        for selector in [0, 3, 0x10, 0x13, 0x2b, 0x30, 0x3b, 0x43, 0x53, 0x0f + 8] {
            assert_eq!(code(selector), None, "code {selector:#x}");
        }
        for selector in [0x1b, 0x33, 0x43, 0x28] {
            assert_eq!(stack(selector), None, "stack {selector:#x}");
        }
    }

    #[test]
    fn without_a_local_table_there_is_no_segment_in_it() {
        let (memory, mut sregs) = guest();
        map(&memory, LDT, 0x5000, 3);
        memory.write_obj(0x00af_fb00_0000_ffffu64, GuestAddress(0x5800)).unwrap();
        sregs.ldt = kvm_segment { base: LDT, limit: 15, present: 1, ..Default::default() };
        let loads = |ldt: kvm_segment| {
            let sregs = kvm_sregs { ldt, ..sregs };
            load(&AddressSpace::new(&memory, &sregs), &sregs, 0x07, Purpose::Code).is_some()
        };
        assert!(loads(sregs.ldt));
        assert!(!loads(kvm_segment { unusable: 1, ..sregs.ldt }));
        assert!(!loads(kvm_segment { present: 0, ..sregs.ldt }));
        assert!(!loads(kvm_segment { limit: 6, ..sregs.ldt }));
    }
}
