//! The result of a run: its report, and the exit status for the end of the guest and of the pair.

use std::collections::BTreeMap;

use ftvmm_host::channel::HandshakeError;
use ftvmm_host::stderr_dropped_bytes;
use ftvmm_machine::CpuError;
use ftvmm_machine::situation::StopCause;
use ftvmm_machine::virtual_machine::VirtualMachine;
use ftvmm_replication::policy::{Refusal, StopReason};
use ftvmm_replication::{End, WireError};
use ftvmm_runtime::step::Ending;

use super::CommandError;
use crate::guest::Machine;
use crate::report::Report;

/// A machine of which a run's report can be made.
pub trait Reported: VirtualMachine {
    /// What a report says of the machine.
    fn report(&self) -> Report;

    /// The panic message of the guest's kernel, for an error message.
    fn panic_reason(&self) -> String;
}

impl Reported for Machine {
    fn report(&self) -> Report {
        let tsc = self.tsc().counters();
        Report {
            resets: self.board().resets(),
            inputs: self.inputs(),
            slices: self.slices(),
            guest_faults: self.board().guest_faults().count,
            disk: self.board().disk_counters(),
            rdtsc_sites: tsc.sites,
            rdtsc_new_sites: tsc.new_sites,
            other_kernels: tsc.other_kernels,
            rdtsc_late_sites: tsc.late_sites,
            rdtsc_user_reads: tsc.user_reads,
            gp_passed: tsc.passed_gps,
            unknown_msrs: unknown_msrs(self),
            log_dropped_bytes: stderr_dropped_bytes(),
            ..Report::default()
        }
    }

    fn panic_reason(&self) -> String {
        self.board().panic_reason().escape_ascii().to_string()
    }
}

fn unknown_msrs(machine: &Machine) -> BTreeMap<String, u64> {
    machine.msrs().unknown().iter().map(|(index, count)| (format!("{index:#x}"), *count)).collect()
}

/// The end record, when the run ended at a point where a replay can end too.
///
/// # Errors
/// When KVM fails.
pub fn end_at(machine: &impl VirtualMachine, ending: &Ending) -> Result<Option<End>, CpuError> {
    ending.at_exit.then(|| machine.end(ending.reason())).transpose()
}

/// A guest that crashed is a failure; every other end is clean.
///
/// # Errors
/// Says how it crashed.
pub fn verdict(machine: &impl Reported, ending: &Ending) -> Result<(), CommandError> {
    match ending.cause {
        StopCause::GuestPanic => Err(CommandError::GuestFailed(format!(
            "the guest's kernel panicked{}; see its console",
            machine.panic_reason()
        ))),
        StopCause::GuestTripleFault => Err(CommandError::GuestFailed(
            "the guest's CPU shut down (triple fault); see its console".into(),
        )),
        _ => Ok(()),
    }
}

/// What the protocol's reason to stop means for the command.
///
/// # Errors
/// When it is no clean end.
pub fn stopped_by(reason: &StopReason) -> Result<(), CommandError> {
    match reason {
        StopReason::Clean | StopReason::HostRequest => Ok(()),
        // An alert or a handshake (RFC 8446 section 5.1).
        StopReason::BadConfiguration(Refusal::Wire(WireError::NotFtvmm { first_bytes }))
            if matches!(first_bytes[..], [0x15 | 0x16, 3, ..]) =>
        {
            let error = HandshakeError::PeerHasTls;
            Err(CommandError::Configuration(error.to_string()))
        }
        StopReason::BadConfiguration(Refusal::Wire(error)) => Err(CommandError::Configuration(
            format!("{error}; is an ftvmm primary listening there?"),
        )),
        StopReason::BadConfiguration(refusal) => {
            Err(CommandError::Configuration(format!("the two hosts do not fit: {refusal}")))
        }
        StopReason::Incomplete
        | StopReason::DiskFailed { .. }
        | StopReason::StateUnusable { .. } => Err(CommandError::Peer(reason.to_string())),
        StopReason::Divergence => Err(CommandError::Divergence(reason.to_string())),
        StopReason::LostWitness { .. } => Err(CommandError::LostWitness(reason.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use ftvmm_replication::Term;

    use super::*;

    #[test]
    fn every_reason_to_stop_has_its_exit_status() {
        let term = Term(2);
        let refusals = [
            Refusal::StaleTerm { offered: Term(1), known: term },
            Refusal::Wire(WireError::TooLong { length_bytes: 9 }),
        ];
        let mut table = vec![
            (StopReason::Clean, None),
            (StopReason::HostRequest, None),
            (StopReason::Incomplete, Some(1)),
            (StopReason::DiskFailed { description: "EIO".into() }, Some(1)),
            (StopReason::StateUnusable { description: "EIO".into() }, Some(1)),
            (StopReason::Divergence, Some(3)),
            (StopReason::LostWitness { term }, Some(4)),
        ];
        table.extend(refusals.map(|refusal| (StopReason::BadConfiguration(refusal), Some(2))));
        for (reason, status) in table {
            let error = stopped_by(&reason).err();
            assert_eq!(error.map(|error| error.status()), status, "{reason}");
        }
        let alert = WireError::NotFtvmm { first_bytes: vec![0x15, 3, 3, 0, 2, 2, 10] };
        let error = stopped_by(&StopReason::BadConfiguration(Refusal::Wire(alert))).unwrap_err();
        assert!(error.to_string().contains("speaks with TLS"), "{error}");
    }
}
