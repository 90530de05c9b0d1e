//! The guest's network card on the host: a tap device, opened, never created.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use ftvmm_devices::MTU_MIN;
use libc::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, c_int, c_short, c_uint};
use thiserror::Error;

use crate::sync::{Mutex, lock};

/// Size of `virtio_net_hdr_v1`, which every frame carries in front (virtio 1.2 section 5.1.6).
pub const VNET_HEADER_BYTES: usize = 12;
/// The largest frame there is, with its header: Ethernet header, VLAN tag and a packet of the
/// greatest length.
const FRAME_BYTES_MAX: usize = VNET_HEADER_BYTES + 14 + 4 + 65_535;
/// Offloads the guest understands in what it receives: checksums left to it (linux/if_tun.h).
const TUN_F_CSUM: c_uint = 1;

// Declared as a call that only reads, it writes the ifreq back (`__tun_chr_ioctl`,
// drivers/net/tun.c).
nix::ioctl_readwrite_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);
nix::ioctl_write_ptr_bad!(tun_set_vnet_header_size, libc::TUNSETVNETHDRSZ, c_int);

/// Why a tap cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// The name is no interface name.
    #[error("'{name}' is no interface name: 1 to 15 bytes, no '/' and no blank")]
    BadName {
        /// What was given.
        name: String,
    },
    /// There is no such interface.
    #[error(
        "there is no tap '{name}': make it with 'ip tuntap add {name} mode tap && ip link set \
         {name} up'"
    )]
    Missing {
        /// What was given.
        name: String,
    },
    /// Its MTU is none of a network card.
    #[error("tap '{name}' has an MTU of {got}; {wanted}")]
    Mtu {
        /// What was given.
        name: String,
        /// What the host says, in bytes.
        got: u32,
        /// What would be right.
        wanted: String,
    },
    /// The host refused.
    #[error("tap '{name}' cannot be opened ({step}): {cause}")]
    Refused {
        /// What was given.
        name: String,
        /// The step that failed.
        step: &'static str,
        /// The cause.
        cause: std::io::Error,
    },
}

/// The MTU of the existing tap `name`: `wanted`, if the user named one.
///
/// # Errors
/// When there is no such tap, or its MTU is another or none a network card can have (virtio 1.2
/// §5.1.4.1).
pub fn tap_mtu(name: &str, wanted: Option<u16>) -> Result<u16, TapError> {
    let path = Path::new("/sys/class/net").join(name).join("mtu");
    let refused = |cause| TapError::Refused { name: name.into(), step: "reading its MTU", cause };
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => TapError::Missing { name: name.into() },
        _ => refused(error),
    })?;
    let got: u32 = text.trim().parse().map_err(|_| refused(ErrorKind::InvalidData.into()))?;
    check_mtu(name, got, wanted)
}

fn check_mtu(name: &str, got: u32, wanted: Option<u16>) -> Result<u16, TapError> {
    let wrong = |wanted| TapError::Mtu { name: name.into(), got, wanted };
    match (u16::try_from(got), wanted) {
        (Ok(mtu), Some(wanted)) if mtu == wanted => Ok(mtu),
        (_, Some(wanted)) => Err(wrong(format!(
            "--net says {wanted}: set it with 'ip link set {name} mtu {wanted}', or leave mtu= out"
        ))),
        (Ok(mtu), None) if mtu >= MTU_MIN => Ok(mtu),
        _ => Err(wrong(format!("a network card has {MTU_MIN} to {}", u16::MAX))),
    }
}

/// What all handles on one tap share.
#[derive(Debug)]
struct Shared {
    name: String,
    /// Closed while the interface is gone.
    file: Mutex<Option<Arc<File>>>,
    why_down: Mutex<Option<String>>,
}

/// A tap. Reads and writes never block. The interface may go and come back under it: meanwhile what
/// is sent is lost, as on any network.
#[derive(Debug)]
pub struct Tap {
    shared: Arc<Shared>,
    buffer: Vec<u8>,
}

