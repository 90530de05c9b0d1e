//! Chaos: a pair of hosts in all kinds of trouble, while clients that number every byte look on.
//!
//! A round begins with a protected guest and ends with one: whatever ended is started again as the
//! survivor's backup, as a supervisor would. In between a [`Fault`] strikes. After it: no byte was
//! lost, changed or repeated; never were two machines live, by what the hosts say and by a
//! [`Capture`] of what the network heard; the guest is unharmed; and the pair is a pair again.

pub(crate) mod capture;
mod echo;
mod fault;

use std::fmt;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use libtest_mimic::Failed;

use crate::clock;
use crate::group::{Group, Member};
use crate::lab::Ended;
use crate::pair::{GUEST_ADDRESS, RunOptions};
use crate::site::{Site, Stage, require, running, said};

pub use capture::{Capture, Span};
pub use echo::{Client, Seen};
pub use fault::{Fault, KINDS, Kind, Netem, Victim};

/// The guest's address, so that the capture knows it.
const MAC: [u8; 6] = [2, 0, 0, 0, 0x99, 1];
/// Where the guest answers (RFC 862).
const ECHO_PORT: u16 = 7;
/// The folder of the witness, which some faults take away.
const WITNESS: &str = "chaos-witness";
/// What the guest does all the while: wrong when a page or a register is.
const WORK: &str = "while :; do selfcheck 1 || echo SELFCHECK BROKEN; usleep 20000; done";
/// The failure timeout: a busy machine must not look like a dead peer.
const FAILURE_TIMEOUT: Duration = Duration::from_millis(3000);
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// What has not come right again after so long does not.
const LONGEST: Duration = Duration::from_secs(240);
/// Bytes and datagrams that come back before a fault strikes, and after all is well again.
const SIGN_OF_LIFE: u64 = 5;

/// A member of the pair.
struct Part<'a> {
    member: Member<'a>,
    /// Its take-overs, as it said last.
    takeovers: u64,
}

/// A guest that is under way, and who runs it.
pub struct Chaos<'a> {
    site: &'a Site,
    group: Group<'a>,
    parts: Vec<Part<'a>>,
    capture: Capture,
    /// Take-overs of all members so far.
    takeovers: u64,
    /// The highest term a member has said.
    term: u64,
}

/// How a round went.
#[derive(Debug)]
pub struct Round {
    /// What happened.
    pub fault: Fault,
    /// Take-overs.
    pub takeovers: u64,
    /// The longest silence of the stream.
    pub silence: Duration,
    /// From the end of the fault to a protected guest.
    pub recovery: Duration,
    /// Bytes of the stream, all right.
    pub bytes: u64,
    /// Datagrams answered, lost, and answered again.
    pub datagrams: [u64; 3],
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fault, takeovers, silence, recovery, bytes, datagrams } = self;
        write!(
            f,
            "{fault}: {takeovers} take-overs, stream silent for {silence:.2?}, protected after \
             {recovery:.2?}; {bytes} bytes right, datagrams answered, lost and repeated: \
             {datagrams:?}"
        )
    }
}

impl<'a> Chaos<'a> {
    /// A guest on the first host, and its backup on the second.
    ///
    /// # Errors
    /// What the lab said.
    pub fn start(site: &'a Site) -> Result<Self, Failed> {
        site.lab.install_tc()?;
        let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
        let options = RunOptions { mac: Some(mac), ..running(WORK) };
        let mut group = Group::new(&site.lab, &site.files, options)?;
        group.keep_witness_in(WITNESS)?;
        let capture = Capture::start(&site.lab, MAC)?;
        let mut chaos = Self { site, group, parts: Vec::new(), capture, takeovers: 0, term: 0 };
        chaos.launch(0)?;
        // The second would do as well: so it is known who prints what the guest does.
        let witness = site.lab.share().join(WITNESS);
        let began = clock::now();
        while std::fs::read_dir(&witness)?.next().is_none() {
            require(began.elapsed() < LONGEST, chaos.told("nobody claims the first term"))?;
            thread::sleep(LOOK_EVERY);
        }
        chaos.launch(1)?;
        site.answers(&chaos.parts[0].member.process)?;
        chaos.settle()?;
        Ok(chaos)
    }

    /// Starts a host's ftvmm, as a supervisor would: with the same command line at every time.
    fn launch(&mut self, host: usize) -> Result<(), Failed> {
        let [own, theirs] = [self.group.address(host), self.group.address(1 - host)];
        let role = ["--role", "auto", "--listen", &own, "--peer", &theirs];
        let member = self.group.launch(host, &role)?;
        self.parts.push(Part { member, takeovers: 0 });
        Ok(())
    }

