//! The meetings.

use std::sync::Arc;
use std::time::Duration;

use ftvmm_devices::Input;
use ftvmm_host::resting_timer;
use ftvmm_machine::Kick;
use ftvmm_replication::Ordinal as ExitOrdinal;
use shuttle::rand::Rng;
use shuttle::thread;

use super::input_queue::{InputQueue, Pending};
use super::kick_target::Kvm;
use super::kicker::Kicks;
use super::rendezvous::{Rendezvous, Stop, TransferRequest};
use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use super::sync::{Condvar, FOREVER, Mutex, lock, wait};

/// Orders tried in each test.
const ORDERS: usize = 3_000;
/// A time that may pass at any moment.
const SHORT: Duration = Duration::from_millis(200);

fn check(meeting: impl Fn() + Send + Sync + 'static) {
    shuttle::check_random(meeting, ORDERS);
}

fn either() -> bool {
    shuttle::rand::thread_rng().gen_bool(0.5)
}

/// As `Vcpu` uses it.
struct Vcpu {
    kvm: Arc<Kvm>,
    kicks: Kicks,
}

impl Vcpu {
    fn create() -> Self {
        let kvm = Kvm::create();
        let kicks = Kicks::new(kvm.byte());
        Self { kvm, kicks }
    }

    fn complete(&self) {
        self.kicks.hold();
        self.kvm.run();
        self.kicks.let_go();
    }

    fn run(&mut self) {
        self.kicks.run_here();
        self.kvm.run();
        self.kicks.answer();
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.kicks.end();
        self.kvm.unmap();
    }
}

#[test]
fn a_kick_makes_the_running_guest_or_the_next_run_return() {
    check(|| {
        let mut vcpu = Vcpu::create();
        let (kicker, is_wanted) = (vcpu.kicks.kicker(), Arc::new(AtomicBool::new(false)));
        let wants = is_wanted.clone();
        let other = thread::spawn(move || {
            wants.store(true, Ordering::SeqCst);
            kicker.kick();
        });
        while !is_wanted.load(Ordering::SeqCst) {
            if either() {
                vcpu.complete();
            }
            vcpu.run();
        }
        other.join().unwrap();
    });
}

#[test]
fn a_kick_touches_no_vcpu_that_is_gone() {
    check(|| {
        let vcpu = Vcpu::create();
        let kicker = vcpu.kicks.kicker();
        let other = thread::spawn(move || (0..2).for_each(|_| kicker.kick()));
        vcpu.complete();
        drop(vcpu);
        other.join().unwrap();
    });
}

fn queue(vcpu: &Vcpu) -> Arc<InputQueue> {
    let queue = Arc::new(InputQueue::new(resting_timer().unwrap(), SHORT));
    queue.kick_with(Box::new(vcpu.kicks.kicker()));
    queue
}

fn asks_attention(pending: &mut Pending) -> bool {
    std::mem::take(&mut pending.attention)
}

/// Sleeps or runs the guest until something wants the thread; not when a look at the queue, under
/// its lock, says that something does.
fn go_on(vcpu: &mut Vcpu, queue: &InputQueue, is_wanted: impl FnOnce(&mut Pending) -> bool) {
    let mut pending = queue.lock();
    if is_wanted(&mut pending) {
        return;
    }
    if either() {
        drop(queue.sleep(pending, None));
    } else {
        drop(pending);
        vcpu.run();
    }
}

#[test]
fn whatever_arrives_is_taken() {
    check(|| {
        let mut vcpu = Vcpu::create();
        let queue = queue(&vcpu);
        queue.set_unrecorded(true);
        let arrivals: [fn(&InputQueue); 3] = [
            |queue| queue.push_console(b"a"),
            |queue| queue.push_signal(Input::PowerButton),
            |queue| drop(queue.push_frame(vec![0; 60])),
        ];
        let start = |arrive: fn(&InputQueue)| {
            let queue = queue.clone();
            thread::spawn(move || arrive(&queue))
        };
        let others = arrivals.map(start);
        let mut taken = 0;
        while taken < others.len() {
            let mut pending = queue.lock();
            let signal = pending.signals.pop_front();
            let frame = pending.frames.pop_front();
            let arrived =
                pending.console.drain(..).len() + signal.iter().count() + frame.iter().count();
            drop(pending);
            taken += arrived;
            // What came after the look has kicked or woken the thread.
            if arrived == 0 {
                go_on(&mut vcpu, &queue, |waiting| !waiting.is_empty());
            }
        }
        for other in others {
            other.join().unwrap();
        }
    });
}

