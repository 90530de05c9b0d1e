//! Random workloads for Debian's cloud kernel: code that comes while it runs, another kernel,
//! floating-point faults.

use fastrand::Rng;

use super::bare::pick;

/// Loads and unloads modules that read the time stamp counter, at moments of its own.
const MODULES: &[&str] = &[
    "usleep DELAY; modprobe -a sha3_generic algif_rng jitterentropy_rng; jitter 2",
    "modprobe sha3_generic; usleep DELAY; modprobe jitterentropy_rng; modprobe algif_rng; jitter",
    "modprobe -a sha3_generic jitterentropy_rng algif_rng; rmmod jitterentropy_rng; usleep DELAY; \
     modprobe jitterentropy_rng; jitter",
    "(usleep DELAY; modprobe jitterentropy_rng) & modprobe -a sha3_generic algif_rng; compute 3; \
     wait; modprobe jitterentropy_rng; jitter",
    "modprobe -a sha3_generic jitterentropy_rng; rmmod jitterentropy_rng sha3_generic; modprobe \
     af_alg; usleep DELAY; modprobe -a sha3_generic algif_rng jitterentropy_rng; jitter",
];
/// Beside them.
const OTHERS: &[&str] = &["selfcheck 1", "rdtsc 200", "sigfpe 700", "compute 2", "mkdir -p /tmp/d"];
const DELAY_US_MAX: u32 = 30_000;
/// What the machine needs, and the script of the second kernel.
const SECOND_KERNEL: &str = "console=ttyS0 nolapic lpj=1000000 panic=-1 ftguest.run=";
const SECOND_SCRIPTS: &[&str] = &[
    "rdtsc:200,selfcheck:1,reboot:-f",
    "modprobe:-a:sha3_generic:algif_rng:jitterentropy_rng,jitter,reboot:-f",
];

/// A guest that runs a script and switches itself off, or has a second kernel do so.
#[derive(Clone, Debug)]
pub struct CloudGuest {
    snippets: Vec<String>,
    second: Option<&'static str>,
}

impl CloudGuest {
    /// Draws a script.
    pub fn random(rng: &mut Rng) -> Self {
        let mut snippets: Vec<&str> = vec![*pick(rng, MODULES)];
        snippets.extend((0..rng.usize(0..=2)).map(|_| *pick(rng, OTHERS)));
        rng.shuffle(&mut snippets);
        let mut with_delay =
            |snippet: &str| snippet.replace("DELAY", &rng.u32(1..DELAY_US_MAX).to_string());
        let snippets = snippets.into_iter().map(&mut with_delay).collect();
        let second = (rng.u8(0..3) == 0).then(|| *pick(rng, SECOND_SCRIPTS));
        Self { snippets, second }
    }

    /// Whether it starts a second kernel.
    pub fn starts_another(&self) -> bool {
        self.second.is_some()
    }

    /// Its snippets.
    pub fn parts(&self) -> Vec<&str> {
        self.snippets.iter().map(String::as_str).collect()
    }

    /// The script of the snippets `kept`.
    pub fn script(&self, kept: &[usize]) -> String {
        let last = self.second.map_or_else(|| "reboot -f".to_owned(), kexec);
        let chosen = kept.iter().map(|&index| self.snippets[index].clone());
        chosen.chain([last]).collect::<Vec<_>>().join("; ")
    }
}

/// The command that has a second kernel run `script`, in the form that has no blanks.
pub fn kexec(script: &str) -> String {
    format!("kexec /boot/vmlinuz /boot/initramfs '{SECOND_KERNEL}{script}'; reboot -f")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_run::cmdline;

    #[test]
    fn every_script_fits_on_a_command_line() {
        let guests: Vec<_> =
            (0..500).map(|seed| CloudGuest::random(&mut Rng::with_seed(seed))).collect();
        for guest in &guests {
            let line = cmdline(&guest.script(&(0..guest.parts().len()).collect::<Vec<_>>()));
            assert!(line.len() < 1500 && !line.contains("DELAY"), "{line}");
            assert_eq!(line.matches('"').count(), 2, "{line}");
        }
        let seconds = guests.iter().filter(|guest| guest.starts_another()).count();
        assert!((100..250).contains(&seconds), "{seconds} of 500");
    }
}
