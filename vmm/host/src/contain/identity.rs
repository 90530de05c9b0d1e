//! `--user` and `--chroot`: another user, another root folder, before the first thread is started.

use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Gid, Uid, chdir, chown, chroot, setgroups, setresgid, setresuid};
use thiserror::Error;

use crate::user_file::{self, FileError};

/// Longer than any list of users.
const LIST_BYTES_MAX: u64 = 16 << 20;

/// Why a process keeps its identity.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// No such user or group.
    #[error("{file} has no {what} '{name}'; give a name in it, or a number")]
    Unknown {
        /// Where it was looked up.
        file: &'static str,
        /// `user` or `group`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A number without a group, and no such user.
    #[error("user {uid} is not in /etc/passwd, so its group is not known; give --user {uid}:GID")]
    NoGroup {
        /// The number.
        uid: u32,
    },
    /// The list cannot be read.
    #[error(transparent)]
    List(#[from] FileError),
    /// The kernel refuses.
    #[error("{call} of {what}: {cause}; this needs root")]
    Refused {
        /// The call.
        call: &'static str,
        /// Its argument.
        what: String,
        /// What the kernel said.
        cause: nix::Error,
    },
    /// Root could be had back.
    #[error("--user 0 keeps root; name a user without privileges")]
    Root,
}

/// Who a process becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    uid: Uid,
    gid: Gid,
    /// What it is a member of besides.
    groups: Vec<Gid>,
}

impl User {
    /// `NAME|UID[:GROUP|GID]`, looked up in this host's lists. Read from the files: a static
    /// program has no NSS.
    ///
    /// # Errors
    /// When there is none.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let list = |path| -> Result<String, FileError> {
            let bytes = user_file::read("list", Path::new(path), LIST_BYTES_MAX, "no list is so")?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let passwd = list("/etc/passwd").unwrap_or_default();
        let group = list("/etc/group").unwrap_or_default();
        Self::find(text, &passwd, &group)
    }

    fn find(text: &str, passwd: &str, group: &str) -> Result<Self, IdentityError> {
        let (user, wanted_group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        // name:password:uid:gid:… (passwd(5)).
        let line = passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let found = [fields.first(), fields.get(2)].contains(&Some(&user));
            let ids = (fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?);
            found.then(|| (fields[0].to_owned(), ids))
        });
        let (name, uid, own_gid): (Option<String>, u32, Option<u32>) = match (line, user.parse()) {
            (Some((name, (uid, gid))), _) => (Some(name), uid, Some(gid)),
            (None, Ok(uid)) => (None, uid, None),
            (None, Err(_)) => {
                let (file, what) = ("/etc/passwd", "user");
                return Err(IdentityError::Unknown { file, what, name: user.into() });
            }
        };
        if uid == 0 {
            return Err(IdentityError::Root);
        }
        let gid = match (wanted_group, own_gid) {
            (Some(wanted), _) => group_id(wanted, group)?,
            (None, Some(gid)) => gid,
            (None, None) => return Err(IdentityError::NoGroup { uid }),
        };
        let groups = name.map(|name| memberships(&name, group)).unwrap_or_default();
        Ok(Self { uid: Uid::from_raw(uid), gid: Gid::from_raw(gid), groups })
    }

    /// Becomes this user, for ever. A process that changes from root to another user loses its
    /// capabilities (capabilities(7)).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn become_it(&self) -> Result<(), IdentityError> {
        let refused =
            |call, what: String| move |cause| IdentityError::Refused { call, what, cause };
        setgroups(&self.groups).map_err(refused("setgroups", format!("{:?}", self.groups)))?;
        let (uid, gid) = (self.uid, self.gid);
        setresgid(gid, gid, gid).map_err(refused("setresgid", gid.to_string()))?;
        setresuid(uid, uid, uid).map_err(refused("setresuid", uid.to_string()))
    }
}

fn group_id(wanted: &str, group: &str) -> Result<u32, IdentityError> {
    if let Ok(number) = wanted.parse() {
        return Ok(number);
    }
    let id = |line: &str| {
        let mut fields = line.split(':');
        (fields.next() == Some(wanted)).then(|| fields.nth(1)?.parse().ok())?
    };
    let (file, what) = ("/etc/group", "group");
    let unknown = || IdentityError::Unknown { file, what, name: wanted.into() };
    group.lines().find_map(id).ok_or_else(unknown)
}

/// The groups that list `name` as a member: name:password:gid:members (group(5)).
fn memberships(name: &str, group: &str) -> Vec<Gid> {
    let id = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        let is_member = fields.get(3)?.split(',').any(|member| member == name);
        is_member.then(|| fields[2].parse().ok().map(Gid::from_raw))?
    };
    group.lines().filter_map(id).collect()
}

/// The devices that a run opens, with their numbers (admin-guide/devices.txt).
const DEVICES: [(&str, u64, u64); 2] = [("dev/kvm", 10, 232), ("dev/net/tun", 10, 200)];

/// Makes the devices that a run opens in `folder`, where they are missing, for `user` alone.
///
/// # Errors
/// When the kernel refuses.
pub fn make_devices(folder: &Path, user: Option<&User>) -> Result<(), IdentityError> {
    for (name, major, minor) in DEVICES {
        let path = folder.join(name);
        if path.exists() {
            continue;
        }
        let what = path.display().to_string();
        let refused = |call| {
            let what = what.clone();
            move |cause| IdentityError::Refused { call, what, cause }
        };
        if let Some(parent) = path.parent() {
            let made = std::fs::create_dir_all(parent);
            let errno = |e: std::io::Error| nix::Error::from_raw(e.raw_os_error().unwrap_or(0));
            made.map_err(errno).map_err(refused("mkdir"))?;
        }
        let owner_only = Mode::S_IRUSR | Mode::S_IWUSR;
        mknod(&path, SFlag::S_IFCHR, owner_only, makedev(major, minor))
            .map_err(refused("mknod"))?;
        if let Some(user) = user {
            chown(&path, Some(user.uid), Some(user.gid)).map_err(refused("chown"))?;
        }
    }
    Ok(())
}

/// Makes `folder` the root of all paths from now on.
///
/// # Errors
/// When the kernel refuses.
pub fn change_root(folder: &Path) -> Result<(), IdentityError> {
    let what = || folder.display().to_string();
    let refused = |call| move |cause| IdentityError::Refused { call, what: what(), cause };
    chroot(folder).map_err(refused("chroot"))?;
    chdir(&PathBuf::from("/")).map_err(refused("chdir"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nvm:x:900:901::/:/bin/false\n";
    const GROUP: &str = "root:x:0:\nvm:x:901:\nkvm:x:104:qemu,vm\nnet:x:105:vm\n";

    #[test]
    fn a_user_is_found_by_name_and_number() {
        let find = |text| User::find(text, PASSWD, GROUP).map_err(|error| error.to_string());
        let user = |uid, gid, groups: &[u32]| User {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: groups.iter().copied().map(Gid::from_raw).collect(),
        };
        assert_eq!(find("vm"), Ok(user(900, 901, &[104, 105])));
        assert_eq!(find("900"), Ok(user(900, 901, &[104, 105])));
        assert_eq!(find("vm:kvm"), Ok(user(900, 104, &[104, 105])));
        assert_eq!(find("77:78"), Ok(user(77, 78, &[])));
        for (text, says) in [
            ("nobody-here", "/etc/passwd has no user 'nobody-here'"),
            ("vm:none", "/etc/group has no group 'none'"),
            ("77", "give --user 77:GID"),
            ("root", "keeps root"),
            ("0:5", "keeps root"),
        ] {
            let error = find(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
