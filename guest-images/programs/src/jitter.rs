//! The kernel's jitter entropy generator, which reads the time stamp counter in a module: `jitter`
//! prints what it gives, through a socket of the kernel's crypto interface (Linux,
//! Documentation/crypto/userspace-if.rst).

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, AlgAddr, MsgFlags, SockFlag, SockType, accept, bind, recv, socket,
};

use crate::AppletError;
use crate::options::Options;

const DEFAULT_COUNT: u64 = 1;
const NUMBER_BYTES: usize = 32;

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let count = options.position(0, "a count")?.unwrap_or(DEFAULT_COUNT);
    let refused = |doing: &'static str| {
        move |errno: nix::Error| {
            AppletError::io(format!("jitterentropy_rng: {doing}"))(errno.into())
        }
    };
    let transform = socket(AddressFamily::Alg, SockType::SeqPacket, SockFlag::empty(), None)
        .map_err(refused("socket"))?;
    bind(transform.as_raw_fd(), &AlgAddr::new("rng", "jitterentropy_rng"))
        .map_err(refused("bind"))?;
    let generator = accept(transform.as_raw_fd()).map_err(refused("accept"))?;
    // SAFETY: accept has just made this descriptor and nobody else has it.
    let generator = unsafe { OwnedFd::from_raw_fd(generator) };
    for _ in 0..count {
        let mut number = [0; NUMBER_BYTES];
        let got =
            recv(generator.as_raw_fd(), &mut number, MsgFlags::empty()).map_err(refused("recv"))?;
        let shown: String = number[..got].iter().map(|byte| format!("{byte:02x}")).collect();
        println!("JITTER ok {shown}");
    }
    Ok(())
}
