//! The `ftvmm`s of one guest, which come and go on whatever hosts: one is active,
//! another joins it, takes over and is joined in turn. Each has a control socket, through which it
//! is watched.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use serde::Deserialize;

use crate::clock;
use crate::lab::{HOSTS_MAX, Lab, LabError, LabProcess, Output, at};
use crate::pair::{GuestFiles, PORT, PairNames, RunOptions, arguments, ensure_tap};

/// Between two looks at what a member's host has printed of it.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often a member is asked.
const WATCH_EVERY_MS: &str = "200";
/// What has not come after so long does not come.
const LONGEST: Duration = Duration::from_secs(180);

/// A guest and the lab it runs in.
#[derive(Clone)]
pub struct Group<'a> {
    lab: &'a Lab,
    files: &'a GuestFiles,
    options: RunOptions,
    names: PairNames,
    /// `--witness` and what belongs to it, where it is no file of the shared directory.
    witness: Option<Vec<String>>,
    /// How the member on each host proves who it is, where not by the group's key.
    proofs: Option<[Vec<String>; HOSTS_MAX]>,
    confined: Option<Confined>,
}

/// What a member is confined to: see [`Group::confine`].
#[derive(Clone)]
struct Confined {
    user: String,
    root: String,
}

/// One `ftvmm` of a [`Group`].
pub struct Member<'a> {
    /// The process.
    pub process: LabProcess,
    /// Name of its report in the shared directory.
    pub report: String,
    /// Index of its host.
    pub host: usize,
    control: String,
    lab: &'a Lab,
}

/// What `ftvmm status --json` prints, as far as the tests look at it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Status {
    /// `solo`, `primary` or `backup`.
    pub role: String,
    /// The session's state.
    pub state: String,
    /// Another host follows, or is followed.
    pub protected: bool,
    /// The guest's frames may leave this host.
    pub transmits: bool,
    /// The term in which the host is active, or follows.
    pub term: Option<u64>,
    /// Ordinal of the last exit.
    pub exit: u64,
    /// For how long the host has held the guest's processor, while it does.
    pub stuck_ms: Option<u64>,
    /// The way to the clients, `up` or what is broken.
    pub link: Option<String>,
    /// Whether the other host's is whole.
    pub peer_link_up: Option<bool>,
    /// `common` when both hosts see the same witness, or `apart`.
    pub witness: Option<String>,
    /// Take-overs by this host.
    pub takeovers: u64,
    /// From giving the peer up to the first live exit.
    pub takeover_us: Option<u64>,
    /// Divergences found.
    pub divergences: u64,
    /// A backup is being attached.
    pub attach: Option<AttachProgress>,
    /// How the last one was.
    pub last_attach: Option<Attached>,
}

/// How far a transfer is.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct AttachProgress {
    /// What is being sent.
    pub phase: String,
    /// Bytes so far.
    pub bytes: u64,
    /// Bytes it will be.
    pub total_bytes: u64,
}

/// How a transfer went.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Attached {
    /// From the connection to protection.
    pub duration_ms: u64,
    /// How long the guest stood still.
    pub stopped_us: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Rounds over the memory.
    pub rounds: u32,
}

impl<'a> Group<'a> {
    /// A group without members.
    ///
    /// # Errors
    /// When the folder for incidents cannot be made.
    pub fn new(lab: &'a Lab, files: &'a GuestFiles, options: RunOptions) -> Result<Self, LabError> {
        let names = PairNames::new(lab)?;
        Ok(Self { lab, files, options, names, witness: None, proofs: None, confined: None })
    }

    /// The same guest and witness for members that use another tap: a second one on a host.
    #[must_use]
    pub fn through(&self, tap: &'static str) -> Self {
        let options = RunOptions { tap, ..self.options.clone() };
        Self { options, ..self.clone() }
    }

    /// The same for members that prove who they are with these words, host a's and host b's.
    #[must_use]
    pub fn proving(&self, words: [Vec<String>; HOSTS_MAX]) -> Self {
        Self { proofs: Some(words), ..self.clone() }
    }

    /// The same for members that ask the witness which these words name.
    #[must_use]
    pub fn asking(&self, words: Vec<String>) -> Self {
        Self { witness: Some(words), ..self.clone() }
    }

