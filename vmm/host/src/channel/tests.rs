//! Two hosts meet, and strangers with them.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};

use ftvmm_replication::wire::PREAMBLE;

use super::*;

fn key(folder: &Path, name: &str) -> Security {
    let path = folder.join(name);
    if !path.exists() {
        key_file::make(&path).unwrap();
    }
    Security::shared_key(&path).unwrap()
}

fn door(security: &Security) -> (Door, SocketAddr, Receiver<Channel>) {
    let listener = Channel::listen("127.0.0.1:0".parse().unwrap(), security).unwrap();
    let address = listener.local_addr().unwrap();
    let (send, peers) = channel();
    let on_peer = Box::new(move |peer| drop(send.send(peer)));
    (Door::open(listener, security.clone(), on_peer).unwrap(), address, peers)
}

/// The next peer; a door that lets nobody in fails the test.
fn next(peers: &Receiver<Channel>) -> Channel {
    peers.recv_timeout(Duration::from_secs(60)).unwrap()
}

fn flush(writer: &mut ChannelWriter) {
    while !writer.flush().unwrap() {
        std::thread::yield_now();
    }
}

fn receive(reader: &mut ChannelReader, count: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < count {
        match reader.receive().unwrap() {
            Received::Bytes(bytes) => all.extend_from_slice(bytes),
            Received::Nothing => std::thread::yield_now(),
            Received::Closed => panic!("closed after {} bytes", all.len()),
        }
    }
    all
}

/// Everything arrives, both ways, more than the sockets hold.
fn talk(one: Channel, other: Channel) {
    let (mut in_one, mut out_one) = one.split().unwrap();
    let (mut in_other, mut out_other) = other.split().unwrap();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|at| (at / 7) as u8).collect();
    let sent = bytes.clone();
    let sender = std::thread::spawn(move || {
        out_one.push(sent);
        flush(&mut out_one);
        out_one
    });
    assert!(receive(&mut in_other, bytes.len()) == bytes);
    let out_one = sender.join().unwrap();
    out_other.push(b"yes".to_vec());
    flush(&mut out_other);
    assert_eq!(receive(&mut in_one, 3), b"yes");
    drop(out_one);
    while in_other.receive().unwrap() != Received::Closed {}
}

#[test]
fn two_hosts_with_one_key_talk() {
    let folder = tempfile::tempdir().unwrap();
    let security = key(folder.path(), "key");
    let (_door, address, peers) = door(&security);
    let backup = Channel::connect(address, &security).unwrap();
    talk(backup, next(&peers));
}

#[test]
fn nothing_is_in_clear_and_a_changed_byte_ends_the_connection() {
    let folder = tempfile::tempdir().unwrap();
    let security = key(folder.path(), "key");
    let (_door, address, peers) = door(&security);
    let backup = Channel::connect(address, &security).unwrap();
    let primary = next(&peers);
    let mut raw = backup.stream.try_clone().unwrap();
    let (_in, mut out) = primary.split().unwrap();
    out.push(b"a secret of the guest".to_vec());
    flush(&mut out);
    let mut seen = [0; 4096];
    raw.set_nonblocking(false).unwrap();
    let count = raw.read(&mut seen).unwrap();
    assert!(count > 0 && !seen[..count].windows(6).any(|part| part == b"secret"));
    let (mut reader, _out) = backup.split().unwrap();
    reader.buffer[..count].copy_from_slice(&seen[..count]);
    reader.buffer[count - 1] ^= 1;
    assert!(reader.decrypt(count).is_err());
}

#[test]
fn another_key_is_refused_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let (_door, address, peers) = door(&key(folder.path(), "key"));
    let error = Channel::connect(address, &key(folder.path(), "other")).unwrap_err().to_string();
    assert!(error.contains("do not accept each other's key"), "{error}");
    assert!(!error.contains('\n'));
    // Nobody is handed over, and the door is open still.
    Channel::connect(address, &key(folder.path(), "key")).unwrap();
    next(&peers);
    assert!(peers.try_recv().is_err());
}

/// A client with the right key refuses a server with another one.
#[test]
fn whoever_only_says_that_it_is_the_primary_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let server = Handshake::serve(&key(folder.path(), "other")).unwrap().tls.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = std::thread::spawn(move || {
        let mut server = server;
        let (mut stream, _) = listener.accept().unwrap();
        server.complete_io(&mut stream).unwrap_err().to_string()
    });
    let error = Channel::connect(address, &key(folder.path(), "key")).unwrap_err().to_string();
    assert!(error.contains("do not accept"), "{error}");
    assert!(serve.join().unwrap().contains("alert"));
}

#[test]
fn tls_on_one_side_only_is_said_on_both() {
    let folder = tempfile::tempdir().unwrap();
    let (secure, open) = (key(folder.path(), "key"), Security::open(false));
    let (_door, address, _peers) = door(&open);
    let error = Channel::connect(address, &secure).unwrap_err().to_string();
    assert!(error.contains("speaks without TLS and this one with it"), "{error}");
    let (_door, address, _peers) = door(&secure);
    let (mut reader, mut writer) = Channel::connect(address, &open).unwrap().split().unwrap();
    writer.push(PREAMBLE.to_vec());
    flush(&mut writer);
    // An alert: the session says what that means.
    assert_eq!(receive(&mut reader, 7)[..2], [0x15, 3]);
}

