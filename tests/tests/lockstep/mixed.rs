//! The guest does a bit of everything, for as long as `FTVMM_MIXED_SECONDS` says, while clients
//! come and go.

use std::time::Duration;

use ftvmm_tests::ping::Ping;

use super::*;

/// Processes, pipes, signals, files, sockets, timers, clocks, computation: again and again.
const WORK: &str = "while :; do \
    selfcheck 1; compute 4; rdtsc 200; \
    head -c 70000 /dev/urandom | sha256sum; \
    tar cf - /bin/busybox /init | md5sum; \
    for i in 1 2 3 4 5 6; do sha256sum /proc/uptime & done; wait; \
    sleep 100 & p=$!; usleep 20000; kill -STOP $p; kill -CONT $p; kill $p; wait $p; \
    mkfifo /tmp/f; (seq 1 500 > /tmp/f) & md5sum < /tmp/f; wait; rm /tmp/f; \
    (echo hello | nc -l -p 2000 > /tmp/n) & usleep 50000; echo world | nc 127.0.0.1 2000; wait; \
    cat /proc/interrupts /proc/uptime /proc/meminfo /proc/stat | md5sum; \
    mount -t tmpfs none /mnt; cp /bin/busybox /mnt; md5sum /mnt/busybox; umount /mnt; \
    timeout 0.05 sleep 1; date; echo MIXED; done";
const SECONDS: u64 = 15;
const PING_EVERY: Duration = Duration::from_millis(100);
const PINGS_A_ROUND: usize = 50;

fn mixed_workload(site: &Site) -> Result<(), Failed> {
    let asked = std::env::var("FTVMM_MIXED_SECONDS").ok().and_then(|text| text.parse().ok());
    let pair = site.pair(&running(WORK))?;
    wait_for(&pair.primary, READY)?;
    wait_for(&pair.primary, "MIXED")?;
    site.answers(&pair.primary)?;
    let (began, long_enough) = (clock::now(), Duration::from_secs(asked.unwrap_or(SECONDS)));
    let (mut rounds, mut answered) = (0, 0);
    while began.elapsed() < long_enough {
        let ping = Ping::start(&site.lab, GUEST_ADDRESS, PING_EVERY, PINGS_A_ROUND)?;
        site.download_all(MIB)?;
        answered += ping.finish()?.answered.len();
        rounds += 1;
    }
    pair.primary.signal(SIGTERM);
    end_alike(site, &pair)?;
    let report = site.report(&pair.primary_report)?;
    println!(
        "  {:.0} s, {rounds} downloads right, {answered} of {} pings answered, {} inputs, {} \
         slices, {:.1} kB/s of log",
        report.seconds,
        rounds * PINGS_A_ROUND,
        report.inputs,
        report.slices,
        report.log_bytes as f64 / 1e3 / report.seconds
    );
    Ok(())
}

pub fn cases() -> Vec<(String, Case)> {
    vec![("mixed_workload".into(), Box::new(mixed_workload))]
}
