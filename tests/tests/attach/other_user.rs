//! A pair whose hosts run as another user than root, in a root folder of their own.

use std::os::unix::fs::{PermissionsExt, chown};

use super::*;

const UID: u32 = 12_345;
const GID: u32 = 12_346;
/// The root folder, on each host.
const ROOT: &str = "/tmp/ftvmm-root";
/// A file system of its own, since others may refuse devices.
const MAKE_ROOT: &str = "set -e; mkdir -p $ROOT; mount -t tmpfs root $ROOT
    mkdir -p $ROOT/$SHARE $ROOT/proc $ROOT/sys $ROOT/run; chown $OWNER $ROOT/run
    mount -o bind $SHARE $ROOT/$SHARE; mount -o bind /proc $ROOT/proc
    mount -o bind /sys $ROOT/sys";
const REMOVE_ROOT: &str = "umount $ROOT/$SHARE $ROOT/proc $ROOT/sys $ROOT";

fn on_both_hosts(site: &Site, script: &str) -> Result<(), Failed> {
    for host in [site.lab.host(0), site.lab.host(1)] {
        let share = host.share().display();
        let script = format!("ROOT={ROOT} SHARE={share} OWNER={UID}:{GID}; {script}");
        let output = host.run(&["sh", "-c", &script])?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        equal(&format!("{script} ({told})"), output.ended, GOOD)?;
    }
    Ok(())
}

/// Every thread is the user's and may do what any user may.
fn is_another_user(site: &Site, member: &Member<'_>) -> Result<(), Failed> {
    let (host, pid) = (site.lab.host(member.host), member.process.pid());
    let look = format!("cat /proc/{pid}/task/*/status; echo Root: $(readlink /proc/{pid}/root)");
    let told = host.run(&["sh", "-c", &look])?.text();
    let lines = |name: &str| told.lines().filter(|line| line.starts_with(name)).collect::<Vec<_>>();
    let threads = lines("Name:").len();
    require(threads > 5, format!("not all threads: {:?}", lines("Name:")))?;
    let ids = |id: u32| format!("{id}\t{id}\t{id}\t{id}");
    let none = || "0".repeat(16);
    for (name, value) in [
        ("Uid:", ids(UID)),
        ("Gid:", ids(GID)),
        ("Groups:", " ".to_owned()),
        ("CapInh:", none()),
        ("CapPrm:", none()),
        ("CapEff:", none()),
    ] {
        equal(name, lines(name), vec![format!("{name}\t{value}").as_str(); threads])?;
    }
    equal("root folder", lines("Root:"), vec![format!("Root: {ROOT}").as_str()])
}

/// Attach, loss of the primary, attach again, end.
fn pair(site: &Site) -> Result<(), Failed> {
    on_both_hosts(site, MAKE_ROOT)?;
    let group = group(site, options(&[]))?.confine(&format!("{UID}:{GID}"), ROOT);
    let share = site.lab.share();
    fs::set_permissions(share, fs::Permissions::from_mode(0o777))?;
    for own in [group.key(), group.incidents()] {
        chown(share.join(own), Some(UID), Some(GID))?;
    }
    let primary = alone(site, &group)?;
    let backup = attached(&group, 1, &primary)?;
    for member in [&primary, &backup] {
        is_another_user(site, member)?;
    }
    site.download_all(MIB)?;
    primary.process.kill();
    backup.wait_alone()?;
    site.download_all(MIB)?;
    let next = attached(&group, 0, &backup)?;
    is_another_user(site, &next)?;
    site.download_all(MIB)?;
    end_alike(site, &group, &backup, &next)?;
    on_both_hosts(site, REMOVE_ROOT)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![("other-user".into(), Box::new(pair))]
}
