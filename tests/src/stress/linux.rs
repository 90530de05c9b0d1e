//! Random workloads for the tiny Linux guest, composed of snippets of shell.

use fastrand::Rng;

use super::bare::pick;

/// Snippets; each is done, and its processes gone, when the next begins. No double quotes: the
/// whole script stands in a pair of them on the kernel command line.
const SNIPPETS: &[&str] = &[
    "selfcheck 1",
    "compute 4",
    "rdtsc 200",
    "head -c 70000 /dev/urandom | sha256sum",
    "head -c 40000 /dev/urandom > /tmp/a; gzip -c /tmp/a | gunzip | cmp - /tmp/a && echo same",
    "head -c 30000 /dev/urandom | od -An -x | tr -s ' ' '\\n' | sort | uniq -c | sort -n | tail -n \
     3",
    "dd if=/dev/zero of=/tmp/z bs=64k count=40 2>&1 | head -n 2; sync; rm /tmp/z",
    "tar cf - /bin/busybox /init | md5sum",
    "for i in 1 2 3 4 5 6 7 8; do sha256sum /proc/uptime & done; wait",
    "for i in 1 2 3 4 5; do (usleep 3000; echo $i) & done; wait",
    "awk 'BEGIN { srand(7); for (i = 0; i < 20000; i++) s += rand(); print s }'",
    "seq 1 3000 | awk '{ s += $1 * $1 } END { print s }'",
    "(yes | head -n 5000; date) | wc",
    "sleep 100 & p=$!; usleep 20000; kill -STOP $p; kill -CONT $p; kill $p; wait $p; echo $?",
    "trap 'echo caught' USR1; (usleep 5000; kill -USR1 $$) & wait; wait; trap - USR1",
    "mkfifo /tmp/f; (seq 1 500 > /tmp/f) & md5sum < /tmp/f; wait; rm /tmp/f",
    "(echo hello | nc -l -p 2000 > /tmp/n) & usleep 50000; echo world | nc 127.0.0.1 2000; wait",
    "ping -c 3 -i 0.05 127.0.0.1 | head -n 4",
    "cat /proc/interrupts /proc/uptime /proc/meminfo /proc/stat | md5sum",
    "find /sys/class /proc/sys -type f | sort | md5sum",
    "mount -t tmpfs none /mnt; cp /bin/busybox /mnt; mv /mnt/busybox /mnt/b; md5sum /mnt/b; umount \
     /mnt",
    "i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done; echo $i",
    "usleep 1700; date; usleep 300; date +%s",
    "timeout 1 sleep 0.03; echo $?; timeout 0.05 sleep 1; echo $?",
    "dd if=/dev/urandom bs=1 count=700 2>/dev/null | hexdump | tail -n 2",
    "seq 1 2000 | sed 's/1/x/g' | grep -c x",
    "echo 3 > /proc/sys/vm/drop_caches; free | md5sum",
    "(ulimit -v 4000; awk 'BEGIN { while (1) s = s s 1 }'); echo $?",
];

/// Ways to reset a PC (`/sys/kernel/reboot/type`).
const RESETS: &[&str] = &["kbd", "acpi", "bios", "efi", "triple", "pci"];

/// A Linux guest that runs a script and switches itself off.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    snippets: Vec<&'static str>,
    /// Pings reach it through a network card.
    pub pinged: bool,
    /// How often and how it resets and runs its script again. It counts on a disk.
    pub resets: Option<(u8, &'static str)>,
}

impl LinuxGuest {
    /// Draws a script.
    pub fn random(rng: &mut Rng) -> Self {
        let resets = (rng.u8(0..3) == 0).then(|| (rng.u8(1..=2), *pick(rng, RESETS)));
        let count = if resets.is_some() { rng.usize(1..=3) } else { rng.usize(3..=9) };
        Self {
            snippets: (0..count).map(|_| *pick(rng, SNIPPETS)).collect(),
            pinged: rng.u8(0..3) == 0,
            resets,
        }
    }

    /// Its snippets.
    pub fn parts(&self) -> Vec<&str> {
        self.snippets.clone()
    }

    /// The script of the snippets `kept`.
    pub fn script(&self, kept: &[usize]) -> String {
        let last = match self.resets {
            None => "reboot -f".to_owned(),
            Some((times, kind)) => format!(
                "n=$(head -c 1 /dev/vda | tr -dc 0-9); [ ${{n:-0}} = {times} ] && poweroff -f; \
                 echo $((${{n:-0}} + 1)) > /dev/vda; echo {kind} > /sys/kernel/reboot/type; reboot \
                 -f"
            ),
        };
        let chosen = kept.iter().map(|&index| self.snippets[index]);
        chosen.chain([last.as_str()]).collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_run::cmdline;

    #[test]
    fn every_script_fits_on_a_command_line() {
        let mut resets = 0;
        for seed in 0..500 {
            let guest = LinuxGuest::random(&mut Rng::with_seed(seed));
            let all: Vec<usize> = (0..guest.parts().len()).collect();
            let line = cmdline(&guest.script(&all));
            // 2048 in all, and ftvmm adds its own parameters.
            assert!(line.len() < 1500, "{} bytes: {line}", line.len());
            resets += u32::from(guest.resets.is_some());
        }
        assert!((100..250).contains(&resets), "{resets} of 500");
        assert!(SNIPPETS.iter().all(|snippet| !snippet.contains('"')));
    }
}
