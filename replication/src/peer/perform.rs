//! What the session's decisions come to.

use super::{Begin, Effect, Mode, Notice, PeerCore, STRAYS_NS};
use crate::disk_label::DiskState;
use crate::group::decode_group;
use crate::message::Message;
use crate::policy::{ReleasePolicy, Role};
use crate::record::{Ordinal, Term};
use crate::session::decision::Decision;
use crate::session::{Action, SessionEvent};

impl PeerCore {
    pub(super) fn count(&mut self, message: &Message) {
        self.counters.digests += u64::from(matches!(message, Message::Digest { .. }));
    }

    pub(super) fn notice(&mut self, notice: Notice) {
        self.effects.push(Effect::Tell(notice));
    }

    /// Where bytes for the other host go: those that leave together are one effect.
    pub(super) fn unsent(&mut self) -> &mut Vec<u8> {
        if !matches!(self.effects.last(), Some(Effect::Send(_))) {
            self.effects.push(Effect::Send(Vec::new()));
        }
        match self.effects.last_mut() {
            Some(Effect::Send(unsent)) => unsent,
            _ => unreachable!("the last effect is one"),
        }
    }

    pub(super) fn perform(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.send_message(&message),
            Action::Transmit(frame) => self.effects.push(Effect::Transmit(frame)),
            Action::ClaimTerm(term) => {
                self.counters.lost_peer(self.now_ns);
                self.effects.push(Effect::ClaimTerm(term));
            }
            Action::HoldTerm(term) => self.effects.push(Effect::HoldTerm(term)),
            Action::Begin { term, rtc_epoch_s, release } => {
                self.begin_guest(term, Begin { rtc_epoch_s, release });
            }
            Action::DeliverGroup(bytes) => self.deliver(&bytes),
            Action::GoLive { term } => self.go_live(term),
            Action::GoAlone { term } => {
                self.mark_disk(DiskState::Active, term);
                self.notice(Notice::GoesAlone { term });
                self.drop_backup();
            }
            Action::SendState => {
                self.drop_backup();
                let number = self.transfer.begin();
                self.effects.push(Effect::SendState { number });
            }
            Action::BackupRestored { restored_bytes } => self.transfer.restored(restored_bytes),
            Action::Protect { at } => {
                self.notice(Notice::Protected { at });
                self.mode = Mode::Recording;
                self.log.start(at.previous());
                self.counters.found_peer();
            }
            Action::Join { release } => self.join(release),
            Action::RestoreState(part) => self.follower.push_part(part),
            Action::Follow { term, through } => self.follow(term, through),
            // The run loop reports when the guest stands still.
            Action::SwitchRoles => self.want_switch(),
            Action::Receive(frames) => self.effects.push(Effect::GiveFrames(frames)),
            Action::Incident(report) => {
                self.counters.divergences += 1;
                self.effects.push(Effect::KeepIncident(report));
            }
            Action::Congested(congested) => self.guest.congested = congested,
            Action::CompleteFlushes { through } => {
                self.effects.push(Effect::CompleteFlushes { through });
            }
            Action::CompleteDisk { id } => self.effects.push(Effect::CompleteDisk { id }),
            Action::HangUp => {
                self.end_line();
                self.effects.push(Effect::HangUp);
            }
            Action::TurnedAway(refusal) => self.connection.turned_away = Some(refusal),
            Action::Decided { row, detail } => {
                if row.decision == Decision::ClaimAfterLease {
                    self.counters.lost_peer(self.now_ns);
                }
                self.notice(Notice::Decided { row, detail });
            }
            Action::Stop(reason) => {
                self.notice(Notice::Over { reason: reason.clone() });
                self.stop = Some(reason);
                self.effects.push(Effect::StopGuest);
            }
        }
    }

    fn begin_guest(&mut self, term: Term, begin: Begin) {
        self.notice(Notice::Begins { term, release: begin.release });
        self.guest.begin = Some(begin);
        let is_primary = self.session.role() == Role::Primary;
        let state = if is_primary { DiskState::Active } else { DiskState::Following };
        self.mark_disk(state, term);
        if is_primary {
            // The switches may know its addresses behind another host.
            self.announcer.start(self.now_ns);
        }
        self.counters.found_peer();
    }

    fn deliver(&mut self, bytes: &[u8]) {
        self.counters.log_bytes += bytes.len() as u64;
        let group = decode_group(bytes).map_err(|error| error.to_string());
        match group.and_then(|group| self.follower.push_group(group)) {
            // The guest may be computing past that point.
            Ok(has_slice) if has_slice => self.effects.push(Effect::InterruptGuest),
            Ok(_) => {}
            Err(description) => {
                self.events.push_back(SessionEvent::ReplayFault { description });
            }
        }
    }

    fn go_live(&mut self, term: Term) {
        self.mark_disk(DiskState::Active, term);
        self.notice(Notice::TakesOver { term });
        self.guest.congested = false;
        self.follower.go_live();
        match self.session.takes_over_by_switch() {
            true => self.counters.switches += 1,
            false => self.counters.takeovers += 1,
        }
        self.drop_backup();
        self.effects.push(Effect::InterruptGuest);
        self.announcer.start(self.now_ns);
        self.announce(self.now_ns);
    }

    /// Announces the guest if that is due and this host may be heard.
    pub(super) fn announce(&mut self, now_ns: u64) {
        if self.session.may_speak(now_ns) && self.announcer.is_due(now_ns) {
            self.effects.push(Effect::Announce);
        }
    }

    /// Appends what may be released now, and takes back an announcement that may not be made any
    /// more. `now_ns` is read after everything that has come was handed over, right before the
    /// effects are performed: this host may have stood still since they were decided.
    pub fn release(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
        if self.announcer.take_given() && !self.session.may_speak(self.now_ns) {
            self.effects.retain(|effect| !matches!(effect, Effect::Announce));
        }
        let mut actions = Vec::new();
        self.session.release(self.now_ns, &mut actions);
        actions.drain(..).for_each(|action| self.perform(action));
    }

    fn drop_backup(&mut self) {
        self.mode = Mode::Alone;
        self.effects.push(Effect::OpenInputs);
    }

    fn join(&mut self, release: ReleasePolicy) {
        // What is on the disk counts no more, from before the first block comes.
        let term = self.session.term().unwrap_or_default();
        self.disk_is_overwritten(term);
        self.mode = Mode::Following;
        self.announcer.stop();
        self.follower.join();
        self.guest.begin.get_or_insert(Begin { rtc_epoch_s: 0, release });
        let orders = [Effect::CloseInputs, Effect::InterruptGuest, Effect::RequestAttention];
        self.effects.extend(orders);
    }

    fn follow(&mut self, term: Term, through: Ordinal) {
        self.mark_disk(DiskState::Following, term);
        self.notice(Notice::Follows { term });
        self.counters.switches += 1;
        self.mode = Mode::Following;
        self.announcer.stop();
        self.follower.follow(through);
        self.strays_until_ns = self.now_ns + STRAYS_NS;
        self.effects.push(Effect::CloseInputs);
    }
}
