//! What to do when something goes wrong: every decision about failure, take-over and divergence.
//!
//! Why a table: these are the few lines on which the client's safety rests. Here they can be read
//! in one go, each with its reason; the handlers only carry them out. Every row has a test named
//! `row_<letter>_…` in `session/tests/`.

/// The role and state of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Situation {
    /// Primary, no compatible backup has said hello.
    PrimaryGreeting,
    /// Primary, asked the witness for its first term.
    PrimaryClaimingFirst,
    /// Primary, sent a welcome, waits for the backup to be ready.
    PrimaryOffering,
    /// Primary, the backup is ready, asked the witness to note that the guest runs.
    PrimaryBeginning,
    /// Primary, guest runs, outputs are gated.
    Protected,
    /// Primary, found a divergence, waits for the backup's evidence.
    AwaitingEvidence,
    /// Primary, asked the witness for the next term.
    PrimaryClaiming,
    /// Backup, waits for hello and welcome.
    BackupGreeting,
    /// Backup, executes the primary's log.
    Following,
    /// Backup, knows of a divergence, waits for what the primary decides.
    AwaitingVerdict,
    /// Backup, asked the witness for the next term.
    BackupClaiming,
    /// Backup that took over.
    Live,
    /// Primary, alone, sends its state to a backup.
    Attaching,
    /// The same after a divergence: outputs are held meanwhile.
    Resyncing,
    /// Backup, is being sent the state.
    Joining,
    /// Primary, stands still, has asked the backup to take over.
    Yielding,
    /// Primary that starts alone, asked the witness for its first term.
    PrimaryAlone,
    /// Primary that has hung up so that the backup takes over.
    HandingOver,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trouble {
    /// Silence, a broken connection, or a peer that breaks the protocol.
    PeerLost,
    /// The peer said goodbye because its host was asked to stop.
    PeerLeft,
    /// The witness gave us the term.
    Granted,
    /// The witness has given the term to another.
    Denied,
    /// The evidence is as complete as it gets; the policy is failover.
    DivergedFailover,
    /// The same; the policy is halt.
    DivergedHalt,
    /// The run loop cannot follow the log.
    ReplayFault,
    /// The primary says that this backup is not believed.
    StoodDown,
    /// The evidence is as complete as it gets; the policy is resync, the primary is believed.
    DivergedResync,
    /// The same; the backup is believed.
    DivergedYield,
    /// The operator lets the backup go.
    Detached,
    /// The primary asks its backup to take over.
    Yielded,
    /// The host does not run the guest's vCPU thread.
    VcpuStuck,
    /// The backup's time to take over is past.
    TimeOver,
    /// This host's way to the clients is broken, the backup's is whole, and the operator wants a
    /// switch then.
    LinkDown,
    /// The connection broke, or its end broke the protocol, within the lease: the primary may be
    /// alive and release what the backup has let go.
    BrokeInLease,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Nothing changes but that the connection is gone.
    KeepWaiting,
    /// Send the welcome.
    OfferTerm,
    /// Start the guest on both hosts.
    StartGuest,
    /// Never use the offered term; wait for another backup.
    AbandonTerm,
    /// Ask the witness for the next term. Nothing is released meanwhile.
    ClaimNextTerm,
    /// Release everything gated, and later outputs at once.
    GoAlone,
    /// Execute what has been received, then take live inputs; send what may not have left.
    GoLive,
    /// Decide on the divergence with the evidence at hand.
    SettleWithOwnEvidence,
    /// Send the evidence and wait for what the primary decides.
    AskPrimary,
    /// Stop: another host is active.
    StopLostWitness,
    /// Stop: this host's execution is not believed, or neither is.
    StopDivergence,
    /// Stop: a host was asked to.
    StopHostRequest,
    /// The guest goes on as before, alone.
    StayAlone,
    /// Send the backup the whole state, over the connection that stands.
    SendState,
    /// Ask the backup to take over, and then for its state.
    Yield,
    /// Stop: the state did not arrive completely.
    StopIncomplete,
    /// Hang up, release nothing more, and leave the backup time to take over.
    HandOver,
    /// Change roles with the backup, as on the operator's order.
    SwitchRoles,
    /// Ask the witness for the next term when the lease is over.
    ClaimAfterLease,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its name in tests and logs.
    pub letter: &'static str,
    /// Where it applies.
    pub situation: Situation,
    /// What happened.
    pub trouble: Trouble,
    /// What to do.
    pub decision: Decision,
    /// Why.
    pub reason: &'static str,
}

