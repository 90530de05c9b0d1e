//! The one thread that waits for the host: tap, timers, and the channel to the peer.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use nix::sys::timer::TimerSetTimeFlags;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::contain::Thread;
use crate::profile::{self, Phase};

/// A failure of the host's event machinery.
#[derive(Debug, Error)]
pub enum HostEventsError {
    /// epoll or its set-up failed.
    #[error("waiting for host events failed: {0}")]
    Epoll(#[from] event_manager::Error),
    /// Signals, timers or threads could not be set up.
    #[error("host events cannot be set up: {0}")]
    SetUp(#[from] std::io::Error),
}

/// Something the thread waits for.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// The thread; it ends when this is dropped.
pub struct EventLoop {
    ended: Arc<AtomicBool>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts the thread with what it shall wait for.
    ///
    /// # Errors
    /// When the host refuses a descriptor or a thread.
    pub fn start(subscribers: Vec<Subscriber>) -> Result<Self, HostEventsError> {
        let ended = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let mut manager = EventManager::<Subscriber>::new()?;
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        manager.add_subscriber(Box::new(Wake(wake.try_clone()?)));
        let seen = Arc::clone(&ended);
        let thread = Thread::HostEvents.start(move || {
            let _wait = profile::enter(Phase::Wait);
            while !seen.load(Ordering::Acquire) {
                if let Err(error) = manager.run() {
                    tracing::error!(%error, "waiting for host events failed");
                    return;
                }
            }
        })?;
        Ok(Self { ended, wake, thread: Some(thread) })
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Registers `source` for reading; a descriptor epoll refuses is a bug of ours, so it is logged.
pub fn watch(ops: &mut EventOps<'_>, source: &impl std::os::fd::AsRawFd) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        tracing::error!(%error, "a host descriptor cannot be waited for");
    }
}

struct Wake(EventFd);

impl MutEventSubscriber for Wake {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &self.0);
    }
}

/// A timer that is not set.
///
/// # Errors
/// When the host refuses a timer.
pub fn resting_timer() -> Result<Arc<TimerFd>, HostEventsError> {
    let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(std::io::Error::from)?;
    Ok(Arc::new(timer))
}

/// Has `timer` fire once, `after` so long; `None` stops it.
pub fn set_timer(timer: &TimerFd, after: Option<Duration>) {
    let once = |after: Duration| Expiration::OneShot(after.max(Duration::from_nanos(1)).into());
    let answer = match after {
        Some(after) => timer.set(once(after), TimerSetTimeFlags::empty()),
        None => timer.unset(),
    };
    if let Err(error) = answer {
        tracing::error!(%error, "a timer cannot be set");
    }
}

/// Calls `on_tick` after `first`, and then each time after what it answers.
///
/// # Errors
/// When the host refuses a timer.
pub fn repeating<F: FnMut() -> Duration>(
    first: Duration,
    mut on_tick: F,
) -> Result<Ticker<impl FnMut() + use<F>>, HostEventsError> {
    let timer = resting_timer()?;
    set_timer(&timer, Some(first));
    Ok(Ticker::on(timer.clone(), move || set_timer(&timer, Some(on_tick()))))
}

/// A timer that calls a function when it fires.
pub struct Ticker<F> {
    timer: Arc<TimerFd>,
    on_tick: F,
}

impl<F: FnMut()> Ticker<F> {
    /// A timer that is set through [`Self::timer`].
    ///
    /// # Errors
    /// When the host refuses a timer.
    pub fn new(on_tick: F) -> Result<Self, HostEventsError> {
        Ok(Self::on(resting_timer()?, on_tick))
    }

    /// Calls `on_tick` when `timer` fires.
    pub fn on(timer: Arc<TimerFd>, on_tick: F) -> Self {
        Self { timer, on_tick }
    }

    /// The timer, to be set.
    pub fn timer(&self) -> Arc<TimerFd> {
        Arc::clone(&self.timer)
    }
}

impl<F: FnMut()> MutEventSubscriber for Ticker<F> {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        let _other = profile::enter(Phase::Other);
        // Set anew since it fired: then it is not due any more, and the read says so.
        if self.timer.wait().is_ok() {
            (self.on_tick)();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &self.timer.as_fd().as_raw_fd());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Tells when it is let go of.
    struct Told(Sender<()>);

    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
        }
    }

    #[test]
    fn a_repeating_timer_fires_until_the_thread_ends_which_lets_go_of_it() {
        let ((fired, fires), (told, ends)) = (channel(), channel());
        let soon = Duration::from_nanos(1);
        let told = Told(told);
        let timer = repeating(soon, move || {
            let _held = &told;
            let _ = fired.send(());
            soon
        });
        let events = EventLoop::start(vec![Box::new(timer.unwrap())]).unwrap();
        for _ in 0..3 {
            fires.recv().unwrap();
        }
        assert!(ends.try_recv().is_err());
        drop(events);
        ends.try_recv().unwrap();
    }

    #[test]
    fn a_timer_that_was_stopped_does_not_fire() {
        let ((fired, fires), soon) = (channel(), Duration::from_nanos(1));
        let stopped = fired.clone();
        let stopped = Ticker::new(move || stopped.send("stopped").unwrap()).unwrap();
        set_timer(&stopped.timer(), Some(soon));
        set_timer(&stopped.timer(), None);
        let other = Ticker::new(move || fired.send("other").unwrap()).unwrap();
        set_timer(&other.timer(), Some(soon));
        let _events = EventLoop::start(vec![Box::new(stopped), Box::new(other)]).unwrap();
        assert_eq!(fires.recv().unwrap(), "other");
    }
}