#[test]
fn who_asks_for_the_threads_attention_gets_it() {
    check(|| {
        let mut vcpu = Vcpu::create();
        let queue = queue(&vcpu);
        let is_wanted = Arc::new(AtomicBool::new(false));
        let (asking, wants) = (queue.clone(), is_wanted.clone());
        let other = thread::spawn(move || {
            wants.store(true, Ordering::SeqCst);
            asking.request_attention();
        });
        while !is_wanted.load(Ordering::SeqCst) {
            go_on(&mut vcpu, &queue, asks_attention);
        }
        other.join().unwrap();
    });
}

/// The other place where the vCPU's thread waits: for a backup that is behind.
#[derive(Default)]
struct Congestion {
    lock: Mutex<()>,
    changed: Condvar,
}

impl Congestion {
    fn hold_while(&self, congested: impl Fn() -> bool) {
        let mut held = lock(&self.lock);
        while congested() {
            held = wait(&self.changed, held);
        }
    }

    /// As `Peer::transfer_with` has it.
    fn wake(&self) {
        drop(lock(&self.lock));
        self.changed.notify_all();
    }
}

#[test]
fn a_guest_gives_its_state_wherever_its_thread_waits() {
    check(|| {
        let mut vcpu = Vcpu::create();
        let queue = queue(&vcpu);
        let meeting = Arc::new(Rendezvous::<u64>::new());
        let congestion = Arc::new(Congestion::default());
        let is_over = Arc::new(AtomicBool::new(false));
        let sender = {
            let (meeting, queue) = (meeting.clone(), queue.clone());
            let (congestion, is_over) = (congestion.clone(), is_over.clone());
            thread::spawn(move || {
                let wake = || {
                    queue.request_attention();
                    congestion.wake();
                };
                meeting.begin();
                meeting.dirty_sync(SHORT, wake);
                let stop = meeting.stop(7, FOREVER, wake);
                is_over.store(true, Ordering::SeqCst);
                wake();
                stop.map(|stop| stop.at)
            })
        };
        let mut given = None;
        while !is_over.load(Ordering::SeqCst) {
            if meeting.wants(TransferRequest::DirtySync) {
                meeting.synced(1);
            }
            if meeting.wants(TransferRequest::StopAndCopy) {
                given = meeting.take_destination();
                meeting.stopped(Stop { at: ExitOrdinal(9), stopped_ns: 1 });
            }
            if either() {
                let over = || is_over.load(Ordering::SeqCst);
                congestion.hold_while(|| !meeting.wants(TransferRequest::StopAndCopy) && !over());
            } else {
                go_on(&mut vcpu, &queue, asks_attention);
            }
        }
        assert_eq!((sender.join().unwrap(), given), (Some(ExitOrdinal(9)), Some(7)));
    });
}

/// Twice, so that a guest that is late for the first comes upon the second.
#[test]
fn a_state_that_was_given_up_is_given_to_nobody() {
    check(|| {
        let meeting = Arc::new(Rendezvous::<u64>::new());
        let served = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let sender = {
            let meeting = meeting.clone();
            thread::spawn(move || [0, 1].map(|n| meeting.stop(n, SHORT, || {}).is_some()))
        };
        for _ in 0..4 {
            if meeting.wants(TransferRequest::StopAndCopy)
                && let Some(number) = meeting.take_destination()
            {
                served[number as usize].fetch_add(1, Ordering::SeqCst);
                meeting.stopped(Stop { at: ExitOrdinal(number), stopped_ns: 1 });
            }
            thread::yield_now();
        }
        meeting.end();
        let given = sender.join().unwrap();
        assert_eq!(given.map(u64::from), [0, 1].map(|n: usize| served[n].load(Ordering::SeqCst)));
    });
}