    /// The same for members that become `user` in the folder `root` of their hosts. In it are the
    /// shared directory and `/run`, at their places.
    #[must_use]
    pub fn confine(&self, user: &str, root: &str) -> Self {
        let confined = Confined { user: user.into(), root: root.into() };
        Self { confined: Some(confined), ..self.clone() }
    }

    /// Has the witness lie in this folder of the shared directory, which is made.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn keep_witness_in(&mut self, folder: &str) -> Result<(), LabError> {
        let path = self.lab.share().join(folder);
        std::fs::create_dir_all(&path).map_err(at(&path))?;
        self.names.witness = format!("{folder}/term");
        Ok(())
    }

    /// The group's key file in the shared directory.
    pub fn key(&self) -> &str {
        &self.names.key
    }

    /// Folder of incident reports in the shared directory.
    pub fn incidents(&self) -> &str {
        &self.names.incidents
    }

    /// Starts the guest on this host as a primary that waits for no backup.
    ///
    /// # Errors
    /// What the host answered.
    pub fn start_alone(&self, host: usize, more: &[&str]) -> Result<Member<'a>, LabError> {
        let own = self.address(host);
        let role = ["--role", "primary", "--start-alone", "--listen", &own];
        self.launch(host, &[&role, more].concat())
    }

    /// Starts the guest on this host as a primary that waits for its backup.
    ///
    /// # Errors
    /// What the host answered.
    pub fn start_primary(&self, host: usize, more: &[&str]) -> Result<Member<'a>, LabError> {
        let own = self.address(host);
        let role = ["--role", "primary", "--listen", &own];
        self.launch(host, &[&role, more].concat())
    }

    /// Starts a backup on this host that connects to another member's host.
    ///
    /// # Errors
    /// What the host answered.
    pub fn join(&self, host: usize, whom: usize, more: &[&str]) -> Result<Member<'a>, LabError> {
        let theirs = self.address(whom);
        let role = ["--role", "backup", "--connect", &theirs];
        self.launch(host, &[&role, more].concat())
    }

    /// Where the member on this host accepts a backup.
    pub fn address(&self, host: usize) -> String {
        format!("{}:{PORT}", self.lab.host(host).link_address())
    }

    /// A member with this role.
    ///
    /// # Errors
    /// What the host answered.
    pub fn launch(&self, index: usize, role: &[&str]) -> Result<Member<'a>, LabError> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let host = self.lab.host(index);
        ensure_tap(host, self.options.tap)?;
        let share = |name: &str| host.share().join(name).display().to_string();
        let report = format!("member-{number}.json");
        let control = format!("/run/ftvmm-{}-{number}.sock", std::process::id());
        let mut argv = arguments(host, self.files, &self.options);
        argv.extend(role.iter().map(|&word| word.to_owned()));
        argv.extend(["--report".into(), share(&report), "--control".into(), control.clone()]);
        if !role.contains(&"solo") {
            argv.extend(["--incident-dir".into(), share(&self.names.incidents)]);
            let of_share = ["--witness".into(), format!("file:{}", share(&self.names.witness))];
            argv.extend(self.witness.clone().unwrap_or(of_share.into()));
            let way = || self.options.channel.words(share(&self.names.key));
            argv.extend(self.proofs.as_ref().map_or_else(way, |proofs| proofs[index].clone()));
        }
        let mut seen = control.clone();
        if let Some(Confined { user, root }) = &self.confined {
            argv.extend(["--user".into(), user.clone(), "--chroot".into(), root.clone()]);
            seen = format!("{root}{control}");
        }
        let process = host.spawn(&argv)?;
        Ok(Member { process, report, host: index, control: seen, lab: self.lab })
    }
}

