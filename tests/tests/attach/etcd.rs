//! A pair whose witness is etcd, a server of the outer machine that both hosts reach.

use std::process::{Child, Stdio};

use ftvmm_tests::Program;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::authority::{Authority, Signed};
use super::*;

const PORT: u16 = 2379;

/// A cluster of one member, which ends with this.
struct Server(Child);

impl Server {
    fn start(site: &Site, ca: &Authority) -> Result<Self, Failed> {
        let (lab, share) = (&site.lab, site.lab.share());
        let url = url(site);
        let Signed { certificate, key } = ca.sign(share, lab.client_address())?;
        let at = |path: &Path| path.display().to_string();
        let peer = "http://127.0.0.1:2380";
        let log = fs::File::create(lab.folder().join("etcd.log"))?;
        let server = lab
            .client(
                Program::Etcd,
                &["--name", "m0", "--data-dir", &at(&lab.folder().join("etcd"))],
            )?
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("m0={peer}"), "--client-cert-auth"])
            .args(["--trusted-ca-file", &at(&share.join(ca.file()))])
            .args(["--cert-file", &at(&share.join(certificate))])
            .args(["--key-file", &at(&share.join(key))])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(Self(server))
    }

    fn signal(&self, signal: Signal) -> Result<(), Failed> {
        Ok(kill(Pid::from_raw(self.0.id().cast_signed()), signal)?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn url(site: &Site) -> String {
    format!("https://{}:{PORT}", site.lab.client_address())
}

/// Waits until the server answers a client with this certificate.
fn answers(site: &Site, ca: &Authority, own: &Signed) -> Result<(), Failed> {
    let share = |name: &str| site.lab.share().join(name).display().to_string();
    let files = [("--cacert", ca.file()), ("--cert", own.certificate.clone())];
    let files = files.into_iter().chain([("--key", own.key.clone())]);
    let files: Vec<_> = files.map(|(option, name)| [option.to_owned(), share(&name)]).collect();
    let mut words: Vec<_> = files.iter().flatten().map(String::as_str).collect();
    let health = format!("{}/health", url(site));
    words.extend(["--silent", "--show-error", "--fail", "--retry", "60", "--retry-all-errors"]);
    words.extend(["--retry-delay", "1", &health]);
    let answered = site.lab.run_client(Program::Curl, &words)?;
    let told = String::from_utf8_lossy(&answered.stderr).into_owned();
    require(answered.text().contains("\"health\":\"true\""), format!("etcd: {told}"))
}

/// While etcd does not answer, the pair goes on, and nobody takes over; when it does again, the
/// backup that has lost its primary does.
fn pair(site: &Site) -> Result<(), Failed> {
    let ca = Authority::new(site.lab.share(), "etcd")?;
    let server = Server::start(site, &ca)?;
    let own = ca.sign(site.lab.share(), "hosts")?;
    answers(site, &ca, &own)?;
    let share = |name: &str| site.lab.host(0).share().join(name).display().to_string();
    let words = [
        ("--witness", format!("etcd:{}/lab/vm", url(site))),
        ("--witness-ca", share(&ca.file())),
        ("--witness-cert", share(&own.certificate)),
        ("--witness-key", share(&own.key)),
    ];
    let words = words.into_iter().flat_map(|(option, value)| [option.to_owned(), value]);
    let group = group(site, options(&[]))?.asking(words.collect());
    let primary = alone(site, &group)?;
    let backup = attached(&group, 1, &primary)?;
    equal("witness", backup.wait_protected()?.witness.as_deref(), Some("common"))?;

    server.signal(Signal::SIGSTOP)?;
    site.download_all(MIB)?;
    require(primary.wait_protected()?.protected, "a pair that is whole asks nobody")?;
    primary.process.kill();
    wait_said(&backup, "the witness grants nothing; asking again")?;
    let waits = backup.status()?.ok_or_else(|| said(&backup.process))?;
    equal("role without etcd", (waits.role.as_str(), waits.takeovers), ("backup", 0))?;
    server.signal(Signal::SIGCONT)?;
    backup.wait_alone()?;
    site.download_all(MIB)?;

    let beside = group.through(SECOND_TAP).start_alone(0, &[])?;
    ends_with("a start beside it", &beside.process, BAD_USAGE)?;
    wait_said(&beside, "is live at")?;
    let next = attached(&group, 0, &backup)?;
    end_alike(site, &group, &backup, &next)
}

pub fn cases() -> Vec<(String, Case)> {
    vec![("etcd".into(), Box::new(pair))]
}