macro_rules! rows {
    ($($letter:literal $situation:ident $trouble:ident => $decision:ident: $reason:literal)*) => {
        &[$(Row {
            letter: $letter,
            situation: Situation::$situation,
            trouble: Trouble::$trouble,
            decision: Decision::$decision,
            reason: $reason,
        }),*]
    };
}

/// The table.
pub const DECISIONS: &[Row] = rows! {
    "A" PrimaryGreeting PeerLost => KeepWaiting:
        "no guest runs and nothing was promised"
    "B" PrimaryClaimingFirst PeerLost => KeepWaiting:
        "a term that was not offered to anyone stays ours for the next backup"
    "C" PrimaryClaimingFirst Granted => OfferTerm:
        "the term is ours, so it may be offered to the backup"
    "D" PrimaryClaimingFirst Denied => StopLostWitness:
        "a term above the one known at start was given away: another pair runs"
    "E" PrimaryOffering PeerLost => AbandonTerm:
        "the backup may have the offer and take over in the next term; a guest that we start in \
         this term would be a second one, so our next claim must win against that take-over"
    "F" Protected PeerLost => ClaimNextTerm:
        "the backup may be dead or may take us for dead; the witness decides who continues"
    "G" Protected PeerLeft => ClaimNextTerm:
        "the backup will not take over, but only a new term makes sure of that"
    "H" AwaitingEvidence PeerLost => SettleWithOwnEvidence:
        "the backup's evidence will not come any more; we are believed without it"
    "I" AwaitingEvidence DivergedFailover => ClaimNextTerm:
        "the primary is believed; the next term keeps the backup from taking over, even if no \
         message reaches it"
    "J" AwaitingEvidence DivergedHalt => StopDivergence:
        "the operator prefers no service to a possibly wrong one"
    "K" PrimaryClaiming PeerLost => KeepWaiting:
        "the claim under way decides"
    "L" PrimaryClaiming Granted => GoAlone:
        "no other host can be active in this term or an older one"
    "M" PrimaryClaiming Denied => StopLostWitness:
        "the backup took over and sends every gated frame"
    "N" BackupGreeting PeerLost => KeepWaiting:
        "there is nothing to take over before the first welcome"
    "O" Following PeerLost => ClaimNextTerm:
        "the primary may be dead or may take us for dead; the witness decides who continues"
    "P" Following PeerLeft => StopHostRequest:
        "the operator stopped the pair, which is no failure to recover from"
    "Q" AwaitingVerdict PeerLost => StopDivergence:
        "our execution differs from the one the client saw, so our frames must not leave"
    "R" BackupClaiming Granted => GoLive:
        "no other host can be active in this term or an older one"
    "S" BackupClaiming Denied => StopLostWitness:
        "the primary is alive and continued alone"
    "T" BackupClaiming ReplayFault => StopDivergence:
        "the received log cannot be executed, so our state may contradict what the client saw"
    "U" Live ReplayFault => StopDivergence:
        "as T, found while the rest of the log was executed"
    "V" AwaitingVerdict PeerLeft => StopDivergence:
        "as Q, whatever the primary does"
    "W" Following ReplayFault => AskPrimary:
        "the primary decides for both hosts and needs our evidence"
    "X" Following StoodDown => StopDivergence:
        "the primary continued without us"
    "Y" AwaitingVerdict StoodDown => StopDivergence:
        "the primary decided against us"
    "Z" Attaching PeerLost => StayAlone:
        "the backup does not have the whole state, so it cannot take over; the guest is not \
         affected"
    "AA" Attaching PeerLeft => StayAlone:
        "as Z"
    "AB" AwaitingEvidence DivergedResync => SendState:
        "we are believed: our state replaces the backup's, and no frame leaves before that"
    "AC" Resyncing PeerLost => ClaimNextTerm:
        "the backup may not know that it is not believed; the witness decides who continues"
    "AD" Resyncing PeerLeft => ClaimNextTerm:
        "as G"
    "AE" Joining PeerLost => StopIncomplete:
        "we have only a part of the state, so no guest can run here"
    "AF" Joining PeerLeft => StopHostRequest:
        "the operator stopped the pair, which is no failure to recover from"
    "AG" Joining ReplayFault => StopIncomplete:
        "the state cannot be restored"
    "AH" Protected Detached => ClaimNextTerm:
        "as G: the backup leaves, but only a new term makes sure that it does not take over"
    "AI" Yielding PeerLost => ClaimNextTerm:
        "as F: the backup may be dead or may have taken over already"
    "AJ" Yielding PeerLeft => ClaimNextTerm:
        "as G"
    "AK" Following Yielded => ClaimNextTerm:
        "the primary's guest stands still, and the primary asks us to take over; the witness \
         decides"
    "AL" AwaitingEvidence DivergedYield => Yield:
        "the backup is believed: it continues, and its state replaces ours"
    "AM" AwaitingVerdict Yielded => ClaimNextTerm:
        "the backup is believed"
    "AN" PrimaryAlone Granted => GoAlone:
        "the guest starts without a backup; the term is ours"
    "AO" PrimaryAlone Denied => StopLostWitness:
        "a term above the one known at start was given away: another host runs the guest"
    "AP" Joining StoodDown => StopDivergence:
        "the primary continues without us"
    "AQ" Protected VcpuStuck => HandOver:
        "the guest stands still on a host that still sends messages; when the host hangs up, the \
         backup takes over"
    "AR" HandingOver TimeOver => ClaimNextTerm:
        "the time for a take-over is past; the witness decides whether the backup took over or we \
         continue"
    "AS" Protected LinkDown => SwitchRoles:
        "the guest runs, but its clients reach it only on the other host, which has the same state"
    "AT" Following BrokeInLease => ClaimAfterLease:
        "the primary may be alive and still release frames; after the lease it does not, without \
         the witness"
    "AU" PrimaryBeginning Granted => StartGuest:
        "the witness knows that the guest runs in this term, and lets nobody start another"
    "AV" PrimaryBeginning Denied => StopLostWitness:
        "nothing ran here yet, and another host was granted the next term"
    "AW" PrimaryBeginning PeerLost => AbandonTerm:
        "as E; nothing ran here yet"
};

