//! A host dies at a random moment; the client must not notice more than a pause.

use super::*;

/// Rounds unless `FTVMM_ROUNDS` says otherwise: one for each kind of moment.
pub const ROUNDS: u64 = 5;
const DOWNLOAD_BYTES: u64 = 8 * MIB;
/// Some seconds of each.
const CLOCK_READINGS: u64 = 20_000;
const TSC_READINGS: u64 = 5_000;
/// In one round of so many the backup's host dies instead of the primary's.
const BACKUP_DIES_EVERY: u64 = 4;
/// What the guest's console shows on the way to its servers.
const BOOT_LINES: &[&str] =
    &[FIRST_LINE, "Memory:", "NET: Registered PF_INET ", "Freeing unused kernel", "Run /init"];

#[derive(Clone, Copy, Debug)]
enum Moment {
    /// When the console shows this.
    Booting(&'static str),
    /// When so many bytes have arrived; 0 is right after the request.
    Downloaded(u64),
}

#[derive(Debug)]
struct Round {
    release: &'static str,
    /// Index of the host that dies: 0 is the primary's.
    victim: usize,
    moment: Moment,
    kernel: GuestKernel,
}

impl Round {
    /// Each kind has its turn; the seed decides the moment.
    fn new(number: u64, mut rng: Rng) -> Self {
        let release = if number.is_multiple_of(2) { "compare" } else { "ack" };
        let victim = usize::from(number % BACKUP_DIES_EVERY == BACKUP_DIES_EVERY - 1);
        let moment = match number % 5 {
            1 => Moment::Booting(rng.choice(BOOT_LINES).copied().unwrap_or(FIRST_LINE)),
            2 => Moment::Downloaded(0),
            _ => Moment::Downloaded(rng.u64(1..DOWNLOAD_BYTES)),
        };
        Self { release, victim, moment, kernel: GuestKernel::Tiny }
    }

    /// The primary's host dies in the middle of a download from a guest with another kernel.
    fn with(kernel: GuestKernel, mut rng: Rng) -> Self {
        let moment = Moment::Downloaded(rng.u64(1..DOWNLOAD_BYTES));
        Self { release: "compare", victim: 0, moment, kernel }
    }

    fn run(&self, site: &Site) -> Result<(), Failed> {
        let mut options = options(&["--release", self.release]);
        if let Moment::Booting(_) = self.moment {
            options.cmdline = "loglevel=7".to_owned();
        }
        options.memory_mib = self.kernel.memory_mib();
        let files = site.files_of(self.kernel);
        let pair = Pair::start(&site.lab, files, &options)?;
        let (survivor, report) = match self.victim {
            0 => (&pair.backup, &pair.backup_report),
            _ => (&pair.primary, &pair.primary_report),
        };
        let downloaded = match self.moment {
            Moment::Booting(line) => {
                wait_for(&pair.primary, line)?;
                site.lab.host(self.victim).kill();
                site.answers(survivor)?;
                site.download(DOWNLOAD_BYTES)?.finish(|_| ())?
            }
            Moment::Downloaded(bytes) => {
                site.answers(&pair.primary)?;
                let mut download = site.download(DOWNLOAD_BYTES)?;
                download.read_through(bytes, |_| ())?;
                site.lab.host(self.victim).kill();
                download.finish(|_| ())?
            }
        };
        survivor.signal(SIGTERM);
        ends_with("survivor", survivor, GOOD)?;
        let report = site.report(report)?;
        println!(
            "  {self:?}: longest stall {:.2} s, take-over {:.3} s",
            downloaded.longest_stall.as_secs_f64(),
            report.takeover_seconds.unwrap_or(f64::NAN)
        );
        complete(&downloaded, DOWNLOAD_BYTES)?;
        equal("take-overs", report.takeovers, u64::from(self.victim == 0))?;
        equal("divergences", report.divergences, 0)?;
        let went_on = said(survivor);
        let alone = ["this host takes over", "this host goes on alone"][self.victim];
        require(went_on.contains(alone), format!("no {alone:?} in\n{went_on}"))
    }
}

/// The primary's host dies while programs read the kernel's clock and the time stamp counter; each
/// fails when what it reads goes back.
fn clocks(site: &Site) -> Result<(), Failed> {
    let script = format!(
        "echo BEGIN; clockres {CLOCK_READINGS} && rdtsc {TSC_READINGS} && echo FORWARD; poweroff -f"
    );
    let pair = site.pair(&running(&script))?;
    wait_for(&pair.backup, "BEGIN")?;
    site.lab.host(0).kill();
    wait_for(&pair.backup, "FORWARD")?;
    ends_with("survivor", &pair.backup, GOOD)?;
    equal("take-overs", site.report(&pair.backup_report)?.takeovers, 1)
}

pub fn cases(seed: u64, rounds: u64) -> impl Iterator<Item = (String, Case)> {
    let tiny = (0..rounds).map(move |number| {
        let round = Round::new(number, Rng::with_seed(seed.wrapping_add(number)));
        (format!("failover-{number:02}"), round)
    });
    let stock = [GuestKernel::Cloud, GuestKernel::Generic].map(|kernel| {
        (format!("failover-{}", kernel.name()), Round::with(kernel, Rng::with_seed(seed)))
    });
    let rounds = tiny.chain(stock).map(move |(name, round)| {
        let case: Case = Box::new(move |site| {
            let again = |why: Failed| {
                let why = why.message().unwrap_or_default().to_owned();
                Failed::from(format!("{round:?}\nFTVMM_SEED={seed} brings it again\n{why}"))
            };
            round.run(site).map_err(again)
        });
        (name, case)
    });
    let clocks: Case = Box::new(clocks);
    rounds.chain([("failover-clocks".to_owned(), clocks)])
}
