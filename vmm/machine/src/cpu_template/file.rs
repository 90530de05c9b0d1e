//! Template files: what they may say, and why one is refused.
//!
//! The format is explained at the top of `vmm/machine/templates/minimal.toml`. A file is data of
//! the user's, so everything it could break is checked here: a template that parses shows the guest
//! nothing no log can hold ([`FORBIDDEN`]) and grants no MSR that is missing from the state two
//! hosts compare.

use std::path::Path;

use serde::Deserialize;
use thiserror::Error;

use crate::msr::{MsrAnswer, STATE_MSRS};

/// Templates that come with the program, by name.
const BUILT_IN: [(&str, &str); 3] = [
    ("minimal", include_str!("../../templates/minimal.toml")),
    ("sse4", include_str!("../../templates/sse4.toml")),
    ("avx", include_str!("../../templates/avx.toml")),
];

/// The first extended leaf.
const EXTENDED: u32 = 0x8000_0000;

/// Features a template may not show, by leaf, subleaf, register (EAX 0 … EDX 3), bits (AMD APM vol.
/// 3, appendix E; Intel SDM vol. 2A, CPUID).
const FORBIDDEN: [(u32, u32, usize, u32, &str); 17] = [
    (0x1, 0, 2, 1 << 3, "MONITOR"),
    (0x1, 0, 2, 1 << 21, "x2APIC"),
    (0x1, 0, 2, 1 << 24, "the TSC deadline timer"),
    (0x1, 0, 2, 1 << 27, "OSXSAVE, which follows CR4"),
    (0x1, 0, 2, 1 << 30, "RDRAND"),
    (0x1, 0, 2, 1 << 31, "a hypervisor"),
    (0x1, 0, 3, 1 << 4, "the TSC"),
    (0x1, 0, 3, 1 << 9, "an APIC"),
    (0x7, 0, 1, 1 << 11, "RTM"),
    (0x7, 0, 1, 1 << 18, "RDSEED"),
    (0x7, 0, 2, 1 << 5, "WAITPKG"),
    (0x7, 0, 2, 1 << 22, "RDPID"),
    (0xd, 0, 0, !0x7, "XSAVE components beyond AVX"),
    (0xd, 1, 0, !0, "XSAVEOPT, XSAVEC, XSAVES or XGETBV(1)"),
    (0x8000_0001, 0, 2, 1 << 23 | 1 << 24, "performance counters"),
    (0x8000_0001, 0, 3, 1 << 27, "RDTSCP"),
    (0x8000_0007, 0, 3, 1 << 8, "an invariant TSC"),
];

/// Makers of CPUs whose model-specific registers differ, as leaf 0 of CPUID spells them in EBX,
/// EDX, ECX (AMD APM vol. 3, appendix E; Intel SDM vol. 2A, CPUID). Hygon's CPUs are AMD's under
/// another name.
const VENDORS: [(&[u8; 12], Vendor); 3] = [
    (b"GenuineIntel", Vendor::Intel),
    (b"AuthenticAMD", Vendor::Amd),
    (b"HygonGenuine", Vendor::Amd),
];

/// Why a template file is refused.
#[derive(Debug, Error)]
pub enum TemplateFileError {
    /// The name is no template's and no file's.
    #[error("there is no CPU template '{name}': it is neither {known} nor a file: {cause}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// The templates there are.
        known: String,
        /// Why it is no file.
        cause: std::io::Error,
    },
    /// The text is not TOML of the right shape.
    #[error("CPU template '{origin}', line {line}: {message}")]
    Syntax {
        /// The template or file.
        origin: String,
        /// Counted from one.
        line: usize,
        /// What the parser said.
        message: String,
    },
    /// The text says something no guest can be given.
    #[error("CPU template '{origin}': {problem}")]
    Invalid {
        /// The template or file.
        origin: String,
        /// What is wrong.
        problem: TemplateProblem,
    },
}

/// What is wrong with a well-formed template.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TemplateProblem {
    /// A leaf beyond the highest the template itself announces, or in no range of leaves.
    #[error("CPUID leaf {leaf:#x} is out of range: the highest of its kind is {highest:#x}")]
    LeafOutOfRange {
        /// The leaf.
        leaf: u32,
        /// EAX of leaf 0 or of leaf 0x80000000.
        highest: u32,
    },
    /// A leaf twice.
    #[error("CPUID leaf {leaf:#x}, subleaf {subleaf} is there twice")]
    LeafTwice {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// A feature whose results no log can hold.
    #[error("CPUID leaf {leaf:#x} would show the guest {feature}")]
    Forbidden {
        /// The leaf.
        leaf: u32,
        /// The feature.
        feature: &'static str,
    },
    /// An MSR twice.
    #[error("MSR {index:#x} is there twice")]
    MsrTwice {
        /// The MSR.
        index: u32,
    },
    /// An MSR left to KVM that is neither compared nor saved.
    #[error("MSR {index:#x} cannot be KVM's: it is no part of the saved state")]
    MsrNotSaved {
        /// The MSR.
        index: u32,
    },
}