#[test]
fn another_service_is_no_primary() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-other\r\n").unwrap();
        stream
    });
    let error = Channel::connect(address, &key(folder.path(), "key")).unwrap_err().to_string();
    assert!(error.contains("SSH-2.0-") && error.contains("is an ftvmm primary"), "{error}");
    drop(serve.join());
}

#[test]
fn silent_connections_and_rubbish_do_not_keep_a_backup_out() {
    let folder = tempfile::tempdir().unwrap();
    for security in [key(folder.path(), "key"), Security::open(false)] {
        let (_door, address, peers) = door(&security);
        let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        let mut rubbish = TcpStream::connect(address).unwrap();
        rubbish.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let (_reader, mut writer) = Channel::connect(address, &security).unwrap().split().unwrap();
        writer.push(PREAMBLE.to_vec());
        flush(&mut writer);
        let peer = next(&peers);
        let (mut reader, _writer) = peer.split().unwrap();
        assert_eq!(receive(&mut reader, PREAMBLE.len()), PREAMBLE);
        assert!(peers.try_recv().is_err());
        drop(silent);
    }
}

#[test]
fn an_address_of_a_network_needs_a_key_or_a_word() {
    let folder = tempfile::tempdir().unwrap();
    for far in ["10.0.0.1:7", "0.0.0.0:7", "[::]:7"] {
        let far = far.parse().unwrap();
        assert!(!Security::open(false).allows(far));
        let error = Channel::listen(far, &Security::open(false)).unwrap_err().to_string();
        assert!(error.contains("ftvmm keygen") && error.contains("--insecure-channel"), "{error}");
        assert!(Channel::connect(far, &Security::open(false)).is_err());
        assert!(Security::open(true).allows(far) && key(folder.path(), "key").allows(far));
    }
    for near in ["127.0.0.1:7", "[::1]:7", "127.9.0.1:7"] {
        assert!(Security::open(false).allows(near.parse().unwrap()));
    }
}

#[test]
fn certificates_of_one_authority_are_accepted_and_of_another_not() {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let folder = tempfile::tempdir().unwrap();
    let authority = |name: &str| {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, params.self_signed(&key).unwrap().pem()).unwrap();
        (path, Issuer::new(params, key))
    };
    let (ours, theirs) = (authority("ca"), authority("other-ca"));
    let host = |name: &str, issuer: &Issuer<'_, KeyPair>, ca: &Path| {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(vec![name.into()]).unwrap().signed_by(&key, issuer);
        let [cert_path, key_path] =
            ["cert", "key"].map(|end| folder.path().join(format!("{name}.{end}")));
        std::fs::write(&cert_path, cert.unwrap().pem()).unwrap();
        std::fs::write(&key_path, key.serialize_pem()).unwrap();
        std::fs::set_permissions(&key_path, Permissions::from_mode(0o640)).unwrap();
        Security::certificates(&cert_path, &key_path, ca).unwrap()
    };
    let (_door, address, peers) = door(&host("a", &ours.1, &ours.0));
    let backup = Channel::connect(address, &host("b", &ours.1, &ours.0)).unwrap();
    talk(backup, next(&peers));
    // It trusts the primary, which does not trust it.
    let error = Channel::connect(address, &host("c", &theirs.1, &ours.0)).unwrap_err();
    assert!(error.to_string().contains("do not accept"), "{error}");
    // It does not trust the primary.
    let error = Channel::connect(address, &host("d", &ours.1, &theirs.0)).unwrap_err();
    assert!(error.to_string().contains("do not accept"), "{error}");
    assert!(peers.try_recv().is_err());
    let no_key = folder.path().join("no-key");
    std::fs::copy(&ours.0, &no_key).unwrap();
    for (mode, says) in [(0o600, "no private key"), (0o604, "chmod o= '"), (0o602, "chmod o= '")] {
        std::fs::set_permissions(&no_key, Permissions::from_mode(mode)).unwrap();
        let no = Security::certificates(&ours.0, &no_key, &ours.0).unwrap_err().to_string();
        assert!(no.contains("--tls-key") && no.contains(says), "{no}");
    }
}

/// The difference between a process that died and a connection that broke.
#[test]
fn a_connection_that_is_reset_is_no_end() {
    for resets in [false, true] {
        let (_door, address, peers) = door(&Security::default());
        let channel = Channel::connect(address, &Security::default()).unwrap();
        let (reader, writer) = channel.split().unwrap();
        let mut stream = writer.stream.try_clone().unwrap();
        stream.write_all(&PREAMBLE).unwrap();
        drop(stream);
        let (mut others, _writer) = next(&peers).split().unwrap();
        if resets {
            writer.reset()
        } else {
            drop(writer)
        }
        drop(reader);
        let end = loop {
            match others.receive() {
                Ok(Received::Nothing | Received::Bytes(_)) => std::thread::yield_now(),
                end => break end.is_ok(),
            }
        };
        assert_eq!(end, !resets);
    }
}