impl Tap {
    /// Opens the existing tap `name`.
    ///
    /// # Errors
    /// When it does not exist, is busy, or may not be opened.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let file = Mutex::new(Some(Arc::new(Self::open_file(name)?)));
        let shared = Shared { name: name.into(), file, why_down: Mutex::default() };
        Ok(Self::on(Arc::new(shared)))
    }

    /// A tap whose frames are the datagrams of a socket; the way to the clients is that of the
    /// interface `name`.
    pub fn over(name: &str, file: File) -> Self {
        let file = Mutex::new(Some(Arc::new(file)));
        Self::on(Arc::new(Shared { name: name.into(), file, why_down: Mutex::default() }))
    }

    fn on(shared: Arc<Shared>) -> Self {
        Self { shared, buffer: vec![0; FRAME_BYTES_MAX] }
    }

    fn open_file(name: &str) -> Result<File, TapError> {
        let is_name = |n: &str| {
            !n.is_empty() && n.len() < libc::IFNAMSIZ && !n.contains(['/', ' ', '\t', '\0'])
        };
        if !is_name(name) || matches!(name, "." | "..") {
            return Err(TapError::BadName { name: name.into() });
        }
        if !Path::new("/sys/class/net").join(name).exists() {
            return Err(TapError::Missing { name: name.into() });
        }
        let refused = |step| {
            move |cause: std::io::Error| TapError::Refused { name: name.into(), step, cause }
        };
        let os = |errno: nix::Error| std::io::Error::from(errno);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(refused("open /dev/net/tun"))?;
        let c_name = CString::new(name).map_err(|_| TapError::BadName { name: name.into() })?;
        // SAFETY: ifreq is plain data for which all zeroes is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (slot, byte) in request.ifr_name.iter_mut().zip(c_name.as_bytes()) {
            *slot = *byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as c_short;
        let fd = file.as_raw_fd();
        // SAFETY: TUNSETIFF reads and writes one ifreq, which lives for the call and is borrowed
        // for it alone.
        unsafe { tun_set_iff(fd, &mut request) }.map_err(os).map_err(refused("TUNSETIFF"))?;
        let size = VNET_HEADER_BYTES as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which lives for the call.
        unsafe { tun_set_vnet_header_size(fd, &size) }
            .map_err(os)
            .map_err(refused("TUNSETVNETHDRSZ"))?;
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        unsafe { tun_set_offload(fd, TUN_F_CSUM as c_int) }
            .map_err(os)
            .map_err(refused("TUNSETOFFLOAD"))?;
        Ok(file)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Closes the tap for every handle: the interface is gone.
    pub fn lose(&self) {
        lock(&self.shared.file).take();
    }

    /// The open tap, opened again if it was lost.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reopened(&self) -> Result<Arc<File>, TapError> {
        let mut file = lock(&self.shared.file);
        if let Some(file) = &*file {
            return Ok(file.clone());
        }
        Ok(file.insert(Arc::new(Self::open_file(&self.shared.name)?)).clone())
    }

    /// Why clients do not reach the guest over this tap; `None` when nothing is known to be in the
    /// way.
    pub fn why_down(&self) -> Option<String> {
        lock(&self.shared.why_down).clone()
    }

    /// Notes why clients do not reach the guest; whether it is another reason than before.
    pub fn set_why_down(&self, why: Option<String>) -> bool {
        let mut known = lock(&self.shared.why_down);
        let is_new = *known != why;
        *known = why;
        is_new
    }

    fn file(&self) -> Option<Arc<File>> {
        lock(&self.shared.file).clone()
    }

    /// The next frame with its header, or `None` when there is none now, or no interface.
    ///
    /// # Errors
    /// When the host fails.
    pub fn read_frame(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let Some(file) = self.file() else { return Ok(None) };
        loop {
            match (&*file).read(&mut self.buffer) {
                Ok(bytes) => return Ok(Some(self.buffer[..bytes].to_vec())),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends a frame with its header; false when it is lost, like on any network: the host has no
    /// room for it, does not accept its header, or its interface is down.
    ///
    /// # Errors
    /// When the host fails.
    pub fn write_frame(&self, frame: &[u8]) -> std::io::Result<bool> {
        let Some(file) = self.file() else { return Ok(false) };
        match (&*file).write(frame) {
            Ok(_) => Ok(true),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::InvalidInput) => {
                Ok(false)
            }
            // Down, or deleted under the open file (drivers/net/tun.c: `tun_get_user`,
            // `tun_chr_write_iter`).
            Err(e) if matches!(e.raw_os_error(), Some(libc::EIO | libc::EBADFD)) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

impl Clone for Tap {
    /// A second handle on the same tap, for the other direction.
    fn clone(&self) -> Self {
        Self::on(self.shared.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tap_is_named_with_the_way_to_make_it() {
        let error = Tap::open("ftnone0").unwrap_err().to_string();
        assert!(error.contains("ip tuntap add ftnone0"), "{error}");
    }

    #[test]
    fn an_mtu_that_is_not_the_taps_is_refused_in_one_line() {
        assert_eq!(check_mtu("t", 9000, Some(9000)).unwrap(), 9000);
        assert_eq!(check_mtu("t", 1400, None).unwrap(), 1400);
        let error = check_mtu("t", 1500, Some(9000)).unwrap_err().to_string();
        assert!(error.contains("1500") && error.contains("ip link set t mtu 9000"), "{error}");
        for got in [67, 65_536] {
            let error = check_mtu("t", got, None).unwrap_err().to_string();
            assert!(error.contains("68 to 65535") && !error.contains('\n'), "{error}");
        }
        assert!(matches!(tap_mtu("ftnone0", None), Err(TapError::Missing { .. })));
    }

    #[test]
    fn a_name_that_is_none_is_refused() {
        for name in ["", "a-name-of-20-letters", "a/b", "a b", ".."] {
            assert!(matches!(Tap::open(name), Err(TapError::BadName { .. })), "{name}");
        }
    }
}
