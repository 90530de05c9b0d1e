//! The raw file behind a guest's disk: one request after the other, as a disk would.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ftvmm_devices::{DiskOp, SECTOR_BYTES, ZeroRange};
use ftvmm_replication::{DiskRefusal, DiskState};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::folder::Folder;
use crate::user_file::FileError;

/// Zeroes written at a time where the file system has no faster way.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
const DIGEST_CHUNK_BYTES: usize = 1 << 20;

/// Why a file cannot be a disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The host refuses it.
    #[error("disk '{path}' cannot be used: {cause}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        cause: io::Error,
    },
    /// It has no length a disk can have.
    #[error(
        "disk '{path}' has {got_bytes} bytes; a raw disk image has a multiple of {SECTOR_BYTES}, \
         and some",
        path = path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length.
        got_bytes: u64,
    },
    /// It is no file.
    #[error("disk '{path}' is no regular file and no block device; give a raw disk \
             image", path = path.display())]
    NoFile {
        /// What was given.
        path: PathBuf,
    },
    /// A restored disk is written anew.
    #[error("disk '{path}' is there already; a restored disk goes into a new \
             file", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Its label cannot be read.
    #[error(transparent)]
    Label {
        /// Which, and why.
        cause: Box<FileError>,
    },
    /// Its label is none.
    #[error(
        "disk '{path}': its label '{label}' is damaged, or of another version; remove the label if \
         you know that the disk is whole and up to date", path = path.display(),
        label = label.display()
    )]
    LabelDamaged {
        /// The disk.
        path: PathBuf,
        /// The label.
        label: PathBuf,
    },
    /// Its label cannot be written.
    #[error(
        "disk label '{label}' cannot be written, which is to say that the disk is {state}: \
         {cause}; let ftvmm write there, or name another file with --disk …,label=FILE",
        label = label.display()
    )]
    LabelUnwritable {
        /// The label.
        label: PathBuf,
        /// What it is to say.
        state: DiskState,
        /// What the host said.
        cause: io::Error,
    },
    /// What is known of it speaks against its use.
    #[error(
        "disk '{path}' is not used: {refusal}, or overrule this with --disk \
         path={path},force={force}",
        path = path.display(),
        force = refusal.force().name()
    )]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        refusal: DiskRefusal,
    },
    /// Another process holds it.
    #[error("disk '{path}' is in use by another ftvmm; each needs a copy of its \
             own", path = path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

nix::ioctl_read!(block_size_bytes, 0x12, 114, usize);

/// The length of a block device (linux/fs.h, BLKGETSIZE64, which is declared with a size_t and
/// writes 64 bits).
fn device_bytes(device: &File) -> io::Result<u64> {
    let mut bytes = 0;
    // SAFETY: BLKGETSIZE64 writes one u64, which on x86-64 is a usize and lives for the call.
    unsafe { block_size_bytes(device.as_raw_fd(), &mut bytes) }?;
    Ok(bytes as u64)
}

/// A disk image that is ours alone.
#[derive(Debug)]
pub struct DiskFile {
    file: Flock<File>,
    path: PathBuf,
    size_bytes: u64,
}

