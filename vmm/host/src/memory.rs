//! How much memory the host has for a guest, asked before anything is allocated: a host that runs
//! out in the middle kills the process that took most, which is the guest's.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// Where the hierarchy of control groups is.
const CGROUP: &str = "/sys/fs/cgroup";

/// There is not enough.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("{what} needs {needed_mib} MiB; {limit} leaves {left_mib} MiB; give less with --mem")]
pub struct TooLittleMemory {
    /// What it is for.
    pub what: String,
    /// How much of it.
    pub needed_mib: u64,
    /// What says so.
    pub limit: String,
    /// How much there is.
    pub left_mib: u64,
}

/// A limit, in words, and what is left of it in bytes.
type Limit = (String, u64);

/// Refuses a guest that needs more than the host has left.
///
/// # Errors
/// [`TooLittleMemory`] names the smallest limit.
pub fn check(what: &str, needed_bytes: u64) -> Result<(), TooLittleMemory> {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let meminfo = text("/proc/meminfo");
    let available = field_kib(&meminfo, "MemAvailable:").map(|kib| {
        let swap_kib = field_kib(&meminfo, "SwapFree:").unwrap_or(0);
        ("the host's free memory".to_owned(), (kib + swap_kib) << 10)
    });
    let status = text("/proc/self/status");
    let used_bytes = |name| field_kib(&status, name).unwrap_or(0) << 10;
    let limits = [
        (libc::RLIMIT_AS, "the limit of address space (ulimit -v)", "VmSize:"),
        (libc::RLIMIT_DATA, "the limit of data (ulimit -d)", "VmData:"),
    ];
    let limits = limits.into_iter().filter_map(|(resource, name, used)| {
        let limit_bytes = limit_of(resource)?;
        Some((name.to_owned(), limit_bytes.saturating_sub(used_bytes(used))))
    });
    let groups = groups_of(&text("/proc/self/cgroup"), Path::new(CGROUP));
    let groups = groups.iter().filter_map(|group| group_limit(group));
    fits(what, needed_bytes, available.into_iter().chain(limits).chain(groups))
}

fn fits(
    what: &str,
    needed_bytes: u64,
    limits: impl Iterator<Item = Limit>,
) -> Result<(), TooLittleMemory> {
    match limits.min_by_key(|(_, left_bytes)| *left_bytes) {
        Some((limit, left_bytes)) if left_bytes < needed_bytes => Err(TooLittleMemory {
            what: what.into(),
            needed_mib: needed_bytes.div_ceil(1 << 20),
            limit,
            left_mib: left_bytes >> 20,
        }),
        _ => Ok(()),
    }
}

/// A field of `/proc/meminfo` or `/proc/self/status`, in KiB (proc(5)).
fn field_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The soft limit of a resource, unless there is none.
fn limit_of(resource: libc::__rlimit_resource_t) -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes one rlimit, which lives for the call.
    let answer = unsafe { libc::getrlimit(resource, &mut limit) };
    (answer == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// The folders of this process's control group and of those around it (cgroup v2).
fn groups_of(cgroup: &str, root: &Path) -> Vec<PathBuf> {
    let Some(own) = cgroup.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Vec::new();
    };
    let inside = |folder: &&Path| folder.starts_with(root);
    root.join(own).ancestors().take_while(inside).map(Path::to_path_buf).collect()
}

/// What is left of a group's limit; pages of files that it may drop count as left.
fn group_limit(group: &Path) -> Option<Limit> {
    let text = |name: &str| std::fs::read_to_string(group.join(name)).ok();
    let limit_bytes: u64 = text("memory.max")?.trim().parse().ok()?;
    let used_bytes: u64 = text("memory.current")?.trim().parse().ok()?;
    let stat = text("memory.stat").unwrap_or_default();
    let droppable = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
    let droppable: u64 = droppable.and_then(|n| n.parse().ok()).unwrap_or(0);
    let left_bytes = limit_bytes.saturating_sub(used_bytes.saturating_sub(droppable));
    Some((format!("control group {}", group.display()), left_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_limit_is_named() {
        let limits = || [("the host".to_owned(), 8 << 20), ("a group".to_owned(), 3 << 20)];
        assert_eq!(fits("it", 3 << 20, limits().into_iter()), Ok(()));
        let error = fits("a logged guest", 5 << 20, limits().into_iter()).unwrap_err();
        let says = "a logged guest needs 5 MiB; a group leaves 3 MiB; give less with --mem";
        assert_eq!(error.to_string(), says);
        assert_eq!(fits("it", 1, std::iter::empty()), Ok(()));
    }

    #[test]
    fn what_the_kernel_says_is_understood() {
        let meminfo = "MemTotal:  24000 kB\nMemAvailable:   1234 kB\n";
        assert_eq!(field_kib(meminfo, "MemAvailable:"), Some(1234));
        assert_eq!(field_kib(meminfo, "SwapFree:"), None);
        let root = Path::new("/sys/fs/cgroup");
        let groups = groups_of("0::/a/b\n", root);
        assert_eq!(
            groups,
            ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup"].map(PathBuf::from)
        );
        assert!(groups_of("5:memory:/a\n", root).is_empty());
    }

    #[test]
    fn a_group_counts_with_what_it_uses() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("memory.max", "max\n");
        write("memory.current", "1000\n");
        assert_eq!(group_limit(folder.path()), None);
        write("memory.max", "5000\n");
        write("memory.stat", "anon 1\ninactive_file 300\n");
        assert_eq!(group_limit(folder.path()).unwrap().1, 4300);
    }

    #[test]
    fn no_host_has_an_exbibyte() {
        assert!(check("a guest", 1 << 60).is_err());
        check("a guest", 1 << 20).unwrap();
    }
}
