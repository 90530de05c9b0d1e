//! Making a running `KVM_RUN` return from another thread.

use std::sync::Arc;

use ftvmm_machine::Kick;

use super::kick_target::{ImmediateExit, ThreadId};
use super::sync::atomic::{AtomicBool, Ordering};
use super::sync::{Mutex, lock};

struct Target {
    immediate_exit: ImmediateExit,
    /// The thread that runs the vCPU, once it has.
    thread: Option<ThreadId>,
}

struct Shared {
    /// A kick has come, and `KVM_RUN` has not returned for it yet.
    kicked: AtomicBool,
    /// Until the vCPU is unmapped.
    target: Mutex<Option<Target>>,
}

/// A handle with which any thread makes a vCPU's `KVM_RUN` return; a kick that comes between two
/// runs makes the next one return at once (KVM api.rst, `immediate_exit`).
#[derive(Clone)]
pub struct Kicker(Arc<Shared>);

impl Kick for Kicker {
    fn kick(&self) {
        // Held to the end: the vCPU cannot be unmapped meanwhile.
        let target = lock(&self.0.target);
        let Some(target) = &*target else { return };
        self.0.kicked.store(true, Ordering::SeqCst);
        target.immediate_exit.set(true);
        if let Some(thread) = target.thread {
            thread.interrupt();
        }
    }
}

/// The vCPU's end of its [`Kicker`]s.
pub(super) struct Kicks {
    shared: Arc<Shared>,
    immediate_exit: ImmediateExit,
    thread: Option<ThreadId>,
}

impl Kicks {
    /// Kicks for the vCPU with this byte.
    pub(super) fn new(immediate_exit: ImmediateExit) -> Self {
        let target = Target { immediate_exit: immediate_exit.clone(), thread: None };
        let target = Mutex::new(Some(target));
        let shared = Arc::new(Shared { kicked: AtomicBool::new(false), target });
        Self { shared, immediate_exit, thread: None }
    }

    /// A further handle.
    pub(super) fn kicker(&self) -> Kicker {
        Kicker(self.shared.clone())
    }

    /// This thread is about to run the guest.
    pub(super) fn run_here(&mut self) {
        let thread = Some(ThreadId::current());
        if self.thread != thread {
            self.thread = thread;
            if let Some(target) = &mut *lock(&self.shared.target) {
                target.thread = thread;
            }
        }
    }

    /// `KVM_RUN` returned for a kick, if it was one.
    pub(super) fn answer(&self) {
        self.shared.kicked.store(false, Ordering::SeqCst);
        self.immediate_exit.set(false);
    }

    /// The guest continues for now. The kick applies to the next run; [`Self::let_go`] makes sure
    /// of that.
    pub(super) fn put_off(&self) {
        self.immediate_exit.set(false);
    }

    /// Until [`Self::let_go`] the guest executes nothing.
    pub(super) fn hold(&self) {
        self.immediate_exit.set(true);
    }

    /// The guest may execute again. A kick that came meanwhile was meant for the next run.
    pub(super) fn let_go(&self) {
        self.immediate_exit.set(false);
        if self.shared.kicked.load(Ordering::SeqCst) {
            self.immediate_exit.set(true);
        }
    }

    /// Waits for kicks under way and has later ones do nothing: the vCPU is about to be unmapped.
    pub(super) fn end(&self) {
        *lock(&self.shared.target) = None;
    }
}