/// The row for what happened.
///
/// # Panics
/// When the table has none: the handlers ask only what it answers.
#[must_use]
pub fn decide(situation: Situation, trouble: Trouble) -> &'static Row {
    let found = DECISIONS.iter().find(|row| (row.situation, row.trouble) == (situation, trouble));
    let Some(row) = found else { panic!("no decision for {trouble:?} in {situation:?}") };
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_follow_each_other_and_no_case_is_decided_twice() {
        for (index, row) in DECISIONS.iter().enumerate() {
            let letter = |index: usize| char::from(b'A' + index as u8);
            let first = (index >= 26).then(|| letter(index / 26 - 1));
            let name: String = first.into_iter().chain([letter(index % 26)]).collect();
            assert_eq!(row.letter, name);
            assert_eq!(decide(row.situation, row.trouble), row, "row {} is shadowed", row.letter);
            assert!(!row.reason.is_empty());
        }
    }

    #[test]
    fn every_row_has_a_named_test() {
        let tests = [
            include_str!("tests/failure.rs"),
            include_str!("tests/divergence.rs"),
            include_str!("tests/attach.rs"),
            include_str!("tests/links.rs"),
            include_str!("tests/lease.rs"),
        ]
        .concat();
        for row in DECISIONS {
            let name = format!("row_{}_", row.letter.to_ascii_lowercase());
            assert!(tests.contains(&name), "no test for row {}", row.letter);
        }
    }
}
