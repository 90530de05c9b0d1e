//! Landlock: which files a process may still reach after set-up.
//!
//! The rules are made from descriptors that are opened at the start, so a later change of a path
//! does not change what is allowed (landlock(7)).

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus,
};

/// The newest rules we use; older kernels take those they know.
const ABI_USED: ABI = ABI::V5;

/// The files that are still needed after set-up.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    /// Files and folders that are read.
    pub read: Vec<PathBuf>,
    /// Devices that are opened again.
    pub devices: Vec<PathBuf>,
    /// Folders in which files are made, written, renamed and removed.
    pub folders: Vec<PathBuf>,
}

impl Reach {
    /// The folder in which `file` is.
    #[must_use]
    pub fn folder_of(mut self, file: Option<&Path>) -> Self {
        let folder = |file: &Path| match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.into(),
            _ => PathBuf::from("."),
        };
        self.folders.extend(file.map(folder));
        self
    }
}

/// What is done in a folder. Nothing is ever executed, and nothing moves to another folder.
fn folder_rights() -> BitFlags<AccessFs> {
    AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
}

/// Rules that allow only what is in `reach`. A path that is not there is left out: it cannot be
/// reached then.
pub(super) fn rules(reach: &Reach) -> Result<RulesetCreated, RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI_USED))?
        .create()?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let reads = reach.read.iter().map(|path| (path, read));
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let devices = reach.devices.iter().map(|path| (path, device));
    let folders = reach.folders.iter().map(|path| (path, folder_rights()));
    for (path, rights) in reads.chain(devices).chain(folders) {
        if let Ok(opened) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(opened, rights))?;
        }
    }
    Ok(rules)
}

/// What this kernel does with such rules, in words; for `ftvmm doctor`.
pub fn landlock_here() -> &'static str {
    let created = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI_USED))
        .and_then(Ruleset::create);
    if created.is_ok() {
        return "Landlock with all rights that ftvmm uses";
    }
    let oldest = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create);
    match oldest {
        Ok(_) => "Landlock, but an older one: some rights are not restricted",
        Err(_) => "no Landlock: --landlock on confines nothing here",
    }
}

/// Whether anything is enforced.
pub(super) fn enforced(status: RulesetStatus) -> bool {
    status != RulesetStatus::NotEnforced
}