impl DiskFile {
    /// Opens a raw disk image and locks it against other ftvmm of this host.
    ///
    /// # Errors
    /// When it is not there, no disk image, or in use.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let failed = |cause| DiskError::File { path: path.into(), cause };
        let mut options = OpenOptions::new();
        // A pipe is not waited for; a block device that is mounted or otherwise in use is refused
        // (open(2), O_EXCL).
        let is_device = std::fs::metadata(path).is_ok_and(|f| f.file_type().is_block_device());
        let flags = libc::O_NONBLOCK | if is_device { libc::O_EXCL } else { 0 };
        let opened = options.read(true).write(true).custom_flags(flags).open(path);
        Self::of(opened.map_err(failed)?, path)
    }

    /// A new image of that length, all zero.
    ///
    /// # Errors
    /// When there is such a file, or the host refuses.
    pub fn create(path: &Path, size_bytes: u64) -> Result<Self, DiskError> {
        // It will hold what the guest's disk does.
        let name = path.file_name().unwrap_or_default();
        let made = Folder::of(path).and_then(|folder| folder.create_new(name));
        let sized = made.and_then(|file| file.set_len(size_bytes).map(|()| file));
        let file = sized.map_err(|cause| match cause.kind() {
            io::ErrorKind::AlreadyExists => DiskError::Exists { path: path.into() },
            _ => DiskError::File { path: path.into(), cause },
        })?;
        Self::of(file, path)
    }

    fn of(file: File, path: &Path) -> Result<Self, DiskError> {
        let failed = |cause| DiskError::File { path: path.into(), cause };
        let facts = file.metadata().map_err(failed)?;
        let size_bytes = match () {
            () if facts.is_file() => facts.len(),
            () if facts.file_type().is_block_device() => device_bytes(&file).map_err(failed)?,
            () => return Err(DiskError::NoFile { path: path.into() }),
        };
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size { path: path.into(), got_bytes: size_bytes });
        }
        let file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
                Errno::EWOULDBLOCK => DiskError::InUse { path: path.into() },
                e => failed(e.into()),
            })?;
        Ok(Self { file, path: path.into(), size_bytes })
    }

    /// Its length.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of all of it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn sha256(&self) -> Result<[u8; 32], DiskError> {
        let failed = |cause| DiskError::File { path: self.path.clone(), cause };
        let mut hash = Sha256::new();
        let mut chunk = vec![0; DIGEST_CHUNK_BYTES];
        for offset_bytes in (0..self.size_bytes).step_by(DIGEST_CHUNK_BYTES) {
            let left_bytes = self.size_bytes - offset_bytes;
            let part = &mut chunk[..left_bytes.min(DIGEST_CHUNK_BYTES as u64) as usize];
            self.read_at(offset_bytes, part).map_err(failed)?;
            hash.update(part);
        }
        Ok(hash.finalize().into())
    }

    /// Carries out a request; returns what was read.
    ///
    /// # Errors
    /// What the host says. A request that failed may be done in part.
    pub fn execute(&self, op: &DiskOp) -> io::Result<Vec<u8>> {
        match op {
            DiskOp::Read { sector, length_bytes } => {
                let mut data = vec![0; *length_bytes as usize];
                self.read_at(sector * SECTOR_BYTES, &mut data)?;
                return Ok(data);
            }
            DiskOp::Write { sector, data } => self.write_at(sector * SECTOR_BYTES, data)?,
            DiskOp::Flush => self.file.sync_data()?,
            DiskOp::Zero { ranges } => ranges.iter().try_for_each(|range| self.zero(range))?,
        }
        Ok(Vec::new())
    }

    /// Fills `data` with what lies at `offset_bytes`.
    ///
    /// # Errors
    /// What the host says.
    pub fn read_at(&self, offset_bytes: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset_bytes)
    }

    /// Writes `data` at `offset_bytes`.
    ///
    /// # Errors
    /// What the host says.
    pub fn write_at(&self, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset_bytes)
    }

    fn zero(&self, range: &ZeroRange) -> io::Result<()> {
        let (start, length) =
            (range.sector * SECTOR_BYTES, u64::from(range.sector_count) * SECTOR_BYTES);
        if length == 0 {
            return Ok(());
        }
        let how = match range.unmap {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        let flags = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(self.file.deref(), flags, start as i64, length as i64) {
            // Not every file system can, and none has to: zeroes can always be written.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
                self.write_zeroes(start, length)
            }
            done => Ok(done?),
        }
    }

    fn write_zeroes(&self, start: u64, length: u64) -> io::Result<()> {
        let chunk = ZEROES.len() as u64;
        (0..length).step_by(ZEROES.len()).try_for_each(|at| {
            self.write_at(start + at, &ZEROES[..chunk.min(length - at) as usize])
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn what_is_no_disk_image_is_refused_with_its_name() {
        for (path, wanted) in [
            (Path::new("nonexistent.img"), "'nonexistent.img' cannot be used: No such file"),
            (Path::new("/dev/null"), "'/dev/null' is no regular file"),
            (image(1000).path(), "has 1000 bytes; a raw disk image has a multiple of 512"),
            (image(0).path(), "has 0 bytes"),
        ] {
            let error = DiskFile::open(path).unwrap_err().to_string();
            assert!(error.contains(wanted), "{path:?}: {error}");
        }
    }

    #[test]
    fn a_file_serves_one_process_at_a_time() {
        let image = image(4096);
        let first = DiskFile::open(image.path()).unwrap();
        let error = DiskFile::open(image.path()).unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
        drop(first);
        DiskFile::open(image.path()).unwrap();
    }

    #[test]
    fn a_new_disk_is_its_owners_and_never_replaces_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        drop(DiskFile::create(&path, 4096).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = DiskFile::create(&path, 4096).unwrap_err();
        assert!(matches!(error, DiskError::Exists { .. }), "{error}");
    }

    #[test]
    fn zeroes_are_zeroes_whichever_way_they_come() {
        let image = image(1 << 20);
        let disk = DiskFile::open(image.path()).unwrap();
        let before = disk.sha256().unwrap();
        for unmap in [true, false] {
            disk.write_at(0, &vec![7; 1 << 20]).unwrap();
            let ranges = [(1, 3), (100, 1000), (2047, 1)];
            let range = |(sector, sector_count)| ZeroRange { sector, sector_count, unmap };
            let op = DiskOp::Zero { ranges: ranges.map(range).to_vec() };
            disk.execute(&op).unwrap();
            let mut all = vec![0; 1 << 20];
            disk.read_at(0, &mut all).unwrap();
            for (sector, chunk) in all.chunks(512).enumerate() {
                let zeroed =
                    ranges.iter().any(|(s, n)| (*s..s + u64::from(*n)).contains(&(sector as u64)));
                assert!(chunk.iter().all(|byte| *byte == if zeroed { 0 } else { 7 }), "{sector}");
            }
        }
        disk.write_zeroes(0, 1 << 20).unwrap();
        assert_eq!(disk.sha256().unwrap(), before);
    }
}
