//! The initramfs: a newc cpio archive (Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! It is not compressed: that would save two megabytes and cost every boot the time to unpack them.
//! Entries are sorted and carry neither times nor owners, so equal inputs give equal bytes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use cpio::newc::{Builder, trailer};
use ftvmm_host_programs::Program;

use crate::store::{not_started, succeeded};
use crate::{GuestBuildError, at};

const INIT: &[u8] = include_bytes!("../../init");
const INDEX: &[u8] = b"ftguest: try /bytes/1000000 or /bytes/N/SEED\n";

const DIRECTORIES: &[&str] = &["bin", "dev", "mnt", "proc", "root", "srv", "sys", "tmp"];

const MODE_DIRECTORY: u32 = 0o040_755;
const MODE_PROGRAM: u32 = 0o100_755;
const MODE_FILE: u32 = 0o100_644;
const MODE_LINK: u32 = 0o120_777;
const MODE_CHARACTER_DEVICE: u32 = 0o020_600;

/// Device numbers of Documentation/admin-guide/devices.txt. The kernel opens /dev/console before
/// init can mount anything.
const CONSOLE_DEVICE: (u32, u32) = (5, 1);

#[derive(Clone)]
struct Entry {
    mode: u32,
    device: (u32, u32),
    content: Vec<u8>,
}

impl Entry {
    fn new(mode: u32, content: impl Into<Vec<u8>>) -> Self {
        Self { mode, device: (0, 0), content: content.into() }
    }
}

/// What every initramfs holds.
pub(crate) struct Userland {
    entries: BTreeMap<String, Entry>,
}

impl Userland {
    /// A static busybox and our multi-call program.
    pub(crate) fn read(busybox: &Path, programs: &Path) -> Result<Self, GuestBuildError> {
        let read = |path: &Path| fs::read(path).map_err(at(path));
        let applets = busybox_applets(busybox)?;
        Ok(Self { entries: entries(&applets, read(busybox)?, read(programs)?) })
    }

    /// The archive with `more` files, by their paths in it.
    pub(crate) fn archive(
        &self,
        more: BTreeMap<String, Vec<u8>>,
    ) -> Result<Vec<u8>, GuestBuildError> {
        write(&with_files(self.entries.clone(), more)).map_err(at(Path::new("initramfs")))
    }
}

/// An archive of these files by their paths, to stand behind an initramfs: a kernel unpacks both.
pub(crate) fn overlay(files: BTreeMap<String, Vec<u8>>) -> io::Result<Vec<u8>> {
    write(&with_files(BTreeMap::new(), files))
}

fn with_files(
    mut entries: BTreeMap<String, Entry>,
    files: BTreeMap<String, Vec<u8>>,
) -> BTreeMap<String, Entry> {
    for (path, content) in files {
        let folders = path.match_indices('/').map(|(end, _)| path[..end].to_owned());
        entries.extend(folders.map(|folder| (folder, Entry::new(MODE_DIRECTORY, []))));
        entries.insert(path, Entry::new(MODE_FILE, content));
    }
    entries
}

