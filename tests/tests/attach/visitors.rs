//! Who comes to a primary and is not taken: a host with another key, and a second backup.

use super::*;

/// A host with another key is turned away. A second backup is told of the first, waits, and takes
/// its place when the first is let go.
fn are_turned_away(site: &Site) -> Result<(), Failed> {
    let group = group(site, options(&[]))?;
    let primary = alone(site, &group)?;
    let key =
        site.lab.host(1).share().join(Group::new(&site.lab, &site.files, options(&[]))?.key());
    let key = vec!["--channel-key".to_owned(), key.display().to_string()];
    let stranger = group.proving([key.clone(), key]).join(1, 0, &[])?;
    not_accepted(&primary, &stranger)?;
    site.download_all(KIB)?;

    let first = attached(&group, 1, &primary)?;
    let second = group.through(SECOND_TAP).join(1, 0, &[])?;
    wait_said(&second, "has a backup already, at 10.77.0.")?;
    wait_said(&primary, "a second backup was sent away")?;
    site.download_all(MIB)?;
    require(primary.wait_protected()?.protected, "the first follows")?;
    let detached = primary.ask(&["detach"])?;
    equal("detach", detached.ended, GOOD)?;
    ends_with("the first backup", &first.process, GOOD)?;
    let protected = second.wait_protected()?;
    equal("the second's role", protected.role.as_str(), "backup")?;
    primary.wait_protected()?;
    site.download_all(MIB)?;
    end_alike(site, &group, &primary, &second)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![("visitors".into(), Box::new(are_turned_away))]
}
