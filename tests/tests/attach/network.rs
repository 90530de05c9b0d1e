//! Where the guest is, for a network that has to learn it: a guest that sends from another address
//! than its card's, from several, in a VLAN, over IPv6, in jumbo frames. No client is in that VLAN:
//! not every machine's kernel has them.

use std::thread;
use std::time::Duration;

use ftvmm_tests::Program;
use ftvmm_tests::pair::{GUEST_ADDRESS6, TAP};
use ftvmm_tests::ping::{Ping, Pinged};
use ftvmm_tests::site::{self, wait_for};

use super::switch::switched;
use super::*;

const PING_EVERY: Duration = Duration::from_millis(50);
const PINGS: usize = 60;
const DOWNLOAD_BYTES: u64 = 4 * MIB;
const MACVLAN_ADDRESS: &str = "10.80.0.10";
/// What the guest sends from in the end: its new address, the same in the VLAN, and that of the
/// second interface.
const SOURCES: u64 = 3;
/// Of the guest, typed at its console: another address for its card, an interface in a VLAN, and
/// one with an address of its own.
const OTHER_ADDRESSES: &str = "echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore; ip link set eth0 \
                               down; ip link set eth0 address 02:00:00:00:00:77; \
    ip link set eth0 up; ip -6 address add fd78::10/64 dev eth0; \
    ip link add link eth0 name v5 type vlan id 5; ip address add 10.79.0.10/24 dev v5; ip link set \
    v5 up; \
    ip link add link eth0 name m1 address 02:00:00:00:00:78 type macvlan; \
    ip address add 10.80.0.10/24 dev m1; ip link set m1 up; echo ADDRESSES $((40 + 2))\n";
/// MTUs: of jumbo frames, and what a case finds.
const JUMBO: &str = "9000";
const USUAL: &str = "1500";

/// Runs a command in the clients' network.
fn client(site: &Site, program: Program, words: &str) -> Result<(), Failed> {
    let answer = site.lab.run_client(program, &words.split(' ').collect::<Vec<_>>())?;
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    equal(&format!("{program:?} {words} ({said})"), answer.ended, GOOD)
}

/// Sets the MTU on the whole way from the guest's tap to the clients.
fn set_mtu(site: &Site, mtu: &str) -> Result<(), Failed> {
    for host in [site.lab.host(0), site.lab.host(1)] {
        if host.run(&["test", "-e", &format!("/sys/class/net/{TAP}")])?.ended != GOOD {
            host.tap(TAP)?;
        }
        for device in ["eth0", TAP, "br0"] {
            let set = host.run(&["busybox", "ip", "link", "set", device, "mtu", mtu])?;
            equal(&format!("MTU of {device}"), set.ended, GOOD)?;
        }
        client(site, Program::Ip, &format!("link set {}-outer mtu {mtu}", host.letter()))?;
    }
    client(site, Program::Ip, &format!("link set outer mtu {mtu}"))
}

/// The clients' address in the network of the guest's second interface.
const CLIENT_ADDRESS: &str = "10.80.0.254/24";

/// Pings all of the guest's addresses while something is done; none may be lost.
fn under_pings<T>(
    site: &Site,
    doing: &str,
    what: impl FnOnce() -> Result<T, Failed>,
) -> Result<T, Failed> {
    let addresses = [GUEST_ADDRESS, MACVLAN_ADDRESS, GUEST_ADDRESS6];
    let start = |address| Ping::start(&site.lab, address, PING_EVERY, PINGS);
    let pings = addresses.map(start).into_iter().collect::<Result<Vec<_>, _>>()?;
    let done = what()?;
    for (address, ping) in addresses.iter().zip(pings) {
        let Pinged { answered, lost, repeated } = ping.finish()?;
        let longest = answered.iter().max().copied().unwrap_or_default();
        println!("  {address}: {lost} lost, longest round trip {longest:.0?} with {doing}");
        equal(&format!("pings to {address} lost with {doing}"), lost, 0)?;
        equal(&format!("answers repeated by {address} with {doing}"), repeated, 0)?;
        // `ping -w` goes on asking while answers are on their way.
        let all = answered.len() >= PINGS;
        require(all, format!("{} pings to {address} answered with {doing}", answered.len()))?;
    }
    Ok(done)
}

