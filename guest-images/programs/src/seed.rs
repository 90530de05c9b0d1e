//! Makes the kernel's entropy pool ready at once.
//!
//! Without TSC and RDRAND the only clock is the tick, whose jitter the kernel does not credit
//! (`try_to_generate_entropy`, drivers/char/random.c), and interrupts fill the pool in minutes. A
//! loader that passes SETUP_RNG_SEED avoids that; this applet covers those that do not. It credits
//! 256 bits for `ftguest.seed` of the command line and the clocks: enough for tests that want two
//! boots to differ, not for keys.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use nix::time::ClockId;
use sha2::{Digest, Sha256};

use crate::AppletError;
use crate::compute::clock;
use crate::options::Options;
use crate::param;

const DEVICE: &str = "/dev/urandom";
const PARAMETER: &str = "ftguest.seed";
const SEED_BYTES: usize = 32;

/// `struct rand_pool_info` of include/uapi/linux/random.h with a buffer of 32 bytes.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: i32,
    size_bytes: i32,
    seed: [u8; SEED_BYTES],
}

mod ioctl {
    //! The number encodes the size of the header (two ints), not of the whole argument.
    use super::RandPoolInfo;
    nix::ioctl_write_ptr_bad!(
        /// RNDADDENTROPY of include/uapi/linux/random.h.
        rnd_add_entropy,
        nix::request_code_write!(b'R', 0x03, 2 * size_of::<i32>()),
        RandPoolInfo
    );
}

pub(crate) fn main(_: &Options) -> Result<(), AppletError> {
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let mut hash = Sha256::new();
    hash.update(param::value(&command_line, PARAMETER).unwrap_or_default());
    for id in [ClockId::CLOCK_REALTIME, ClockId::CLOCK_MONOTONIC] {
        hash.update(clock(id)?.as_nanos().to_le_bytes());
    }
    let info = RandPoolInfo {
        entropy_bits: (SEED_BYTES * 8) as i32,
        size_bytes: SEED_BYTES as i32,
        seed: hash.finalize().into(),
    };
    let device = File::options().write(true).open(DEVICE).map_err(AppletError::io(DEVICE))?;
    // SAFETY: the descriptor is open for the whole call and `info` is what the request reads: a
    // header whose `size_bytes` is the length of the buffer behind it.
    let added = unsafe { ioctl::rnd_add_entropy(device.as_raw_fd(), &raw const info) };
    added.map(drop).map_err(|errno| AppletError::io("RNDADDENTROPY")(errno.into()))
}
