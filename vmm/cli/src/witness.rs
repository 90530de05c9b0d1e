//! What the witness says before a half of a pair is set up: whether this host may start the guest,
//! and with `--role auto` which part it plays.

use std::net::SocketAddr;

use ftvmm_host::channel::{Channel, Security};
use ftvmm_host::clock::{host_unix_seconds, sleep_ms};
use ftvmm_host::entropy::host_random;
use ftvmm_replication::witness::{
    Claim, Doing, Entry, GuestId, Holder, Nonce, Purpose, WitnessError, WitnessStore, claim, moment,
};
use ftvmm_replication::{LastRun, Term};
use ftvmm_runtime::peer::WitnessAccess;

use super::args::{RoleArg, RunArgs};
use super::{CommandError, witness_arg};

/// Pause between two looks of `--role auto`, in milliseconds.
const LOOK_EVERY_MS: u64 = 1000;
/// Looks for a waiting host that does not answer, before this one takes its place.
const WAITS_FOR_WAITING: u64 = 5;
/// Looks between two messages of the same kind.
const SAID_EVERY: u64 = 10;

/// How this host begins.
pub struct Beginning {
    /// Primary or backup.
    pub role: RoleArg,
    /// The highest term known.
    pub highest_term: Term,
    /// What was known of the guest before this host asked for anything.
    pub last_run: LastRun,
    /// For claims.
    pub access: WitnessAccess,
    /// The connection to the host that has the guest, if it is made already.
    pub channel: Option<Channel>,
}

/// Asks the witness. `None` when `is_stopped` says that the run is to end before it began.
///
/// # Errors
/// When the witness cannot be used, or does not let this host start.
pub fn begin(
    args: &RunArgs,
    security: &Security,
    is_stopped: impl Fn() -> bool,
) -> Result<Option<Beginning>, CommandError> {
    let witness = args.witness.as_ref().ok_or_else(|| {
        CommandError::Configuration("--witness is missing; use file:PATH or etcd:URL".into())
    })?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let holder = Holder::new(host.trim(), random_id()?);
    let mut store = witness_arg::open(witness, &args.witness_options, &holder)?;
    // A witness that takes nothing is found now, and not when a host has died.
    store.prove(Nonce(random_id()?.0)).map_err(unusable)?;
    let known = store.read().map_err(unusable)?;
    let peer = args.peer.filter(|_| args.role == RoleArg::Auto);
    if let Some(peer) = peer {
        return Auto { store, holder, peer, security, is_stopped: &is_stopped }.decide();
    }
    let purpose = match args.force_new_guest {
        true => Purpose::Replace,
        false => Purpose::Start,
    };
    if args.role == RoleArg::Primary && purpose == Purpose::Start {
        may_start(known.as_ref(), &store.place())?;
    }
    let guest = match &known {
        Some(entry) if purpose == Purpose::Start => entry.guest,
        _ => random_id()?,
    };
    let highest_term = match &known {
        // The holder of that term offers it.
        Some(entry) if args.role == RoleArg::Backup => below(entry.term),
        known => known.as_ref().map_or(Term(0), |entry| entry.term),
    };
    let access = WitnessAccess { store, holder, guest, purpose, asks_for_proof: true };
    let last_run = LastRun::of(known.as_ref());
    Ok(Some(Beginning { role: args.role, highest_term, last_run, access, channel: None }))
}

/// What a backup knows when the other host holds `term`, which it may offer.
fn below(term: Term) -> Term {
    Term(term.0.saturating_sub(1))
}

fn random_id() -> Result<GuestId, CommandError> {
    host_random()
        .map(GuestId::from_random)
        .map_err(|_| CommandError::Configuration("the host has no random bytes (getrandom)".into()))
}

fn unusable(error: WitnessError) -> CommandError {
    CommandError::Configuration(error.to_string())
}

/// Refuses to start a guest that another process runs, or may.
fn may_start(known: Option<&Entry>, place: &str) -> Result<(), CommandError> {
    // Who has offered its term to a backup starts nothing before the witness knows, and cannot once
    // the next term is taken: also when both were lost in between.
    let is_free = |entry: &Entry| match entry.doing {
        Doing::Waiting => false,
        Doing::Live => !entry.may_run(),
        Doing::Ended => true,
    };
    let Some(Entry { term, guest, holder, doing, seen, .. }) =
        known.filter(|entry| !is_free(entry))
    else {
        return Ok(());
    };
    Err(CommandError::Configuration(format!(
        "witness {place} says that guest {guest} is {doing} at {holder} in term {term}, last sign \
         of life {seen}: join it with --role backup or --role auto; if it is dead for good, start \
         another in its place with --force-new-guest"
    )))
}