/// A ping of a whole frame of the MTU, which nobody may cut into pieces.
fn jumbo_ping(site: &Site) -> Result<(), Failed> {
    let argv = ["-n", "-c", "1", "-w", "60", "-M", "do", "-s", "8972", GUEST_ADDRESS];
    let answer = site.lab.client(Program::Ping, &argv)?.output()?;
    let said = String::from_utf8_lossy(&answer.stdout).into_owned();
    require(answer.status.success(), format!("no answer to a jumbo frame:\n{said}"))
}

fn every_address_moves(site: &Site) -> Result<(), Failed> {
    let with_ip6 = format!("ftguest.ip6={GUEST_ADDRESS6}/64");
    let group = group(site, RunOptions { cmdline: with_ip6, ..options(&[]) })?;
    let primary = alone(site, &group)?;
    let joining = group.join(1, 0, &[])?;
    // While the backup attaches.
    primary.process.write_stdin(OTHER_ADDRESSES.as_bytes());
    wait_for(&primary.process, "ADDRESSES 42")?;
    primary.wait_followed_by(&joining, |_| ())?;
    joining.wait_protected()?;
    // The clients know the address it had.
    client(site, Program::Ip, "neigh flush all")?;
    under_pings(site, "nothing else", || Ok(()))?;
    jumbo_ping(site)?;
    let [speaker, follower] = under_pings(site, "a switch", || switched(primary, joining))?;
    let [speaker, follower] = under_pings(site, "a switch back", || switched(speaker, follower))?;
    jumbo_ping(site)?;
    // Over IPv6, the primary's host dies under a download.
    let url = format!("http://[{GUEST_ADDRESS6}]/bytes/{DOWNLOAD_BYTES}");
    let mut download = ftvmm_tests::download::Download::start(&site.lab, &url)?;
    download.read_through(MIB, |_| ())?;
    let client = thread::spawn(move || download.finish(|_| ()));
    site.lab.host(speaker.host).kill();
    let downloaded = client.join().map_err(|_| "the client panicked")??;
    complete(&downloaded, DOWNLOAD_BYTES)?;
    println!("  IPv6: longest stall {:.2} s", downloaded.longest_stall.as_secs_f64());
    under_pings(site, "the other host gone", || Ok(()))?;
    follower.process.signal(SIGTERM);
    ends_with("survivor", &follower.process, GOOD)?;
    let report = site.report(&follower.report)?;
    println!("  {:?}", report.network);
    equal("take-overs", report.takeovers, 1)?;
    require(report.network.sources >= SOURCES, "the guest has not sent from all addresses")?;
    require(report.network.announcements > 0, "the guest has not announced itself")?;
    require(report.network.rx_dropped_following > 0, "no frame came to the backup")?;
    no_divergence(site, &group)
}

fn addresses(site: &Site) -> Result<(), Failed> {
    set_mtu(site, JUMBO)?;
    client(site, Program::Ip, &format!("address add {CLIENT_ADDRESS} dev outer"))?;
    let moved = every_address_moves(site);
    site.mend()?;
    client(site, Program::Ip, &format!("address del {CLIENT_ADDRESS} dev outer"))?;
    set_mtu(site, USUAL)?;
    moved
}

/// A tap that is not as `--net` says, and two that are not alike.
fn other_mtu(site: &Site) -> Result<(), Failed> {
    set_mtu(site, USUAL)?;
    let mac = Some("52:54:00:46:54:01,mtu=9000".into());
    let group = group(site, RunOptions { mac, ..options(&[]) })?;
    let wrong = group.start_alone(0, &[])?;
    ends_with("primary", &wrong.process, BAD_USAGE)?;
    let line = site::said(&wrong.process);
    let named = ["MTU of 1500", "9000", "ip link set"].iter().all(|word| line.contains(word));
    require(named, format!("the MTU is not named:\n{line}"))
}

pub fn cases() -> Vec<(String, Case)> {
    vec![
        ("network-addresses".into(), Box::new(addresses)),
        ("network-other-mtu".into(), Box::new(other_mtu)),
    ]
}
