//! The etcd witness against real etcd servers: what Patroni's users have learned the hard way.
//!
//! Run by `cargo xtask test --only etcd`, which installs Debian's etcd-server.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod cluster;
mod proxy;
mod security;

use std::sync::Barrier;
use std::thread;

use ftvmm_etcd::{Credentials, EtcdWitness};
use ftvmm_replication::Term;

use ftvmm_replication::witness::{
    Claim, Doing, Entry, GuestId, Holder, Nonce, Purpose, Replaced, WitnessError, WitnessStore,
    claim, moment,
};
use nix::sys::signal::Signal;

use cluster::Cluster;
use proxy::LossyWay;

const KEY: &str = "test/vm/entry";

fn live(term: u64, holder: &str) -> Entry {
    Entry {
        term: Term(term),
        guest: GuestId::from_random([7; 16]),
        holder: Holder::from_text(holder).unwrap(),
        doing: Doing::Live,
        ran: Some(Term(term)),
        seen: moment(0),
    }
}

/// What came of a claim, in words.
fn go_on(store: &mut dyn WitnessStore, term: u64, holder: &str) -> String {
    match claim(store, &live(term, holder), Purpose::GoOn) {
        Ok(Claim::Granted) => "granted".into(),
        Ok(Claim::Denied { current }) => format!("term {} is {}'s", current.term, current.holder),
        Err(error) => error.to_string(),
    }
}

