//! KVM and its vCPU, as far as a kick can tell: the stand-in for `vmm/kvm/src/kick_target.rs`.

use std::cell::RefCell;
use std::sync::Arc;

use super::sync::atomic::{AtomicBool, Ordering};
use super::sync::{Condvar, Mutex, lock, wait};

std::thread_local! {
    /// The checker runs all threads of a test on one of the host's.
    static KVM: RefCell<Option<Arc<Kvm>>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Thread {
    in_kvm_run: bool,
    signalled: bool,
}

/// A vCPU whose guest computes for ever.
pub struct Kvm {
    immediate_exit: AtomicBool,
    is_mapped: AtomicBool,
    thread: Mutex<Thread>,
    interrupted: Condvar,
}

impl Kvm {
    pub fn create() -> Arc<Self> {
        let kvm = Arc::new(Self {
            immediate_exit: AtomicBool::new(false),
            is_mapped: AtomicBool::new(true),
            thread: Mutex::new(Thread::default()),
            interrupted: Condvar::new(),
        });
        KVM.set(Some(kvm.clone()));
        kvm
    }

    pub fn byte(self: &Arc<Self>) -> ImmediateExit {
        ImmediateExit(self.clone())
    }

    /// KVM_RUN: returns for the byte, and for a signal that comes while it runs.
    pub fn run(&self) {
        let mut thread = lock(&self.thread);
        thread.in_kvm_run = true;
        if !self.immediate_exit.load(Ordering::SeqCst) {
            while !thread.signalled {
                thread = wait(&self.interrupted, thread);
            }
        }
        *thread = Thread::default();
    }

    pub fn unmap(&self) {
        self.is_mapped.store(false, Ordering::SeqCst);
    }
}

#[derive(Clone)]
pub struct ImmediateExit(Arc<Kvm>);

impl ImmediateExit {
    pub fn set(&self, on: bool) {
        assert!(self.0.is_mapped.load(Ordering::SeqCst), "a write to a page that is gone");
        self.0.immediate_exit.store(on, Ordering::SeqCst);
    }
}

/// The thread of the one vCPU.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ThreadId;

impl ThreadId {
    pub fn current() -> Self {
        Self
    }

    /// A signal that comes outside KVM_RUN is handled there, and without effect.
    pub fn interrupt(self) {
        let Some(kvm) = KVM.with_borrow(Clone::clone) else { return };
        let mut thread = lock(&kvm.thread);
        if thread.in_kvm_run {
            thread.signalled = true;
            kvm.interrupted.notify_all();
        }
    }
}