/// A template as its file has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateFile {
    /// The template's name.
    pub name: String,
    /// The leaves that exist.
    #[serde(default)]
    pub cpuid: Vec<Leaf>,
    /// The MSRs that exist.
    #[serde(default)]
    pub msr: Vec<Msr>,
}

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leaf {
    /// EAX of the query.
    pub leaf: u32,
    /// ECX of the query, where it counts.
    pub subleaf: Option<u32>,
    #[serde(default)]
    eax: Register,
    #[serde(default)]
    ebx: Register,
    #[serde(default)]
    ecx: Register,
    #[serde(default)]
    edx: Register,
}

impl Leaf {
    /// EAX, EBX, ECX, EDX.
    pub fn registers(&self) -> [Register; 4] {
        [self.eax, self.ebx, self.ecx, self.edx]
    }
}

/// One register of a leaf: `host & (need | keep) | set`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Register {
    /// Bits the host must have.
    pub need: u32,
    /// Bits that are the host's.
    pub keep: u32,
    /// Bits that are one.
    pub set: u32,
}

/// One model-specific register.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// What manuals call it.
    pub name: String,
    /// The CPU vendor that has it; every CPU when it is absent.
    pub vendor: Option<Vendor>,
    /// Who answers.
    pub answer: MsrAnswer,
}

/// Whose CPU it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vendor {
    /// Intel.
    Intel,
    /// AMD, and Hygon.
    Amd,
}

impl Vendor {
    /// The maker that EBX, ECX and EDX of CPUID leaf 0 name, if its registers are known here.
    pub fn named([ebx, ecx, edx]: [u32; 3]) -> Option<Self> {
        let name = [ebx, edx, ecx].map(u32::to_le_bytes).concat();
        VENDORS.iter().find(|(known, _)| name == *known).map(|(_, vendor)| *vendor)
    }
}

impl TemplateFile {
    /// The template that comes with the program under this name, or else the file of this path,
    /// which `read` reads; and its text.
    ///
    /// # Errors
    /// [`TemplateFileError`], in one line.
    pub fn load(
        name: &Path,
        read: impl FnOnce(&Path) -> std::io::Result<String>,
    ) -> Result<(Self, String), TemplateFileError> {
        let origin = name.display().to_string();
        let text = match BUILT_IN.iter().find(|(known, _)| Path::new(known) == name) {
            Some((_, text)) => (*text).to_owned(),
            None => read(name).map_err(|cause| {
                let known = BUILT_IN.map(|(known, _)| format!("'{known}'")).join(", ");
                TemplateFileError::Unknown { name: origin.clone(), known, cause }
            })?,
        };
        Ok((Self::parse(&origin, &text)?, text))
    }

