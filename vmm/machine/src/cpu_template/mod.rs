//! The CPU the guest sees: the host's, reduced to what behaves the same everywhere and at every
//! run.
//!
//! What that is stands in a file ([`mod@file`]). Whatever it says, hidden are the TSC,
//! RDRAND/RDSEED and RDPMC (every read is nondeterministic), the APIC (interrupts come through the
//! 8259), and every hypervisor leaf (a paravirtual clock would bypass the log).

mod file;

use std::path::Path;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use sha2::{Digest, Sha256};
use thiserror::Error;

pub use file::{TemplateFile, TemplateFileError, Vendor};

use crate::msr::MsrAnswer;

/// The template of a guest for which none is named.
pub const DEFAULT_TEMPLATE: &str = "minimal";

/// CPUID.1:ECX.XSAVE.
const XSAVE: u32 = 1 << 26;

/// The template cannot be had on this host.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// The file is none.
    #[error(transparent)]
    File(#[from] TemplateFileError),
    /// A feature every guest needs is missing.
    #[error(
        "this host's CPU lacks what the template {template} needs: CPUID leaf {leaf:#x} has \
         {register} {got:#010x}, needed {needed:#010x}"
    )]
    MissingFeatures {
        /// The template.
        template: String,
        /// The leaf.
        leaf: u32,
        /// The register.
        register: &'static str,
        /// What the host has of the bits needed.
        got: u32,
        /// What the template needs.
        needed: u32,
    },
    /// KVM's interface has no room for so many leaves.
    #[error("the template {template} has {got} CPUID leaves; KVM takes {KVM_MAX_CPUID_ENTRIES}")]
    TooManyLeaves {
        /// The template.
        template: String,
        /// How many it has.
        got: usize,
    },
}

/// The CPUID table this host gives a guest, who answers its MSRs, and the digest two hosts must
/// agree on.
pub struct CpuTemplate {
    file: TemplateFile,
    cpuid: CpuId,
    digest: [u8; 32],
}

impl CpuTemplate {
    /// Reduces `supported`, what the host's KVM can show, to the template `name`: one that comes
    /// with the program, or a file, which `read` reads.
    ///
    /// # Errors
    /// When there is no such template, or the host lacks a feature it promises.
    pub fn for_host(
        supported: &CpuId,
        name: &Path,
        read: impl FnOnce(&Path) -> std::io::Result<String>,
    ) -> Result<Self, TemplateError> {
        let (file, text) = TemplateFile::load(name, read)?;
        let entries = reduce(&file, supported.as_slice())?;
        let mut hash = Sha256::new();
        hash.update(text);
        for e in &entries {
            for word in [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx] {
                hash.update(word.to_le_bytes());
            }
        }
        let cpuid = CpuId::from_entries(&entries).map_err(|_| TemplateError::TooManyLeaves {
            template: file.name.clone(),
            got: entries.len(),
        })?;
        Ok(Self { file, cpuid, digest: hash.finalize().into() })
    }

    /// As [`Self::for_host`], with a template that comes with the program.
    ///
    /// # Errors
    /// When there is no such template, or the host lacks a feature it promises.
    pub fn built_in(supported: &CpuId, name: &str) -> Result<Self, TemplateError> {
        Self::for_host(supported, Path::new(name), |_| Err(std::io::ErrorKind::NotFound.into()))
    }

    /// The template's own name.
    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// SHA-256 over the template's text and every leaf the guest can see.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The leaves the guest can see.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Whether the guest can save its vector registers with XSAVE.
    pub fn shows_xsave(&self) -> bool {
        self.cpuid.as_slice().iter().any(|leaf| leaf.function == 1 && leaf.ecx & XSAVE != 0)
    }

    /// The MSRs that exist for the guest: those of every CPU, and those of the maker whose CPU it
    /// sees.
    pub fn msrs(&self) -> impl Iterator<Item = (u32, MsrAnswer)> {
        msrs(&self.file, self.cpuid.as_slice())
    }
}

fn msrs(file: &TemplateFile, shown: &[kvm_cpuid_entry2]) -> impl Iterator<Item = (u32, MsrAnswer)> {
    let leaf_0 = shown.iter().find(|leaf| leaf.function == 0);
    let vendor = leaf_0.and_then(|leaf| Vendor::named([leaf.ebx, leaf.ecx, leaf.edx]));
    let exists = move |msr: &&file::Msr| msr.vendor.is_none() || msr.vendor == vendor;
    file.msr.iter().filter(exists).map(|msr| (msr.index, msr.answer))
}