/// `--role auto`: one command line for both hosts.
struct Auto<'a> {
    store: Box<dyn WitnessStore + Send>,
    holder: Holder,
    peer: SocketAddr,
    security: &'a Security,
    is_stopped: &'a dyn Fn() -> bool,
}

/// What a look at the witness leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// To claim the next term, and wait for the other host.
    Claim,
    /// To join the host that has the guest, or waits.
    Join,
}

/// `unanswered` is how many times in a row the other host did not answer.
fn look(known: Option<&Entry>, unanswered: u64) -> Look {
    match known {
        None | Some(Entry { doing: Doing::Ended, .. }) => Look::Claim,
        // The guest has not run, and does not once the next term is ours.
        Some(entry) if !entry.may_run() && unanswered >= WAITS_FOR_WAITING => Look::Claim,
        Some(_) => Look::Join,
    }
}

impl Auto<'_> {
    /// Never starts a second machine: it claims only what [`claim()`] grants to a start, and joins
    /// otherwise.
    fn decide(mut self) -> Result<Option<Beginning>, CommandError> {
        let mut unanswered = 0;
        while !(self.is_stopped)() {
            let known = self.store.read().map_err(unusable)?;
            match look(known.as_ref(), unanswered) {
                Look::Claim => {
                    let guest = known.as_ref().map_or_else(random_id, |entry| Ok(entry.guest))?;
                    if let Some(highest_term) = self.wait_in(known.as_ref(), guest)? {
                        let last_run = LastRun::of(known.as_ref());
                        let begun = self.begin(RoleArg::Primary, highest_term, guest, None);
                        return Ok(Some(Beginning { last_run, ..begun }));
                    }
                    unanswered = 0;
                }
                Look::Join => match Channel::connect_once(self.peer, self.security) {
                    Ok(channel) => {
                        let entry = known.as_ref();
                        let (guest, term) = match entry {
                            Some(entry) => (entry.guest, entry.term),
                            None => (random_id()?, Term(0)),
                        };
                        let known = below(term);
                        return Ok(Some(self.begin(RoleArg::Backup, known, guest, Some(channel))));
                    }
                    Err(error) => {
                        if unanswered % SAID_EVERY == 0 {
                            self.say_waiting(known.as_ref(), &error.to_string());
                        }
                        unanswered += 1;
                        sleep_ms(LOOK_EVERY_MS);
                    }
                },
            }
        }
        Ok(None)
    }

    fn say_waiting(&self, known: Option<&Entry>, error: &str) {
        let Some(Entry { holder, seen, doing, .. }) = known else { return };
        tracing::warn!(
            %holder, seen, %doing, peer = %self.peer, error,
            "the witness says that another host has the guest, which does not answer; trying \
             again. If both hosts have been down since, run one with --role primary --start-alone \
             --force-new-guest"
        );
    }

    /// Takes the next term, to wait in it; the term before, or `None` when another was faster.
    fn wait_in(
        &mut self,
        known: Option<&Entry>,
        guest: GuestId,
    ) -> Result<Option<Term>, CommandError> {
        let before = known.map_or(Term(0), |entry| entry.term);
        let (term, holder) = (before.next(), self.holder.clone());
        let seen = moment(host_unix_seconds());
        // No guest runs in it: the last term in which one did is kept.
        let ran = Some(Term(0));
        let wanted = Entry { term, guest, holder, doing: Doing::Waiting, ran, seen };
        let answer = claim(self.store.as_mut(), &wanted, Purpose::Start).map_err(unusable)?;
        Ok((answer == Claim::Granted).then_some(before))
    }

    fn begin(
        self,
        role: RoleArg,
        highest_term: Term,
        guest: GuestId,
        channel: Option<Channel>,
    ) -> Beginning {
        let Self { store, holder, .. } = self;
        let access =
            WitnessAccess { store, holder, guest, purpose: Purpose::Start, asks_for_proof: true };
        Beginning { role, highest_term, last_run: LastRun::default(), access, channel }
    }
}

#[cfg(test)]
mod tests {
    use super::super::args::tests::run_args;
    use super::*;

    fn entry(doing: Doing) -> Entry {
        let guest = GuestId::from_random([1; 16]);
        let holder = Holder::new("west", guest);
        let ran = Some(Term(if doing == Doing::Waiting { 2 } else { 3 }));
        Entry { term: Term(3), guest, holder, doing, ran, seen: moment(0) }
    }

    fn begins(folder: &tempfile::TempDir, doing: Doing, line: &str) -> Result<Beginning, String> {
        begins_after(folder, &entry(doing), line)
    }

