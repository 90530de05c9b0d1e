//! The link from this host to the guest's clients: the tap, and the uplink of its bridge. The
//! kernel's messages about interfaces (rtnetlink(7), `RTM_NEWLINK` and `RTM_DELLINK`) say when
//! something changed; the state is then read by the interface's name.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// `RTMGRP_LINK` (linux/rtnetlink.h).
const LINK_GROUP: u32 = 1;
/// Longer messages are cut; their content is not used.
const MESSAGE_BYTES: usize = 256;

nix::ioctl_readwrite_bad!(interface_flags, libc::SIOCGIFFLAGS, libc::ifreq);

/// Why an interface does not carry frames now; `None` when it does. An open tap has a carrier
/// before the kernel says so (`linkwatch` takes up to a second), so it may be left out of account.
///
/// # Errors
/// When the host answers neither.
pub fn host_why_down(what: &str, name: &str, needs_carrier: bool) -> io::Result<Option<String>> {
    let asked = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero.
    let places = request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1);
    for (slot, byte) in places.zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    // SAFETY: SIOCGIFFLAGS reads and writes one ifreq, which lives for the call.
    match unsafe { interface_flags(asked.as_raw_fd(), &mut request) } {
        Err(Errno::ENODEV) => return Ok(Some(format!("{what} '{name}' is gone"))),
        answer => answer?,
    };
    // SAFETY: SIOCGIFFLAGS fills this member.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    let carries = !needs_carrier || flags & libc::IFF_RUNNING != 0;
    Ok(match (flags & libc::IFF_UP != 0, carries) {
        (true, true) => None,
        (true, false) => Some(format!("{what} '{name}' has no carrier")),
        (false, _) => Some(format!("{what} '{name}' is down")),
    })
}

/// Becomes readable when some interface of this host changed.
#[derive(Debug)]
pub struct LinkMessages(OwnedFd);

impl LinkMessages {
    /// Messages from now on.
    ///
    /// # Errors
    /// When the host gives no such socket.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let kind = (AddressFamily::Netlink, SockType::Raw, SockProtocol::NetlinkRoute);
        let fd = socket(kind.0, kind.1, flags, kind.2)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, LINK_GROUP))?;
        Ok(Self(fd))
    }

    /// Forgets what has come.
    pub fn drain(&self) {
        let mut buffer = [0; MESSAGE_BYTES];
        // ENOBUFS says that some were lost, and is cleared by that.
        while matches!(
            recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()),
            Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR)
        ) {}
    }
}

impl AsRawFd for LinkMessages {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_gone() {
        let why = host_why_down("tap", "ftnone0", false).unwrap();
        assert_eq!(why.as_deref(), Some("tap 'ftnone0' is gone"));
        assert_eq!(host_why_down("uplink", "lo", true).unwrap(), None);
    }
}
