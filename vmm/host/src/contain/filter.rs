//! From the table to the kernel's filters.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Mode;
use super::calls::{Call, Only, Thread};

/// What a call is answered that must look as if the kernel were older.
const NO_SUCH_CALL: u32 = libc::ENOSYS as u32;

/// The two filters of a thread: what it may call, and that clone3 is not there.
pub(super) fn programs(thread: Thread, mode: Mode) -> Result<[BpfProgram; 2], seccompiler::Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut any = Vec::new();
    for call in thread.calls() {
        match conditions(call)? {
            conditions if conditions.is_empty() => any.push(call.number),
            conditions => rules.entry(call.number).or_default().extend(conditions),
        }
    }
    // A call without rules is allowed with any arguments.
    rules.extend(any.into_iter().map(|number| (number, Vec::new())));
    let refused = match mode {
        Mode::Log => SeccompAction::Log,
        Mode::On | Mode::Off => SeccompAction::Trap,
    };
    let allowed = SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?;
    let absent = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(NO_SUCH_CALL),
        TargetArch::x86_64,
    )?;
    Ok([allowed.try_into()?, absent.try_into()?])
}

/// One rule for each way in which the call is allowed; none when it always is.
fn conditions(call: &Call) -> Result<Vec<SeccompRule>, seccompiler::Error> {
    let rule = |argument, operator, value: u32| {
        let value = u64::from(value);
        let one = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
        Ok::<_, seccompiler::Error>(SeccompRule::new(vec![one])?)
    };
    Ok(match call.only {
        Only::Any => Vec::new(),
        Only::Among(argument, values) => values
            .iter()
            .map(|value| rule(argument, SeccompCmpOp::Eq, *value))
            .collect::<Result<_, _>>()?,
        Only::Without(argument, bits) => {
            vec![rule(argument, SeccompCmpOp::MaskedEq(bits.into()), 0)?]
        }
        Only::With(argument, bits) => {
            vec![rule(argument, SeccompCmpOp::MaskedEq(bits.into()), bits)?]
        }
        Only::Masked(argument, mask, value) => {
            vec![rule(argument, SeccompCmpOp::MaskedEq(mask.into()), value)?]
        }
        Only::OwnProcess(argument) => {
            vec![rule(argument, SeccompCmpOp::Eq, std::process::id())?]
        }
    })
}
