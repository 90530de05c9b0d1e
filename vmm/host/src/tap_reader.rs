//! The tap in the host's event thread: reads frames for the guest, and watches the tap and the
//! uplink.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::link::{LinkMessages, host_why_down};
use super::{Tap, watch};

/// Reads frames from the tap. A tap that is deleted and created again is opened again.
pub struct TapReader {
    tap: Tap,
    /// The interface behind the bridge that leads to the clients.
    uplink: Option<String>,
    /// The file registered with epoll; it is closed only after it has been removed there.
    watched: Option<Arc<File>>,
    messages: Option<LinkMessages>,
    /// Takes the frames.
    on_frame: Box<dyn FnMut(Vec<u8>) + Send>,
    /// Called when it changes whether clients reach this host.
    on_link: Box<dyn FnMut(bool) + Send>,
    /// The last logged reason why the tap could not be opened again.
    refused: Option<String>,
}

impl TapReader {
    /// Reads `tap`.
    pub fn new(
        tap: Tap,
        uplink: Option<String>,
        on_frame: Box<dyn FnMut(Vec<u8>) + Send>,
        on_link: Box<dyn FnMut(bool) + Send>,
    ) -> Self {
        let messages = LinkMessages::open()
            .inspect_err(|error| {
                tracing::warn!(%error, "link monitoring failed; link changes will not be noticed");
            })
            .ok();
        Self { tap, uplink, watched: None, messages, on_frame, on_link, refused: None }
    }

    fn take_frames(&mut self, ops: &mut EventOps<'_>) {
        loop {
            match self.tap.read_frame() {
                Ok(Some(frame)) => (self.on_frame)(frame),
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "the tap is lost; it is opened again when it is back");
                    self.let_go(ops);
                    return self.look(ops);
                }
            }
        }
    }

    fn let_go(&mut self, ops: &mut EventOps<'_>) {
        self.tap.lose();
        if let Some(file) = self.watched.take() {
            let _ = ops.remove(Events::empty(&*file));
        }
    }

    /// Registers an open tap with epoll, and reports a change of the link to the clients.
    fn look(&mut self, ops: &mut EventOps<'_>) {
        let why = match self.why_down(ops) {
            Ok(why) => why,
            Err(error) => {
                return tracing::warn!(%error, "the state of the tap cannot be read");
            }
        };
        if !self.tap.set_why_down(why.clone()) {
            return;
        }
        match &why {
            Some(why) => tracing::warn!(why, "clients do not reach the guest on this host"),
            None => tracing::info!("clients reach the guest on this host again"),
        }
        (self.on_link)(why.is_none());
    }

    fn why_down(&mut self, ops: &mut EventOps<'_>) -> std::io::Result<Option<String>> {
        let name = self.tap.name().to_owned();
        let why = host_why_down("tap", &name, false)?;
        if self.watched.is_none() && !self.reopen(ops) {
            return Ok(Some(why.unwrap_or_else(|| format!("tap '{name}' cannot be opened"))));
        }
        match (&why, &self.uplink) {
            (None, Some(uplink)) => host_why_down("uplink", uplink, true),
            _ => Ok(why),
        }
    }

    fn reopen(&mut self, ops: &mut EventOps<'_>) -> bool {
        match self.tap.reopened() {
            Ok(file) => {
                watch(ops, &*file);
                self.watched = Some(file);
                self.refused = None;
            }
            Err(error) => {
                let refused = Some(error.to_string());
                if self.refused != refused {
                    tracing::warn!(%error, "the tap is not back");
                    self.refused = refused;
                }
            }
        }
        self.watched.is_some()
    }
}

impl MutEventSubscriber for TapReader {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if let Some(messages) = &self.messages
            && messages.as_raw_fd() == events.fd()
        {
            messages.drain();
            self.look(ops);
        } else {
            self.take_frames(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Some(messages) = &self.messages {
            watch(ops, messages);
        }
        self.look(ops);
    }
}
