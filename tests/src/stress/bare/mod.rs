//! Bare guests: a kernel of their own and a random list of blocks, in one ELF.
//!
//! A block is drawn from its own seed, so that leaving blocks out changes nothing in those that
//! stay. The guest runs them one after the other, prints a hash of all it has seen and switches
//! itself off.

mod blocks;
mod code;
mod instruction;
mod kernel;
mod layout;
mod paging;
mod stream;

use fastrand::Rng;
use iced_x86::IcedError;

use blocks::KINDS;
use code::Code;
pub(super) use instruction::pick;
use kernel::{Choices, Kernel};

/// What may come up beside the usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// RDTSC and RDTSCP in ring 0, which ftvmm finds in the ELF's executable sections.
    pub kernel_rdtsc: bool,
    /// RDTSC and RDTSCP in ring 3.
    pub user_rdtsc: bool,
}

/// A random bare guest.
#[derive(Clone, Debug)]
pub struct BareGuest {
    seed: u64,
    choices: Choices,
    features: Features,
    /// Kinds of its blocks, as places in the table of kinds.
    kinds: Vec<usize>,
}

/// A guest while its blocks are added.
struct Builder {
    code: Code,
    kernel: Kernel,
    features: Features,
}

impl BareGuest {
    /// Draws a guest from `seed`.
    pub fn random(seed: u64, features: Features) -> Self {
        let mut rng = Rng::with_seed(seed);
        let choices = Choices::random(&mut rng);
        let tickets: Vec<usize> = KINDS
            .iter()
            .enumerate()
            .flat_map(|(index, kind)| std::iter::repeat_n(index, kind.weight))
            .collect();
        let count = rng.usize(6..=28);
        let kinds = (0..count).map(|_| *pick(&mut rng, &tickets)).collect();
        Self { seed, choices, features, kinds }
    }

    /// Names of its blocks.
    pub fn parts(&self) -> Vec<&'static str> {
        self.kinds.iter().map(|&kind| KINDS[kind].name).collect()
    }

    /// Whether it takes what is typed.
    pub fn listens(&self) -> bool {
        self.choices.listens
    }

    /// The ELF of the guest with only the blocks `kept`.
    ///
    /// # Errors
    /// An instruction that cannot be encoded, which is a mistake in this program.
    pub fn image(&self, kept: &[usize]) -> Result<Vec<u8>, IcedError> {
        let mut code = Code::new();
        let kernel = kernel::handlers(&mut code.text, self.choices)?;
        let entry = kernel::entry(&mut code.text, &kernel, self.choices)?;
        let mut builder = Builder { code, kernel, features: self.features };
        for &block in kept {
            let own = self.seed ^ (block as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut rng = Rng::with_seed(own);
            (KINDS[self.kinds[block]].add)(&mut builder, &mut rng)?;
        }
        let Builder { mut code, kernel, .. } = builder;
        kernel::finish(&mut code)?;
        Ok(code.into_elf(entry, &kernel.vectors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEATURES: Features = Features { kernel_rdtsc: true, user_rdtsc: true };

    #[test]
    fn every_kind_of_block_assembles_and_a_seed_says_all() {
        for seed in 0..40 {
            let guest = BareGuest::random(seed, FEATURES);
            let all: Vec<usize> = (0..guest.parts().len()).collect();
            let image = guest.image(&all).unwrap();
            assert!(image == BareGuest::random(seed, FEATURES).image(&all).unwrap());
            assert!(guest.image(&all[1..]).unwrap() != image);
        }
    }
}