    /// An operator's mistake: a guest that runs on the other host is started here as well.
    fn start_beside(&self, host: usize) -> Result<(), Failed> {
        let own = self.group.address(host);
        let role = ["--role", "primary", "--start-alone", "--listen", &own];
        let mistake = self.group.launch(host, &role)?.process;
        let ended = mistake.wait()?;
        let refused = ended == Ended::Status(2) && said(&mistake).contains("--force-new-guest");
        require(refused, format!("a second start: {ended:?}:\n{}", said(&mistake)))
    }

    /// One fault, and what came of it.
    ///
    /// # Errors
    /// What was wrong afterwards, or what the lab said.
    pub fn round(&mut self, fault: Fault) -> Result<Round, Failed> {
        drop(self.capture.take());
        let server = SocketAddr::new(GUEST_ADDRESS.parse()?, ECHO_PORT);
        let stream = Client::stream(&self.site.lab, server);
        let datagrams = Client::datagrams(&self.site.lab, server);
        wait_for_life([&stream, &datagrams])?;
        thread::sleep(fault.after);
        let (taken_before, term_before) = (self.takeovers, self.term);
        self.strike(&fault)?;
        let mended = clock::now();
        self.settle()?;
        let recovery = mended.elapsed();
        wait_for_life([&stream, &datagrams])?;
        let (stream, datagrams) = (stream.finish(), datagrams.finish());
        let takeovers = self.takeovers - taken_before;
        let terms = self.term - term_before;
        self.verdict(&stream, &datagrams, terms)?;
        // In one term nothing is sent again.
        let repeated = datagrams.repeated;
        require(repeated == 0 || terms > 0, self.told(&format!("{repeated} second answers")))?;
        Ok(Round {
            fault,
            takeovers,
            silence: stream.longest_silence,
            recovery,
            bytes: stream.right,
            datagrams: [datagrams.right, datagrams.lost, datagrams.repeated],
        })
    }

    fn strike(&mut self, fault: &Fault) -> Result<(), Failed> {
        let active = self.active()?;
        if fault.kind == Kind::KillWhileAttaching {
            let standby = self.parts.remove(1 - active);
            let primary = &self.parts[0].member;
            primary.ask(&["detach"])?;
            standby.member.process.wait()?;
            primary.wait_alone()?;
            self.launch(standby.member.host)?;
        }
        let active = if fault.kind == Kind::KillWhileAttaching { 0 } else { active };
        // A guest that is not protected yet dies with its host; so the one that joins is killed.
        let victim = match fault.victim {
            Victim::Active if fault.kind != Kind::KillWhileAttaching => active,
            _ => 1 - active,
        };
        let [victim_part, other] = [&self.parts[victim], &self.parts[1 - victim]];
        fault.inject(&self.site.lab, WITNESS, &victim_part.member, &other.member)?;
        if fault.kind == Kind::KillHost {
            // Nobody is left who would say that it has ended.
            self.parts.remove(victim);
        }
        if fault.kind == Kind::RestartOldCommand {
            let part = self.parts.remove(victim);
            self.start_beside(part.member.host)?;
            self.launch(part.member.host)?;
        }
        Ok(())
    }

    /// Index of the member that is active, while both run.
    fn active(&self) -> Result<usize, Failed> {
        for (index, part) in self.parts.iter().enumerate() {
            if part.member.status()?.is_some_and(|status| status.role == "primary") {
                return Ok(index);
            }
        }
        Err(self.told("nobody is active").into())
    }

