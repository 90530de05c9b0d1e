//! What a user's files hold, and what a guest lays out as page tables and code.

use std::io::{Cursor, Error};
use std::path::Path;

use ftvmm_machine::boot::KernelImage;
use ftvmm_machine::cpu_template::CpuTemplate;
use ftvmm_machine::machine_state::MachineState;
use ftvmm_machine::memory::Memory;
use ftvmm_machine::tsc;
use kvm_bindings::{CpuId, kvm_segment, kvm_sregs};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY_BYTES: usize = 1 << 20;
/// First bytes of a 64-bit ELF file for x86-64 (System V ABI, ELF header).
const ELF_HEAD: [u8; 20] =
    [0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0x3e, 0];
/// First bytes of what a bzImage packs its kernel with (Linux lib/decompress.c).
const PACKED: [&[u8]; 4] = [b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd"];
/// A bzImage's header, and where its code begins: after one sector of set-up (Linux
/// Documentation/arch/x86/boot.rst).
const SETUP_SECTORS: usize = 0x1f1;
const SETUP_MAGIC: usize = 0x202;
const BOOT_PROTOCOL: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_BYTES: usize = 0x24c;
const SETUP_BYTES: usize = 1024;

#[expect(clippy::expect_used, reason = "a mebibyte of memory at address 0 can be had")]
fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
        .expect("a mebibyte of memory at address 0 can be had")
}

/// A kernel's file: as it comes, as an ELF file after its first bytes, and as a bzImage's payload,
/// whole or after the first bytes of each format.
pub fn kernel(bytes: &[u8]) {
    boot(bytes.to_vec());
    boot([&ELF_HEAD, bytes].concat());
    boot(bz_image(bytes));
    for head in PACKED {
        boot(bz_image(&[head, bytes].concat()));
    }
}

fn boot(file: Vec<u8>) {
    let Ok(KernelImage { mut elf, .. }) = KernelImage::parse(file) else { return };
    tsc::patch(&mut elf);
    let _ = Elf::load(&memory(), None, &mut Cursor::new(elf), None);
}

/// A bzImage with this payload.
pub(crate) fn bz_image(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; SETUP_BYTES];
    file[SETUP_SECTORS] = 1;
    file[SETUP_MAGIC..SETUP_MAGIC + 4].copy_from_slice(b"HdrS");
    file[BOOT_PROTOCOL..BOOT_PROTOCOL + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
    file[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&0_u32.to_le_bytes());
    let length = (payload.len() as u32).to_le_bytes();
    file[PAYLOAD_BYTES..PAYLOAD_BYTES + 4].copy_from_slice(&length);
    file.extend_from_slice(payload);
    file
}

/// A CPU template's file.
pub fn template(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let Ok(supported) = CpuId::from_entries(&[]) else { return };
    if let Ok(template) = CpuTemplate::for_host(&supported, Path::new("fed"), |_| Ok(text)) {
        template.msrs().count();
    }
    // A file that is not there.
    let _ = CpuTemplate::for_host(&supported, Path::new("fed"), |_| Err(Error::other("none")));
}

/// The state of a machine: as it comes, and after a version that is this program's.
pub fn machine_state(bytes: &[u8]) {
    let _ = MachineState::decode(bytes);
    let version = ftvmm_machine::machine_state::MACHINE_STATE_VERSION.to_le_bytes();
    let _ = MachineState::decode(&[&version, bytes].concat());
}

/// Page tables of the guest, and what they make executable: the search for code that reads the
/// counter, for a kernel, and for the handler of exceptions. The bytes are flags (bit 0: five
/// levels), the page of the top table, eight of RIP, eight of the interrupt table's address, and
/// memory from its second page on.
pub fn page_tables(bytes: &[u8]) {
    let Some((head, bytes)) = bytes.split_first_chunk::<18>() else { return };
    let [flags, root, addresses @ ..] = head;
    let address = |at: usize| {
        let bytes = addresses[at..].first_chunk::<8>();
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let memory = memory();
    let bytes = &bytes[..bytes.len().min(MEMORY_BYTES - 0x1000)];
    let _ = memory.write(bytes, GuestAddress(0x1000));
    let mut sregs = kvm_sregs {
        cr0: 0x8005_0033,
        cr3: u64::from(*root) << 12,
        cr4: 0x20 | u64::from(flags & 1) << 12,
        efer: 0x500,
        cs: kvm_segment { l: 1, ..kvm_segment::default() },
        ..kvm_sregs::default()
    };
    (sregs.idt.base, sregs.idt.limit) = (address(8), 0xfff);
    tsc::look_at(&memory, &sregs, address(0));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Were it wrong, no payload would ever be reached.
    #[test]
    fn what_is_put_around_the_bytes_holds() {
        assert!(KernelImage::parse(ELF_HEAD.to_vec()).is_ok());
        let damaged = KernelImage::parse(bz_image(b"\x1f\x8bxyz")).unwrap_err();
        assert!(damaged.to_string().contains("damaged gzip"), "{damaged}");
    }

    /// The bytes reach the search: code in a page of the upper half is patched.
    #[test]
    fn a_page_of_the_upper_half_is_searched() {
        let bytes = crate::seeds::page_tables();
        let memory = memory();
        let (head, tables) = bytes.split_at(18);
        memory.write(tables, GuestAddress(0x1000)).unwrap();
        let sregs = kvm_sregs {
            cr3: u64::from(head[1]) << 12,
            cr4: 0x20,
            efer: 0x500,
            ..kvm_sregs::default()
        };
        tsc::look_at(&memory, &sregs, 0);
        let mut code = [0; 2];
        memory.read(&mut code, GuestAddress(0x5000)).unwrap();
        assert_ne!(code, [0x0f, 0x31], "RDTSC is still there");
    }
}
