//! The sender: decides what is sent when, and when the guest is stopped.

use std::sync::Arc;
use std::time::Duration;

use ftvmm_replication::state::{PART_PAGES_MAX, pack};
use ftvmm_replication::{Ordinal, PAGE_BYTES, StatePart};

use super::{Destination, Gauge, PageImage, Shipment, Wanted};

/// So few pages are left to the stop.
const REST_PAGES: u64 = PART_PAGES_MAX as u64;
/// After so many rounds the guest is stopped however much is left: it changes its memory as fast as it is sent.
const ROUNDS_MAX: u32 = 12;
/// How long a look waits for an exit of a guest that computes; the stop does not need one.
const LOOK_WAIT: Duration = Duration::from_millis(200);
/// The vCPU's thread answers within this, or the guest is gone.
const REST_WAIT: Duration = Duration::from_secs(60);

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

/// Ships the guest's state to `destination`, while it runs; `None` when it is not wanted any more. `gauge` shows
/// how far it is. Blocks; one at a time.
pub fn ship(
    shipment: &Shipment,
    destination: Arc<dyn Destination>,
    gauge: &Gauge,
) -> Option<Shipped> {
    let started_ns = shipment.clock.host_now_ns();
    let shipped = Sender { shipment, destination, gauge }.run(started_ns);
    gauge.end();
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
    gauge: &'a Gauge,
}

impl Sender<'_> {
    fn run(self, started_ns: u64) -> Option<Shipped> {
        let total_bytes = {
            let mut pages = self.shipment.pages();
            pages.begin_transfer();
            pages.unsent_pages() * PAGE_BYTES as u64
        };
        self.gauge.begin("sending", total_bytes);
        if !self.destination.part(StatePart::Outline { total_bytes }) {
            return None;
        }
        let mut rounds = 0;
        loop {
            rounds += 1;
            self.send_unsent()?;
            if !self.look() {
                break;
            }
            let unsent = self.shipment.pages().unsent_pages();
            if unsent <= REST_PAGES || rounds == ROUNDS_MAX {
                break;
            }
            self.gauge.next_round(rounds + 1, unsent * PAGE_BYTES as u64);
        }
        let bytes = self.gauge.read().0.bytes;
        let at = self.stop()?;
        let took_ns = self.shipment.clock.host_now_ns() - started_ns;
        let stopped_ns = self.shipment.lock().stopped_ns;
        Some(Shipped { at, rounds, bytes, took_ns, stopped_ns })
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
            self.gauge.advance((pages.len() * PAGE_BYTES) as u64);
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
}