    fn begins_after(
        folder: &tempfile::TempDir,
        entry: &Entry,
        line: &str,
    ) -> Result<Beginning, String> {
        let witness = folder.path().join("w");
        std::fs::write(folder.path().join("w.3"), entry.to_line()).unwrap();
        let line = format!("--kernel k {line} --witness file:{}", witness.display());
        begin(&run_args(&line), &Security::default(), || false)
            .map(Option::unwrap)
            .map_err(|error| error.to_string())
    }

    const PRIMARY: &str = "--role primary --listen 127.0.0.1:0";
    const AUTO: &str = "--role auto --listen 127.0.0.1:0 --peer 127.0.0.1:1";

    #[test]
    fn a_guest_that_another_has_is_not_started_by_accident() {
        let folder = tempfile::tempdir().unwrap();
        for doing in [Doing::Waiting, Doing::Live] {
            for line in [PRIMARY.to_owned(), format!("{PRIMARY} --start-alone")] {
                let refused = begins(&folder, doing, &line).err().unwrap();
                for part in ["west/", "1970-01-01T00:00:00Z", "--force-new-guest", "term 3"] {
                    assert!(refused.contains(part), "{refused}");
                }
            }
        }
    }

    #[test]
    fn an_ended_guest_starts_anew_and_a_forced_one_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let old = entry(Doing::Ended).guest;
        let again = begins(&folder, Doing::Ended, PRIMARY).ok().unwrap();
        assert_eq!((again.highest_term, again.access.guest), (Term(3), old));
        let forced = format!("{PRIMARY} --force-new-guest");
        let forced = begins(&folder, Doing::Live, &forced).ok().unwrap();
        assert!(forced.access.guest != old && forced.access.purpose == Purpose::Replace);
    }

    #[test]
    fn a_pair_that_was_lost_before_its_guest_ran_starts_anew_without_force() {
        let folder = tempfile::tempdir().unwrap();
        let offered = Entry { ran: Some(Term(1)), ..entry(Doing::Live) };
        let alone = format!("{PRIMARY} --start-alone");
        for line in [PRIMARY, &alone] {
            let again = begins_after(&folder, &offered, line).ok().unwrap();
            assert_eq!((again.highest_term, again.access.guest), (Term(3), offered.guest));
            assert_eq!((again.last_run.ran, again.last_run.known), (Term(1), Term(3)));
        }
        let again = begins_after(&folder, &offered, AUTO).ok().unwrap();
        assert_eq!((again.role, again.highest_term), (RoleArg::Primary, Term(3)));
        let waits = std::fs::read_to_string(folder.path().join("w.4")).unwrap();
        let waits = Entry::from_line(&waits).unwrap();
        assert_eq!((waits.doing, waits.ran), (Doing::Waiting, Some(Term(1))));
    }

    #[test]
    fn auto_is_primary_where_nobody_has_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        for (doing, number) in [(Doing::Ended, 4), (Doing::Waiting, 4)] {
            let beginning = begins(&folder, doing, AUTO).ok().unwrap();
            assert_eq!((beginning.role, beginning.highest_term), (RoleArg::Primary, Term(3)));
            let file = folder.path().join(format!("w.{number}"));
            let line = std::fs::read_to_string(&file).unwrap();
            assert_eq!(Entry::from_line(&line).unwrap().doing, Doing::Waiting);
            drop(beginning);
            std::fs::remove_file(file).unwrap();
        }
    }

    #[test]
    fn auto_joins_a_guest_that_is_live_and_never_starts_another() {
        let folder = tempfile::tempdir().unwrap();
        let there = Channel::listen("127.0.0.1:0".parse().unwrap(), &Security::default()).unwrap();
        let line =
            format!("--role auto --listen 127.0.0.1:0 --peer {}", there.local_addr().unwrap());
        let beginning = begins(&folder, Doing::Live, &line).ok().unwrap();
        assert_eq!(beginning.role, RoleArg::Backup);
        assert!(beginning.channel.is_some());
        for unanswered in [0, 1, u64::MAX] {
            assert_eq!(look(Some(&entry(Doing::Live)), unanswered), Look::Join);
        }
    }

    #[test]
    fn a_witness_that_cannot_be_used_ends_the_start_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("w.5"), "hi").unwrap();
        for line in [PRIMARY, AUTO] {
            let refused = begins(&folder, Doing::Ended, line).err().unwrap();
            assert!(refused.contains("w.5") && refused.contains("\"hi\""), "{refused}");
        }
        let line = format!("--kernel k {PRIMARY} --witness file:/nowhere/at/all/w");
        let refused = begin(&run_args(&line), &Security::default(), || false).err().unwrap();
        assert_eq!(refused.status(), 2);
        let refused = refused.to_string();
        assert!(refused.contains("No such file") && refused.contains("mount it"), "{refused}");
    }
}