    fn parse(origin: &str, text: &str) -> Result<Self, TemplateFileError> {
        let file: Self = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            TemplateFileError::Syntax {
                origin: origin.into(),
                line: text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1,
                message: error.message().lines().collect::<Vec<_>>().join("; "),
            }
        })?;
        match file.problem() {
            None => Ok(file),
            Some(problem) => Err(TemplateFileError::Invalid { origin: origin.into(), problem }),
        }
    }

    fn problem(&self) -> Option<TemplateProblem> {
        let highest = |first: u32| {
            let leaf = self.cpuid.iter().find(|leaf| leaf.leaf == first);
            leaf.map_or(first, |leaf| leaf.eax.set)
        };
        for (number, leaf) in self.cpuid.iter().enumerate() {
            let Leaf { leaf: function, subleaf, .. } = *leaf;
            let subleaf = subleaf.unwrap_or(0);
            let highest = highest(function & EXTENDED);
            if function > highest || function & 0x7fff_0000 != 0 {
                return Some(TemplateProblem::LeafOutOfRange { leaf: function, highest });
            }
            let same =
                |other: &Leaf| (other.leaf, other.subleaf.unwrap_or(0)) == (function, subleaf);
            if self.cpuid[..number].iter().any(same) {
                return Some(TemplateProblem::LeafTwice { leaf: function, subleaf });
            }
            for (of, sub, register, bits, feature) in FORBIDDEN {
                let Register { need, keep, set } = leaf.registers()[register];
                if (of, sub) == (function, subleaf) && (need | keep | set) & bits != 0 {
                    return Some(TemplateProblem::Forbidden { leaf: function, feature });
                }
            }
        }
        for (number, Msr { index, vendor, answer, .. }) in self.msr.iter().enumerate() {
            let same = |other: &Msr| {
                other.index == *index
                    && (vendor.is_none() || other.vendor.is_none() || other.vendor == *vendor)
            };
            if self.msr[..number].iter().any(same) {
                return Some(TemplateProblem::MsrTwice { index: *index });
            }
            if *answer == MsrAnswer::Kvm && !STATE_MSRS.contains(index) {
                return Some(TemplateProblem::MsrNotSaved { index: *index });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "name = \"t\"\n[[cpuid]]\nleaf = 0\neax = { set = 1 }\n";

    fn refused(more: &str) -> String {
        let error = TemplateFile::parse("t.toml", &format!("{HEAD}{more}")).unwrap_err();
        let text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    }

    #[test]
    fn templates_of_the_program_are_good_and_are_called_what_they_are_called() {
        for (name, _) in BUILT_IN {
            let (file, _) =
                TemplateFile::load(Path::new(name), |path| std::fs::read_to_string(path)).unwrap();
            assert_eq!(file.name, name);
        }
    }

    #[test]
    fn a_bad_file_is_told_in_one_line() {
        for (more, wanted) in [
            ("ebc = { keep = 1 }\n", "'t.toml', line 5: unknown field `ebc`"),
            ("eax = 3\n", "line 5: duplicate key"),
            ("ebx = { keep = 0x1ffffffff }\n", "line 5: "),
            ("[[cpuid]\n", "line 5: "),
            (
                "[[cpuid]]\nleaf = 7\n",
                "CPUID leaf 0x7 is out of range: the highest of its kind is 0x1",
            ),
            ("[[cpuid]]\nleaf = 0x40000000\n", "leaf 0x40000000 is out of range"),
            (
                "[[cpuid]]\nleaf = 0x80000001\n",
                "0x80000001 is out of range: the highest of its kind is 0x80000000",
            ),
            ("[[cpuid]]\nleaf = 0\n", "leaf 0x0, subleaf 0 is there twice"),
            ("[[cpuid]]\nleaf = 1\necx = { keep = 0xffffffff }\n", "would show the guest MONITOR"),
            (
                "[[cpuid]]\nleaf = 1\nedx = { need = 0x10 }\n",
                "leaf 0x1 would show the guest the TSC",
            ),
            ("[[msr]]\nindex = 1\nname = \"a\"\nanswer = \"kvm\"\n", "MSR 0x1 cannot be KVM's"),
            ("[[msr]]\nindex = 1\nname = \"a\"\nanswer = \"gp\"\n", "line 8: unknown variant `gp`"),
        ] {
            let text = refused(more);
            assert!(text.contains(wanted), "{text}");
        }
        let text = TemplateFile::load(Path::new("no-such"), |path| std::fs::read_to_string(path))
            .unwrap_err()
            .to_string();
        assert!(
            text.starts_with(
                "there is no CPU template 'no-such': it is neither 'minimal', 'sse4', 'avx' nor a \
                 file"
            ),
            "{text}"
        );
    }

    #[test]
    fn an_msr_is_named_once() {
        let msr = "[[msr]]\nindex = 0x10\nname = \"TSC\"\nanswer = \"clock\"\n";
        assert!(refused(&format!("{msr}{msr}")).contains("MSR 0x10 is there twice"));
        let (intel, amd) =
            (format!("{msr}vendor = \"intel\"\n"), format!("{msr}vendor = \"amd\"\n"));
        for twice in [format!("{intel}{intel}"), format!("{msr}{amd}"), format!("{amd}{msr}")] {
            assert!(refused(&twice).contains("MSR 0x10 is there twice"));
        }
        assert!(TemplateFile::parse("t.toml", &format!("{HEAD}{intel}{amd}")).is_ok());
        assert!(refused(&format!("{msr}vendor = \"via\"\n")).contains("unknown variant `via`"));
    }

    #[test]
    fn a_vendor_is_known_by_the_words_of_leaf_0() {
        let words = |name: &[u8; 12]| {
            let word = |at: usize| {
                u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]])
            };
            [word(0), word(8), word(4)]
        };
        assert_eq!(Vendor::named(words(b"GenuineIntel")), Some(Vendor::Intel));
        assert_eq!(Vendor::named([0x756e_6547, 0x6c65_746e, 0x4965_6e69]), Some(Vendor::Intel));
        assert_eq!(Vendor::named(words(b"AuthenticAMD")), Some(Vendor::Amd));
        assert_eq!(Vendor::named(words(b"HygonGenuine")), Some(Vendor::Amd));
        assert_eq!(Vendor::named(words(b"CentaurHauls")), None);
    }
}