#[test]
fn of_many_that_race_for_a_term_one_wins() {
    let cluster = Cluster::start(3);
    assert_eq!(go_on(&mut cluster.open().unwrap(), 1, "first"), "granted");
    for term in 2..=6 {
        let start = Barrier::new(6);
        let answers: Vec<String> = thread::scope(|scope| {
            let race = |number: usize| {
                let (cluster, start) = (&cluster, &start);
                scope.spawn(move || {
                    let mut store = cluster.open().unwrap();
                    start.wait();
                    go_on(&mut store, term, &format!("host-{number}"))
                })
            };
            let racers: Vec<_> = (0..6).map(race).collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        let winner = answers.iter().position(|answer| answer == "granted").expect("a winner");
        for (number, answer) in answers.iter().enumerate().filter(|(number, _)| *number != winner) {
            assert_eq!(*answer, format!("term {term} is host-{winner}'s"), "host {number}");
        }
    }
}

#[test]
fn a_member_that_was_cut_off_grants_nothing_and_shows_nothing_old() {
    let cluster = Cluster::start(3);
    assert_eq!(go_on(&mut cluster.open().unwrap(), 1, "a"), "granted");
    let mut of_one: Vec<_> =
        (0..3).map(|number| cluster.open_port(cluster.client_port(number)).unwrap()).collect();
    // The one that leads, since it may believe for a while that it still does.
    let leader = cluster.leader();
    cluster.cut(leader);
    // Already now, before it has noticed.
    assert!(of_one[leader].read().is_err(), "a read that only one member has answered");
    let others: Vec<_> = (0..3).filter(|number| *number != leader).collect();
    let answer = loop {
        let answer = go_on(&mut of_one[others[0]], 2, "b");
        if !answer.contains("cannot be used") {
            break answer;
        }
    };
    assert_eq!(answer, "granted");
    // Whoever believes the member alone reads an entry that no longer stands …
    assert!(cluster.held_by(leader, KEY).contains("term=1"));
    // … and would go on with it.
    let refused = go_on(&mut of_one[leader], 2, "a");
    assert!(refused.contains("cannot be used") && refused.contains("more than half"), "{refused}");
    assert!(of_one[leader].read().is_err());
    // Named first among all, it delays the answer and does not change it.
    let urls = [leader, others[0], others[1]].map(|number| cluster.url(number)).join(",");
    let address = format!("{urls}/test/vm").parse().unwrap();
    let mut all = EtcdWitness::open(address, &Credentials::default()).unwrap();
    assert_eq!(go_on(&mut all, 2, "a"), "term 2 is b's");
    cluster.join();
    cluster.wait();
    assert_eq!(go_on(&mut of_one[leader], 2, "a"), "term 2 is b's");
}

#[test]
fn a_store_that_was_down_decides_when_it_is_back() {
    let mut cluster = Cluster::start(3);
    let (mut a, mut b) = (cluster.open().unwrap(), cluster.open().unwrap());
    assert_eq!(go_on(&mut a, 1, "a"), "granted");
    cluster.kill(0);
    let answer = loop {
        // The one that was killed may have led.
        let answer = go_on(&mut a, 2, "a");
        if !answer.contains("cannot be used") {
            break answer;
        }
    };
    assert_eq!(answer, "granted", "two of three are enough");
    (1..3).for_each(|number| cluster.kill(number));
    for _ in 0..3 {
        for (store, holder) in [(&mut a, "a"), (&mut b, "b")] {
            let refused = go_on(store, 3, holder);
            assert!(refused.contains("cannot be used"), "{refused}");
            assert!(refused.contains("start etcd there"), "{refused}");
            for number in 0..3 {
                assert!(refused.contains(&cluster.url(number)), "{refused}");
            }
        }
    }
    let refused = cluster.open().unwrap_err().to_string();
    assert!(refused.contains("Connection refused"), "{refused}");
    (0..3).for_each(|number| cluster.start_member(number));
    cluster.wait();
    assert_eq!(go_on(&mut b, 3, "b"), "granted");
    assert_eq!(go_on(&mut a, 3, "a"), "term 3 is b's");
}

#[test]
fn members_that_hang_are_given_up() {
    let cluster = Cluster::start(1);
    let mut store = cluster.open().unwrap();
    cluster.signal(0, Signal::SIGSTOP);
    let refused = go_on(&mut store, 1, "a");
    assert!(refused.contains("cannot be used"), "{refused}");
    cluster.signal(0, Signal::SIGCONT);
    // What was sent meanwhile is not taken for another's.
    assert_eq!(go_on(&mut store, 1, "a"), "granted");
}

#[test]
fn a_claim_whose_answer_was_lost_is_granted_again_to_the_same_host() {
    let cluster = Cluster::start(1);
    let way = LossyWay::new(cluster.client_port(0), "term=2");
    let mut a = cluster.open_port(way.port).unwrap();
    let mut b = cluster.open().unwrap();
    assert_eq!(go_on(&mut a, 1, "a"), "granted");
    let refused = go_on(&mut a, 2, "a");
    assert!(refused.contains("cannot be used"), "{refused}");
    assert!(cluster.held_by(0, KEY).contains("holder=a "), "it is stored");
    assert_eq!(go_on(&mut b, 2, "b"), "term 2 is a's");
    way.lose_nothing();
    assert_eq!(go_on(&mut a, 2, "a"), "granted");
}

#[test]
fn a_claim_that_a_second_member_repeats_is_not_taken_for_anothers() {
    let cluster = Cluster::start(1);
    let way = LossyWay::new(cluster.client_port(0), "term=1");
    let urls = format!("http://127.0.0.1:{},{}", way.port, cluster.url(0));
    let address = format!("{urls}/test/vm").parse().unwrap();
    let mut store = EtcdWitness::open(address, &Credentials::default()).unwrap();
    assert_eq!(store.replace(None, &live(1, "a")).unwrap(), Replaced::Stored);
    assert!(cluster.held_by(0, KEY).contains("holder=a "));
}

/// A store whose host stands still between its look at the entry and its wish to replace it.
struct Paused<'a> {
    store: EtcdWitness,
    meanwhile: Option<Box<dyn FnOnce() + 'a>>,
}

impl WitnessStore for Paused<'_> {
    fn place(&self) -> String {
        self.store.place()
    }

    fn read(&mut self) -> Result<Option<Entry>, WitnessError> {
        self.store.read()
    }

    fn replace(&mut self, expected: Option<&Entry>, new: &Entry) -> Result<Replaced, WitnessError> {
        if let Some(meanwhile) = self.meanwhile.take() {
            meanwhile();
        }
        self.store.replace(expected, new)
    }

    fn prove(&mut self, nonce: Nonce) -> Result<(), WitnessError> {
        self.store.prove(nonce)
    }

    fn sees(&mut self, nonce: Nonce) -> Result<bool, WitnessError> {
        self.store.sees(nonce)
    }
}

