//! A pair whose hosts prove by certificates who they are.

use super::authority::Authority;
use super::*;

/// The words for a host with a certificate of `signer`, which believes `trusted`.
fn words(
    site: &Site,
    signer: &Authority,
    host: &str,
    trusted: &Authority,
) -> Result<Vec<String>, Failed> {
    let signed = signer.sign(site.lab.share(), host)?;
    let share = |name: &str| site.lab.host(0).share().join(name).display().to_string();
    let files = [("cert", signed.certificate), ("key", signed.key), ("ca", trusted.file())];
    Ok(files.iter().flat_map(|(what, name)| [format!("--tls-{what}"), share(name)]).collect())
}

/// Attach, a visitor of another authority, loss of the primary, attach again.
fn pair(site: &Site) -> Result<(), Failed> {
    let [ours, theirs] = ["ours", "theirs"].map(|name| Authority::new(site.lab.share(), name));
    let (ours, theirs) = (ours?, theirs?);
    let group = group(site, options(&[]))?
        .proving([words(site, &ours, "host-a", &ours)?, words(site, &ours, "host-b", &ours)?]);
    let primary = alone(site, &group)?;
    let backup = attached(&group, 1, &primary)?;
    site.download_all(MIB)?;

    // It believes the primary, which does not believe it.
    let strange = words(site, &theirs, "host-b", &ours)?;
    let stranger = group.proving([strange.clone(), strange]).through(SECOND_TAP);
    not_accepted(&primary, &stranger.join(1, 0, &[])?)?;
    for member in [&primary, &backup] {
        require(member.wait_protected()?.divergences == 0, "a divergence")?;
    }
    site.download_all(MIB)?;

    primary.process.kill();
    backup.wait_alone()?;
    site.download_all(MIB)?;
    let next = attached(&group, 0, &backup)?;
    end_alike(site, &group, &backup, &next)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![("certificates".into(), Box::new(pair))]
}