impl Member<'_> {
    /// Its control socket, on its host.
    pub fn control(&self) -> &str {
        &self.control
    }

    /// Asks this member with a subcommand of `ftvmm` and its arguments.
    ///
    /// # Errors
    /// As [`crate::lab::Host::spawn`]; that the member refuses is none.
    pub fn ask(&self, words: &[&str]) -> Result<Output, LabError> {
        self.lab.host(self.host).run(&self.argv(words))
    }

    /// Asks as [`Self::ask`], and does not wait for the answer.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn order(&self, words: &[&str]) -> Result<LabProcess, LabError> {
        self.lab.host(self.host).spawn(&self.argv(words))
    }

    /// How it is; `None` when it does not answer.
    ///
    /// # Errors
    /// As [`Self::ask`], or when what it answers is no status.
    pub fn status(&self) -> Result<Option<Status>, LabError> {
        let answer = self.ask(&["status", "--json"])?;
        if !answer.ended.success() {
            return Ok(None);
        }
        serde_json::from_slice(&answer.stdout).map(Some).map_err(|e| at("status")(e.into()))
    }

    /// Waits until its status is as wanted. One program on its host asks all the while: starting
    /// one for each look would take a good part of an emulated CPU from the guest.
    ///
    /// # Errors
    /// [`LabError::Silent`] when it ends, or is not so for very long.
    pub fn wait_until(
        &self,
        doing: &str,
        wanted: impl Fn(&Status) -> bool,
    ) -> Result<Status, LabError> {
        let began = clock::now();
        let mut watcher = self.watcher()?;
        let mut seen = 0;
        loop {
            let printed = watcher.stdout();
            let whole = printed.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            for line in printed[seen..whole].split_inclusive(|byte| *byte == b'\n') {
                let status = serde_json::from_slice(line).map_err(|e| at("status")(e.into()))?;
                if wanted(&status) {
                    return Ok(status);
                }
            }
            seen = whole;
            if self.process.ended().is_some() || began.elapsed() > LONGEST {
                let doing = format!("{doing} on host {}", self.lab.host(self.host).letter());
                let (silence, tails) = (began.elapsed(), self.lab.tails());
                return Err(LabError::Silent { silence, doing, tails });
            }
            thread::sleep(LOOK_EVERY);
            // It gives up when the socket is not there yet.
            if watcher.ended().is_some() && watcher.stdout().len() == seen {
                (watcher, seen) = (self.watcher()?, 0);
            }
        }
    }

    fn watcher(&self) -> Result<LabProcess, LabError> {
        let words = ["status", "--json", "--every", WATCH_EVERY_MS];
        self.lab.host(self.host).spawn(&self.argv(&words))
    }

    /// A client of its control socket, connected: see `control-client`. It takes paths on its
    /// standard input.
    ///
    /// # Errors
    /// As [`Self::ask`], or [`LabError::Silent`] when it cannot connect.
    pub fn connected_client(&self) -> Result<LabProcess, LabError> {
        let host = self.lab.host(self.host);
        let program = host.share().join("bin/control-client").display().to_string();
        let client = host.spawn(&[&program, &self.control])?;
        client.wait_for_stdout("connected")?;
        Ok(client)
    }

    fn argv(&self, words: &[&str]) -> Vec<String> {
        let ftvmm = self.lab.host(self.host).share().join("bin/ftvmm").display().to_string();
        let control = ["--control", &self.control];
        let words = words.iter().chain(&control).map(|&word| word.to_owned());
        std::iter::once(ftvmm).chain(words).collect()
    }

    /// Waits until `backup` follows this member, and shows each status on the way to `watch`.
    ///
    /// # Errors
    /// As [`Self::wait_until`], or what the backup said when it gave up.
    pub fn wait_followed_by(
        &self,
        backup: &Member<'_>,
        watch: impl Fn(&Status),
    ) -> Result<Status, LabError> {
        let gave_up = || backup.process.ended().is_some();
        let status = self.wait_until("attaching a backup", |status| {
            watch(status);
            // The numbers come a moment later than the protection.
            (status.protected && status.last_attach.is_some()) || gave_up()
        })?;
        if !gave_up() {
            return Ok(status);
        }
        let host = self.lab.host(backup.host).letter().to_owned();
        let said = String::from_utf8_lossy(&backup.process.stderr()).into_owned();
        Err(LabError::HostCommandFailed { host, doing: "following the guest".into(), said })
    }

    /// Waits until the death of one host would cost nothing.
    ///
    /// # Errors
    /// As [`Self::wait_until`].
    pub fn wait_protected(&self) -> Result<Status, LabError> {
        self.wait_until("waiting for protection", |status| status.protected)
    }

    /// Waits until this member is active and nobody follows.
    ///
    /// # Errors
    /// As [`Self::wait_until`].
    pub fn wait_alone(&self) -> Result<Status, LabError> {
        let alone = |status: &Status| status.role == "primary" && !status.protected;
        self.wait_until("waiting for the survivor", alone)
    }
}