#[test]
fn a_host_that_stood_still_across_its_claim_loses_it() {
    let cluster = Cluster::start(1);
    let mut b = cluster.open().unwrap();
    assert_eq!(go_on(&mut b, 1, "a"), "granted");
    let meanwhile = Box::new(|| assert_eq!(go_on(&mut b, 2, "b"), "granted"));
    let mut a = Paused { store: cluster.open().unwrap(), meanwhile: Some(meanwhile) };
    assert_eq!(go_on(&mut a, 2, "a"), "term 2 is b's");
}

#[test]
fn no_clock_ends_a_term() {
    let cluster = Cluster::start(1);
    let mut store = cluster.open().unwrap();
    // A host whose clock is a day or a century off writes another text for people, and no more.
    for (term, seen) in [(1, 86_400), (2, 0), (3, 4_102_444_800)] {
        let wanted = Entry { seen: moment(seen), ..live(term, "a") };
        assert_eq!(claim(&mut store, &wanted, Purpose::GoOn).unwrap(), Claim::Granted);
    }
    let said = cluster.etcd(0, async |client| client.get(KEY, None).await.unwrap());
    assert_eq!(said.kvs()[0].lease(), 0, "the entry has no lease, which a clock would end");
}

#[test]
fn a_proof_is_seen_where_it_was_written_and_leaves_nothing_behind() {
    let (cluster, other) = (Cluster::start(1), Cluster::start(1));
    let (mut a, mut b) = (cluster.open().unwrap(), cluster.open().unwrap());
    let mut elsewhere = other.open().unwrap();
    let beside = format!("{}/test/vm2", cluster.url(0)).parse().unwrap();
    let mut beside = EtcdWitness::open(beside, &Credentials::default()).unwrap();
    for number in 1..=4 {
        let nonce = Nonce([number; 16]);
        assert!(!b.sees(nonce).unwrap());
        a.prove(nonce).unwrap();
        assert!(b.sees(nonce).unwrap());
        assert!(!elsewhere.sees(nonce).unwrap() && !beside.sees(nonce).unwrap());
        assert!(!b.sees(Nonce([number - 1; 16])).unwrap(), "the last one is gone");
    }
    b.prove(Nonce([9; 16])).unwrap();
    let all = Some(etcd_client::GetOptions::new().with_prefix());
    let said = cluster.etcd(0, async |client| client.get("test/vm/proof/", all).await.unwrap());
    assert_eq!(said.kvs().len(), 2, "one for each process");
    assert!(said.kvs().iter().all(|kv| kv.lease() != 0), "a killed process leaves none for ever");
}

#[test]
fn what_is_no_entry_is_named_and_not_replaced() {
    let cluster = Cluster::start(1);
    for (content, says) in
        [(b"hi".to_vec(), "\"hi\" at the key test/vm/entry"), (vec![0xff; 1 << 20], "at the key")]
    {
        cluster.etcd(0, async |client| client.put(KEY, content, None).await.unwrap());
        let mut store = cluster.open().unwrap();
        let refused = store.read().unwrap_err();
        assert!(matches!(refused, WitnessError::Malformed { .. }), "{refused}");
        let refused = go_on(&mut store, 1, "a");
        assert!(refused.contains(says) && refused.len() < 500, "{refused}");
    }
}

#[test]
fn two_clusters_are_no_witness() {
    let (one, two) = (Cluster::start(1), Cluster::start(1));
    let address = format!("{},{}/test/vm", one.url(0), two.url(0)).parse().unwrap();
    let refused = EtcdWitness::open(address, &Credentials::default()).unwrap_err().to_string();
    assert!(refused.contains("members of one cluster only"), "{refused}");
}

#[test]
fn a_cluster_that_was_made_anew_in_the_old_ones_place_grants_nothing() {
    let mut old = Cluster::start(1);
    let new = Cluster::start(1);
    let way = proxy::SwitchedWay::new(old.client_port(0));
    let mut store = old.open_port(way.port).unwrap();
    assert_eq!(go_on(&mut store, 1, "a"), "granted");
    old.kill(0);
    way.lead_to(new.client_port(0));
    // It is empty, so that its first term would be anyone's.
    let refused = go_on(&mut store, 1, "a");
    assert!(refused.contains("belongs to the cluster"), "{refused}");
    assert!(store.replace(None, &live(1, "a")).is_err());
    assert_eq!(new.held_by(0, KEY), "", "nothing was written there");
}