    /// Starts what has ended until one member is active and the other protects it.
    fn settle(&mut self) -> Result<(), Failed> {
        let began = clock::now();
        loop {
            self.site.mend()?;
            if self.look()? {
                return Ok(());
            }
            require(began.elapsed() < LONGEST, self.told("the guest is not protected again"))?;
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Whether the guest is protected; starts what is missing for it.
    fn look(&mut self) -> Result<bool, Failed> {
        let gone = |part: &Part<'_>| part.member.process.ended().is_some();
        let ended: Vec<String> =
            self.parts.iter().filter(|part| gone(part)).map(describe).collect();
        self.parts.retain(|part| !gone(part));
        let mut active = Vec::new();
        for part in &mut self.parts {
            let Some(status) = part.member.status()? else { return Ok(false) };
            self.takeovers += status.takeovers.saturating_sub(part.takeovers);
            part.takeovers = status.takeovers;
            self.term = self.term.max(status.term.unwrap_or_default());
            if status.transmits {
                active.push((part.member.host, status));
            }
        }
        if self.parts.is_empty() {
            return Err(format!("nobody is left:\n{}", ended.join("\n")).into());
        }
        if let [(host, earlier), _] = &active[..] {
            // They were asked one after the other. Who is active in the same term before and after
            // another was, was so all the while.
            let first = self.parts.iter().find(|part| part.member.host == *host);
            let later = first.map(|part| part.member.status()).transpose()?.flatten();
            let still = later.is_some_and(|now| now.transmits && now.term == earlier.term);
            require(!still, self.told("two hosts are active"))?;
            return Ok(false);
        }
        let Some((host, status)) = active.first() else { return Ok(false) };
        match self.parts.len() {
            1 => {
                self.launch(1 - host)?;
                Ok(false)
            }
            _ => Ok(status.protected),
        }
    }

    fn verdict(&self, stream: &Seen, datagrams: &Seen, terms: u64) -> Result<(), Failed> {
        for (client, seen) in [("stream", stream), ("datagrams", datagrams)] {
            if let Some(wrong) = &seen.wrong {
                return Err(self.told(&format!("{client}: {wrong}")).into());
            }
        }
        let spans = self.capture.take();
        let changes = spans.len().saturating_sub(1) as u64;
        // A host that took over may have died before it was asked for its take-overs.
        require(
            changes <= terms,
            self.told(&format!("{terms} new terms, but the guest was heard from {spans:?}")),
        )?;
        for part in &self.parts {
            let console = String::from_utf8_lossy(&part.member.process.stdout()).into_owned();
            require(!console.contains("SELFCHECK BROKEN"), self.told("the guest is damaged"))?;
            let divergences = part.member.status()?.unwrap_or_default().divergences;
            require(divergences == 0, self.told("the hosts differ"))?;
        }
        Ok(())
    }

    /// A fault of the product, with what its hosts have said.
    fn told(&self, what: &str) -> String {
        let parts: Vec<String> = self.parts.iter().map(describe).collect();
        format!("{what}\n{}", parts.join("\n"))
    }
}

fn describe(part: &Part<'_>) -> String {
    let member = &part.member;
    format!("host {}, {:?}:\n{}", member.host, member.process.ended(), said(&member.process))
}

fn wait_for_life(clients: [&Client; 2]) -> Result<(), Failed> {
    let wanted = clients.map(|client| client.right() + SIGN_OF_LIFE);
    let began: Instant = clock::now();
    while clients.iter().zip(wanted).any(|(client, wanted)| client.right() < wanted) {
        if clients.iter().any(|client| client.is_over()) {
            return Ok(()); // Its end says why.
        }
        require(began.elapsed() < LONGEST, "the guest answers its clients no more")?;
        thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// The faults of a run, and what became of it.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How many rounds.
    pub rounds: u64,
    /// What decides every fault.
    pub seed: u64,
    /// The number of the first round.
    pub first: u64,
}

/// Runs the rounds; tells each to `say`. A guest that was harmed is given up, and the next round
/// has a new one.
///
/// # Errors
/// When the lab fails. What the product did wrong is in the answer: the rounds it was in.
pub fn run(site: &Site, settings: Settings, mut say: impl FnMut(&str)) -> Result<Vec<u64>, Failed> {
    let mut wrong = Vec::new();
    let mut chaos = None;
    for number in settings.first..settings.first + settings.rounds {
        let mut rng = Rng::with_seed(settings.seed.wrapping_add(number));
        let fault = Fault::of_round(number, &mut rng, FAILURE_TIMEOUT);
        let running = match &mut chaos {
            Some(running) => running,
            none => {
                site.mend()?;
                none.insert(Chaos::start(site)?)
            }
        };
        match running.round(fault) {
            Ok(round) => say(&format!("round {number}: {round}")),
            Err(failed) => {
                let why = failed.message().unwrap_or("no reason given");
                say(&format!("round {number}: {fault}: WRONG: {why}"));
                wrong.push(number);
                // Dropped, so that its processes end before the next guest has its address.
                if let Some(broken) = chaos.take() {
                    broken.end();
                }
            }
        }
    }
    if let Some(chaos) = chaos {
        chaos.end();
    }
    Ok(wrong)
}

impl Chaos<'_> {
    /// Ends the guest, whatever state it is in.
    pub fn end(self) {
        for part in &self.parts {
            part.member.process.kill();
        }
        for part in &self.parts {
            let _ = part.member.process.wait();
        }
        let _ = std::fs::remove_dir_all(self.site.lab.share().join(WITNESS));
    }
}