fn reduce(
    file: &TemplateFile,
    supported: &[kvm_cpuid_entry2],
) -> Result<Vec<kvm_cpuid_entry2>, TemplateError> {
    const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];
    let mut reduced = Vec::with_capacity(file.cpuid.len());
    for leaf in &file.cpuid {
        let index = leaf.subleaf.unwrap_or(0);
        let host = supported.iter().find(|e| (e.function, e.index) == (leaf.leaf, index));
        let host = host.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
        let mut shown = [0; 4];
        for (number, register) in leaf.registers().into_iter().enumerate() {
            let (got, needed) = (host[number] & register.need, register.need);
            if got != needed {
                return Err(TemplateError::MissingFeatures {
                    template: file.name.clone(),
                    leaf: leaf.leaf,
                    register: REGISTERS[number],
                    got,
                    needed,
                });
            }
            shown[number] = host[number] & (register.need | register.keep) | register.set;
        }
        let [eax, ebx, ecx, edx] = shown;
        reduced.push(kvm_cpuid_entry2 {
            function: leaf.leaf,
            index,
            flags: leaf.subleaf.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax,
            ebx,
            ecx,
            edx,
            padding: [0; 3],
        });
    }
    Ok(reduced)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u32 = u32::MAX;

    fn template(name: &str) -> TemplateFile {
        TemplateFile::load(Path::new(name), |path| std::fs::read_to_string(path)).unwrap().0
    }

    /// A host that has everything but some bits of leaf 1's EDX.
    fn host(edx_1: u32) -> Vec<kvm_cpuid_entry2> {
        let leaf = |(function, index)| kvm_cpuid_entry2 {
            function,
            index,
            eax: ALL,
            ebx: ALL,
            ecx: ALL,
            edx: if function == 1 { edx_1 } else { ALL },
            ..Default::default()
        };
        let leaves = [0, 1, 7, 0x4000_0000, 0x8000_0001].map(|function| (function, 0));
        leaves.into_iter().chain([(0xd, 0), (0xd, 1), (0xd, 2)]).map(leaf).collect()
    }

    #[test]
    fn hides_everything_nondeterministic() {
        let leaves = reduce(&template("minimal"), &host(ALL)).unwrap();
        let one = leaves.iter().find(|e| e.function == 1).unwrap();
        assert_eq!(one.edx & (1 << 4 | 1 << 9), 0, "TSC and APIC");
        assert_eq!(one.ecx, 0, "RDRAND, XSAVE, x2APIC, hypervisor");
        assert!(leaves.iter().all(|e| e.function != 0x4000_0000 && e.function != 7));
    }

    #[test]
    fn the_vector_template_shows_plain_xsave_of_three_components() {
        let leaves = reduce(&template("avx"), &host(ALL)).unwrap();
        let leaf = |function, index| {
            let leaf = leaves.iter().find(|e| (e.function, e.index) == (function, index)).unwrap();
            [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
        };
        assert_eq!(leaf(0xd, 0), [7, 832, 832, 0]);
        assert_eq!(leaf(0xd, 1), [0; 4]);
        assert_eq!(leaf(0xd, 2), [256, 576, 0, 0]);
        assert_eq!(leaf(7, 0), [0, 1 << 3 | 1 << 5 | 1 << 8, 0, 0]);
        assert_eq!(leaf(1, 0)[2] & (1 << 30 | 1 << 31 | 1 << 21), 0, "RDRAND, hypervisor, x2APIC");
        assert_ne!(leaf(1, 0)[2] & 1 << 28, 0, "AVX");
    }

    /// What a guest on a host with this name in leaf 0 reads from an MSR.
    fn msr(template_name: &str, host_name: &[u8; 12], index: u32) -> Option<MsrAnswer> {
        let word =
            |at: usize| host_name[at..at + 4].iter().rev().fold(0, |w, b| w << 8 | u32::from(*b));
        let mut host = host(ALL);
        (host[0].ebx, host[0].edx, host[0].ecx) = (word(0), word(4), word(8));
        let file = template(template_name);
        let shown = reduce(&file, &host).unwrap();
        msrs(&file, &shown).find(|(known, _)| *known == index).map(|(_, answer)| answer)
    }

    #[test]
    fn registers_a_kernel_reads_without_a_fix_up_exist_on_the_cpus_of_their_maker() {
        const MISC_ENABLE: u32 = 0x1a0;
        const PLATFORM_ID: u32 = 0x17;
        const NB_CFG: u32 = 0xc001_001f;
        for name in ["minimal", "sse4", "avx"] {
            // Fast strings on (Linux would not use them otherwise), XD not disabled (bit 34: the
            // stub of a kernel clears it before there is an IDT), no branch trace and
            // no PEBS.
            let misc_enable = msr(name, b"GenuineIntel", MISC_ENABLE);
            assert_eq!(misc_enable, Some(MsrAnswer::Value(0x1801)), "{name}");
            assert_eq!(
                msr(name, b"GenuineIntel", PLATFORM_ID),
                Some(MsrAnswer::Value(0)),
                "{name}"
            );
            assert_eq!(msr(name, b"GenuineIntel", NB_CFG), None, "{name}");
            for amd in [b"AuthenticAMD", b"HygonGenuine"] {
                assert_eq!(msr(name, amd, MISC_ENABLE), None, "{name}");
                assert_eq!(msr(name, amd, NB_CFG), Some(MsrAnswer::Value(0)), "{name}");
            }
            // An unknown maker's CPU has what every CPU has.
            assert_eq!(msr(name, b"CentaurHauls", MISC_ENABLE), None, "{name}");
            assert_eq!(msr(name, b"CentaurHauls", 0x10), Some(MsrAnswer::Clock), "{name}");
        }
    }

    #[test]
    fn refuses_a_host_without_sse2() {
        let answer = reduce(&template("minimal"), &host(ALL & !(1 << 26)));
        assert!(matches!(answer, Err(TemplateError::MissingFeatures { leaf: 1, .. })));
    }

    #[test]
    fn refuses_more_leaves_than_kvm_takes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let leaves: String =
            (0..=KVM_MAX_CPUID_ENTRIES).map(|subleaf| leaf_text(4, subleaf)).collect();
        let highest = "name = \"long\"\n[[cpuid]]\nleaf = 0\neax = { set = 4 }\n";
        std::fs::write(file.path(), format!("{highest}{leaves}")).unwrap();
        let supported = CpuId::from_entries(&host(ALL)).unwrap();
        let answer =
            CpuTemplate::for_host(&supported, file.path(), |path| std::fs::read_to_string(path))
                .map(drop);
        let got = KVM_MAX_CPUID_ENTRIES + 2;
        assert!(
            matches!(answer, Err(TemplateError::TooManyLeaves { got: had, .. }) if had == got),
            "{answer:?}"
        );
    }

    fn leaf_text(leaf: u32, subleaf: usize) -> String {
        format!("[[cpuid]]\nleaf = {leaf}\nsubleaf = {subleaf}\n")
    }

    #[test]
    fn the_digest_is_of_the_text_and_of_what_the_host_shows() {
        let template = |name: &str, host: Vec<kvm_cpuid_entry2>| {
            CpuTemplate::built_in(&CpuId::from_entries(&host).unwrap(), name).unwrap()
        };
        let (sse4, avx) = (template("sse4", host(ALL)), template("avx", host(ALL)));
        assert_eq!((sse4.name(), avx.name()), ("sse4", "avx"));
        assert_eq!((sse4.shows_xsave(), avx.shows_xsave()), (false, true));
        assert_eq!(sse4.digest(), template("sse4", host(ALL)).digest());
        assert_ne!(sse4.digest(), avx.digest());
        // Another maker's name is in leaf 0.
        let mut other = host(ALL);
        other[0].ebx = 1;
        assert_ne!(sse4.digest(), template("sse4", other).digest());
        let leaf_1 = avx.cpuid().as_slice().iter().find(|leaf| leaf.function == 1).unwrap();
        assert_ne!(leaf_1.ecx & XSAVE, 0);
        assert!(avx.msrs().any(|msr| msr == (0x10, MsrAnswer::Clock)));
    }

    #[test]
    fn two_texts_that_say_the_same_are_two_templates() {
        let supported = CpuId::from_entries(&host(ALL)).unwrap();
        let digest = |text: &str| {
            let read = |_: &Path| Ok(format!("name = \"own\"\n{text}"));
            CpuTemplate::for_host(&supported, Path::new("own.toml"), read).unwrap().digest()
        };
        assert_eq!(digest("# one\n"), digest("# one\n"));
        assert_ne!(digest("# one\n"), digest("# two\n"));
    }

    #[test]
    fn a_template_that_does_not_come_with_the_program_is_not_built_in() {
        let supported = CpuId::from_entries(&host(ALL)).unwrap();
        let error = CpuTemplate::built_in(&supported, "no-such").map(drop).unwrap_err();
        assert!(error.to_string().contains("there is no CPU template 'no-such'"), "{error}");
        let without_sse2 = CpuId::from_entries(&host(ALL & !(1 << 26))).unwrap();
        let error = CpuTemplate::built_in(&without_sse2, "minimal").map(drop).unwrap_err();
        assert!(error.to_string().contains("leaf 0x1 has EDX"), "{error}");
    }
}