fn busybox_applets(busybox: &Path) -> Result<Vec<String>, GuestBuildError> {
    let mut command = Program::Busybox.command()?;
    command.arg("--list");
    let output = command.output().map_err(not_started(&command))?;
    succeeded(&command, output.status, busybox)?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn entries(applets: &[String], busybox: Vec<u8>, programs: Vec<u8>) -> BTreeMap<String, Entry> {
    let mut entries = BTreeMap::new();
    let link = |name: &str, to: &str| (format!("bin/{name}"), Entry::new(MODE_LINK, to));
    entries.extend(applets.iter().map(|name| link(name, "busybox")));
    // After busybox, whose httpd gives way to ours; busybox's shell still prefers its own, by name.
    entries.extend(ftvmm_guest_programs::APPLETS.iter().map(|a| link(a.name, "ftguest")));
    entries
        .extend(DIRECTORIES.iter().map(|&name| (name.to_owned(), Entry::new(MODE_DIRECTORY, []))));
    for (name, mode, content) in [
        ("bin/busybox", MODE_PROGRAM, busybox),
        ("bin/ftguest", MODE_PROGRAM, programs),
        ("init", MODE_PROGRAM, INIT.to_vec()),
        ("srv/index.html", MODE_FILE, INDEX.to_vec()),
    ] {
        entries.insert(name.to_owned(), Entry::new(mode, content));
    }
    let console = Entry { device: CONSOLE_DEVICE, ..Entry::new(MODE_CHARACTER_DEVICE, []) };
    entries.insert("dev/console".to_owned(), console);
    entries
}

fn write(entries: &BTreeMap<String, Entry>) -> io::Result<Vec<u8>> {
    let mut archive = Vec::new();
    for (inode, (name, entry)) in (1..).zip(entries) {
        let builder = Builder::new(name)
            .ino(inode)
            .mode(entry.mode)
            .rdev_major(entry.device.0)
            .rdev_minor(entry.device.1);
        let mut file = builder.write(archive, entry.content.len() as u32);
        file.write_all(&entry.content)?;
        archive = file.finish()?;
    }
    trailer(archive)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn sample() -> Vec<u8> {
        let applets = ["sh", "httpd", "[", "busybox"].map(str::to_owned);
        write(&entries(&applets, b"BUSYBOX".to_vec(), b"FTGUEST".to_vec())).unwrap()
    }

    /// The entries in their order.
    fn parsed(mut bytes: &[u8]) -> Vec<(cpio::newc::Entry, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            let mut reader = cpio::newc::Reader::new(bytes).unwrap();
            if reader.entry().is_trailer() {
                return found;
            }
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            let entry = reader.entry().clone();
            bytes = reader.finish().unwrap();
            found.push((entry, content));
        }
    }

    #[test]
    fn links_programs_and_the_console_are_what_the_kernel_expects() {
        let found = parsed(&sample());
        let named = |name: &str| found.iter().find(|(entry, _)| entry.name() == name).unwrap();
        for (name, mode, content) in [
            ("bin", 0o040_755, &b""[..]),
            ("bin/sh", 0o120_777, b"busybox"),
            ("bin/httpd", 0o120_777, b"ftguest"),
            ("bin/selfcheck", 0o120_777, b"ftguest"),
            ("bin/busybox", 0o100_755, b"BUSYBOX"),
            ("bin/ftguest", 0o100_755, b"FTGUEST"),
            ("init", 0o100_755, INIT),
        ] {
            let (entry, held) = named(name);
            assert_eq!((entry.mode(), &held[..]), (mode, content), "{name}");
        }
        let (console, _) = named("dev/console");
        let device = (console.rdev_major(), console.rdev_minor());
        assert_eq!((console.mode(), device), (0o020_600, (5, 1)));
    }

    #[test]
    fn the_archive_is_the_same_every_time_and_carries_no_times_or_owners() {
        assert_eq!(sample(), sample());
        for (entry, _) in parsed(&sample()) {
            assert_eq!((entry.mtime(), entry.uid(), entry.gid()), (0, 0, 0), "{}", entry.name());
        }
    }

    #[test]
    fn further_files_come_with_their_directories() {
        let userland = Userland { entries: entries(&[], vec![], vec![]) };
        let more = BTreeMap::from([("lib/modules/6.1/a.ko".to_owned(), b"module".to_vec())]);
        let found = parsed(&userland.archive(more).unwrap());
        let mode_of = |name: &str| found.iter().find(|(e, _)| e.name() == name).unwrap().0.mode();
        for folder in ["lib", "lib/modules", "lib/modules/6.1"] {
            assert_eq!(mode_of(folder), 0o040_755, "{folder}");
        }
        assert_eq!(mode_of("lib/modules/6.1/a.ko"), 0o100_644);
    }

    #[test]
    fn a_directory_comes_before_what_is_in_it() {
        let name = |(entry, _): (cpio::newc::Entry, _)| entry.name().to_owned();
        let names: Vec<String> = parsed(&sample()).into_iter().map(name).collect();
        for name in &names {
            if let Some((directory, _)) = name.rsplit_once('/') {
                let place = |wanted: &str| names.iter().position(|n| n == wanted).unwrap();
                assert!(place(directory) < place(name), "{name}");
            }
        }
    }
}
