//! What a run has come to, and whether it may have.

use ftvmm_replication::StopReason;

use crate::host::Host;
use crate::world::World;

impl World {
    pub fn judge_ending(&self) -> String {
        let clean = |host: &&Host| host.core.stop() == Some(&StopReason::Clean);
        let ended = self.hosts.iter().filter(clean);
        ended.clone().for_each(|host| self.judge_survivor(host));
        match ended.count() {
            0 => {}
            1 => return "ended on one".into(),
            _ => return "ended on both".into(),
        }
        if self.options.term_is_taken && self.checker.holder().is_none() {
            return "another pair has the term".into();
        }
        if self.faults.other_guest {
            assert!(!self.witness.guest_has_run, "two guests run in one's place");
            return "another guest is in its place".into();
        }
        let holder = self.checker.holder().map(|(host, life)| (&self.hosts[host], life));
        let [first, second] = &self.hosts;
        let begun = |(host, life): &(&Host, u64)| host.thread.begun || host.life != *life;
        let Some((host, life)) = holder.filter(begun) else {
            assert!(first.is_gone() || second.is_gone(), "a healthy pair never met");
            return "nobody: a host was gone before the guest began".into();
        };
        let diverged = |host: &Host| host.core.stop() == Some(&StopReason::Divergence);
        if self.hosts.iter().any(diverged) && host.is_gone() {
            assert!(self.faults.flipped || self.faults.forged || self.faults.bad_disk_alone);
            return format!("divergence under {:?}", self.options.on_divergence);
        }
        if host.life != life || host.is_gone() {
            let stop = host.core.stop();
            if stop == Some(&StopReason::HostRequest) && host.life == life {
                return "stopped on request".into();
            }
            let left = matches!(
                stop,
                Some(StopReason::DiskFailed { .. } | StopReason::StateUnusable { .. })
            );
            let lost = host.life != life || host.crashed || left;
            assert!(lost, "the holder stopped: {stop:?}");
            return "nobody: the holder of the last term is gone".into();
        }
        // Whoever holds the last term goes on, with whoever is there.
        assert!(host.seen.frames_after_faults > 0, "the survivor stands still");
        assert!(
            host.seen.answers_after_faults > 0 || self.faults.flipped,
            "the survivor's disk stands still"
        );
        let other = if core::ptr::eq(host, first) { second } else { first };
        if !other.is_gone() {
            let states = [host, other].map(|host| host.core.session().state_name());
            assert_eq!(states, ["Protected", "Following"]);
            return if first.life + second.life > 0 { "new pair" } else { "pair" }.into();
        }
        self.judge_survivor(host);
        let name = if core::ptr::eq(host, second) { "backup live" } else { "primary alone" };
        name.into()
    }

    fn judge_survivor(&self, host: &Host) {
        let trusted = self.is_trusted();
        self.checker.on_survivor(&host.thread.guest, trusted);
        if !self.faults.flipped {
            self.checker.on_disk(&host.thread.guest, &host.disk);
        }
    }
}
