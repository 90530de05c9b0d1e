//! Starts another kernel without the machine's firmware: `kexec KERNEL INITRAMFS CMDLINE`
//! (kexec_file_load(2)).

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::reboot::{RebootMode, reboot};

use crate::AppletError;
use crate::options::Options;

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let word = |index, wanted| {
        let missing = || AppletError::Usage { argument: String::new(), wanted };
        options.position::<String>(index, wanted)?.ok_or_else(missing)
    };
    let open = |path: String| File::open(&path).map_err(AppletError::io(path));
    let kernel = open(word(0, "a kernel")?)?;
    let initramfs = open(word(1, "an initramfs")?)?;
    let cmdline = word(2, "a kernel command line")?;
    let wanted = "a kernel command line without a zero";
    let text = CString::new(cmdline.clone())
        .map_err(|_| AppletError::Usage { argument: cmdline, wanted })?;
    let length = text.as_bytes_with_nul().len();
    // SAFETY: the kernel reads `length` bytes of a string that outlives the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            length,
            text.as_ptr(),
            0,
        )
    };
    if answer != 0 {
        return Err(AppletError::io("kexec_file_load")(io::Error::last_os_error()));
    }
    // It does not come back when it succeeds.
    let Err(errno) = reboot(RebootMode::RB_KEXEC);
    Err(AppletError::io("reboot")(errno.into()))
}
