//! The sender: decides what is sent when, and when the guest is stopped.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ftvmm_replication::state::{PART_PAGES_MAX, pack};
use ftvmm_replication::{Ordinal, PAGE_BYTES, StatePart};

use super::{Destination, PageImage, Shipment, Wanted};

/// So few pages are left to the stop.
const REST_PAGES: u64 = PART_PAGES_MAX as u64;
/// After so many rounds the guest is stopped however much is left: it changes its memory as fast as it is sent.
const ROUNDS_MAX: u32 = 12;
/// How long a look waits for an exit of a guest that computes; the stop does not need one.
const LOOK_WAIT: Duration = Duration::from_millis(200);
/// The vCPU's thread answers within this, or the guest is gone.
const REST_WAIT: Duration = Duration::from_secs(60);

/// How far a shipment is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// 1 for the first pass over memory.
    pub round: u32,
    /// Bytes of memory and disk sent.
    pub sent_bytes: u64,
    /// Bytes that will be sent as far as is known.
    pub total_bytes: u64,
}

/// How a shipment went.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// The exit the guest stood at.
    pub at: Ordinal,
    /// Rounds, the stop not counted.
    pub rounds: u32,
    /// Bytes of memory and disk.
    pub bytes: u64,
    /// How long it took, in nanoseconds.
    pub took_ns: u64,
    /// How long the guest stood still at the end, in nanoseconds.
    pub stopped_ns: u64,
}

/// Packs pages into parts.
pub fn page_parts(pages: &[PageImage]) -> impl Iterator<Item = StatePart> {
    pages.chunks(PART_PAGES_MAX).map(|pages| {
        let items = pages.iter().map(|(page, content)| (*page, content.as_slice()));
        StatePart::Pages(pack(items))
    })
}

/// Ships the guest's state to `destination`, while it runs; `None` when it is not wanted any more. Tells of its
/// `progress` after every part. Blocks; one at a time.
pub fn ship(
    shipment: &Shipment,
    destination: Arc<dyn Destination>,
    progress: &Mutex<Progress>,
) -> Option<Shipped> {
    let started_ns = shipment.clock.host_now_ns();
    let shipped = Sender { shipment, destination, progress }.run(started_ns);
    if shipped.is_none() {
        shipment.want(Wanted::Nothing);
        shipment.lock().destination = None;
        shipment.pages().end_transfer();
    }
    shipped
}

struct Sender<'a> {
    shipment: &'a Shipment,
    destination: Arc<dyn Destination>,
    progress: &'a Mutex<Progress>,
}

impl Sender<'_> {
    fn run(self, started_ns: u64) -> Option<Shipped> {
        let total_bytes = {
            let mut pages = self.shipment.pages();
            pages.begin_transfer();
            pages.unsent_pages() * PAGE_BYTES as u64
        };
        self.tell(|progress| *progress = Progress { total_bytes, ..Progress::default() });
        if !self.destination.part(StatePart::Outline { total_bytes }) {
            return None;
        }
        let mut rounds = 0;
        loop {
            rounds += 1;
            self.tell(|progress| progress.round = rounds);
            self.send_unsent()?;
            if !self.look() {
                break;
            }
            let unsent = self.shipment.pages().unsent_pages();
            if unsent <= REST_PAGES || rounds == ROUNDS_MAX {
                break;
            }
            self.tell(|progress| progress.total_bytes += unsent * PAGE_BYTES as u64);
        }
        let before_stop = self.progress().sent_bytes;
        let at = self.stop()?;
        let took_ns = self.shipment.clock.host_now_ns() - started_ns;
        let stopped_ns = self.shipment.lock().stopped_ns;
        Some(Shipped { at, rounds, bytes: before_stop, took_ns, stopped_ns })
    }

    /// Sends what has to be sent, until nothing is left.
    fn send_unsent(&self) -> Option<()> {
        loop {
            let pages = self.shipment.pages().take_unsent(PART_PAGES_MAX);
            if pages.is_empty() {
                return Some(());
            }
            for part in page_parts(&pages) {
                if !self.destination.part(part) {
                    return None;
                }
            }
            self.tell(|progress| progress.sent_bytes += (pages.len() * PAGE_BYTES) as u64);
        }
    }

    /// Has the copy renewed at the guest's next exit; whether it made one.
    fn look(&self) -> bool {
        self.shipment.lock().looked = false;
        self.shipment.want(Wanted::Look);
        let looked = self.shipment.wait_for(LOOK_WAIT, |meeting| meeting.looked);
        if !looked {
            self.shipment.want(Wanted::Nothing);
        }
        looked
    }

    /// Has the guest stopped, and the rest handed over.
    fn stop(&self) -> Option<Ordinal> {
        {
            let mut meeting = self.shipment.lock();
            meeting.stopped_at = None;
            meeting.destination = Some(self.destination.clone());
        }
        self.shipment.want(Wanted::Rest);
        self.shipment.wait_for(REST_WAIT, |meeting| meeting.stopped_at.is_some());
        self.shipment.lock().stopped_at
    }

    fn tell(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn progress(&self) -> Progress {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
