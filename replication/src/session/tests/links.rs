//! The hosts' ways to the guest's clients.

use super::*;
use crate::policy::LinkPolicy;

/// Whether this host was told to change roles since the last look.
fn asked(host: &mut Host) -> bool {
    host.take_done().contains(&Action::SwitchRoles)
}

#[test]
fn row_as_a_broken_way_to_the_clients_changes_the_roles() {
    let mut pair = Pair::following(|_| ());
    pair.primary.step(SessionEvent::ClientLink { up: false });
    pair.pump();
    assert_eq!(pair.backup.session.client_links(), (true, Some(false)));
    pair.primary.wait(400 * MS);
    assert!(!asked(&mut pair.primary), "it may come back at once");
    // Alive all the while.
    pair.pump();
    pair.backup.wait(400 * MS);
    pair.pump();
    pair.primary.wait(100 * MS);
    assert_eq!(pair.primary.take_rows(), "AS");
    assert!(asked(&mut pair.primary));
    pair.primary.step(SessionEvent::Tick);
    assert!(!asked(&mut pair.primary), "once is enough");
    pair.primary.step(SessionEvent::Yield { through: Ordinal(0) });
    pair.pump();
    pair.backup.answer(2, true);
    pair.backup.step(SessionEvent::TookOver { through: Ordinal(0) });
    pair.pump();
    assert_eq!(pair.primary.session.state_name(), "Following");
    assert_eq!(pair.backup.session.state_name(), "Protected");
    // Now the other breaks too: nobody is better off elsewhere.
    pair.backup.take_done();
    pair.backup.step(SessionEvent::ClientLink { up: false });
    pair.pump();
    for _ in 0..10 {
        pair.backup.wait(100 * MS);
        pair.primary.wait(100 * MS);
        pair.pump();
    }
    assert!(!asked(&mut pair.backup));
    assert_eq!(pair.backup.session.client_links(), (false, Some(false)));
    // The old one's is whole again.
    pair.primary.step(SessionEvent::ClientLink { up: true });
    pair.pump();
    pair.backup.wait(0);
    assert!(asked(&mut pair.backup));
}

#[test]
fn a_broken_way_to_the_clients_is_left_alone_where_the_operator_wants_that() {
    let mut pair = Pair::following(|config| config.on_link_down = LinkPolicy::Ignore);
    pair.primary.step(SessionEvent::ClientLink { up: false });
    for _ in 0..10 {
        pair.pump();
        pair.backup.wait(100 * MS);
        pair.primary.wait(100 * MS);
    }
    assert!(!asked(&mut pair.primary));
    assert_eq!(pair.primary.take_rows(), "");
}

#[test]
fn a_backup_that_comes_without_a_way_to_the_clients_says_so() {
    let mut pair = Pair::new(config(Role::Primary), config(Role::Backup));
    pair.backup.step(SessionEvent::ClientLink { up: false });
    pair.connect();
    pair.pump();
    for _ in 0..2 {
        pair.primary.answer(1, true);
        pair.pump();
    }
    assert_eq!(pair.primary.session.client_links(), (true, Some(false)));
}
