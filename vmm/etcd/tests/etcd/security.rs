//! Who is let in, and who is believed: TLS with certificates of a CA, and users with passwords.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use etcd_client::{ConnectOptions, Permission, PermissionType};
use ftvmm_etcd::{Address, Credentials, EtcdWitness, User};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use crate::cluster::{Cluster, Options};
use crate::go_on;

/// Someone who signs certificates.
struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate for a name or address, and its key.
    fn sign(&self, name: &str) -> (String, String) {
        let params = CertificateParams::new([name.to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let signed = params.signed_by(&key, &self.issuer).unwrap();
        (signed.pem(), key.serialize_pem())
    }

    fn credentials(&self, own: Option<(String, String)>) -> Credentials {
        let own = own.map(|(certificate, key)| (certificate.into_bytes(), key.into_bytes()));
        Credentials { ca: Some(self.pem.clone().into_bytes()), own, user: None }
    }
}

fn write(folder: &Path, name: &str, content: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, content).unwrap();
    path.display().to_string()
}

fn open(address: &Address, credentials: &Credentials) -> Result<EtcdWitness, String> {
    EtcdWitness::open(address.clone(), credentials).map_err(|error| error.to_string())
}

#[test]
fn only_a_cluster_and_a_host_of_the_same_ca_speak_to_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let (ca, stranger) = (Ca::new("ours"), Ca::new("theirs"));
    let (certificate, key) = ca.sign("127.0.0.1");
    let file = |name, content: &str| write(folder.path(), name, content);
    let words = [
        "--cert-file".to_owned(),
        file("cert", &certificate),
        "--key-file".to_owned(),
        file("key", &key),
        "--trusted-ca-file".to_owned(),
        file("ca", &ca.pem),
        "--client-cert-auth".to_owned(),
    ];
    let cluster = Cluster::start_with(1, Options { is_tls: true, words: words.into() });
    let address = cluster.address();
    let ours = ca.credentials(Some(ca.sign("host-a")));
    let mut store = loop {
        match open(&address, &ours) {
            Ok(store) => break store,
            Err(error) => assert!(error.contains("refused"), "not for want of a server: {error}"),
        }
        thread::sleep(Duration::from_millis(50));
    };
    // A cluster of one is ready when it has elected itself.
    let answer = loop {
        match go_on(&mut store, 1, "a") {
            refused if refused.contains("cannot be used") => {}
            answer => break answer,
        }
    };
    assert_eq!(answer, "granted");

    let theirs = stranger.credentials(Some(ca.sign("host-a")));
    let refused = open(&address, &theirs).unwrap_err();
    assert!(refused.contains("UnknownIssuer") && refused.contains("--witness-ca"), "{refused}");
    let refused = open(&address, &ca.credentials(None)).unwrap_err();
    assert!(refused.contains("--witness-cert"), "{refused}");
    let forged = ca.credentials(Some(stranger.sign("host-a")));
    let refused = open(&address, &forged).unwrap_err();
    assert!(refused.contains("--witness-"), "{refused}");
    let named = format!("https://localhost:{}/x", cluster.client_port(0)).parse().unwrap();
    let refused = open(&named, &ours).unwrap_err();
    assert!(refused.contains("name the member as its certificate does"), "{refused}");
    let clear = format!("http://127.0.0.1:{}/x", cluster.client_port(0)).parse().unwrap();
    let refused = open(&clear, &Credentials::default()).unwrap_err();
    assert!(refused.contains("cannot be used"), "{refused}");
}

#[test]
fn a_cluster_in_clear_is_not_taken_for_one_with_tls() {
    let cluster = Cluster::start(1);
    let address = format!("https://127.0.0.1:{}/x", cluster.client_port(0)).parse().unwrap();
    let refused = open(&address, &Ca::new("ours").credentials(None)).unwrap_err();
    assert!(refused.contains("speaks no TLS"), "{refused}");
}

#[test]
fn a_user_reaches_what_it_was_given_and_no_more() {
    let cluster = Cluster::start(1);
    cluster.etcd(0, async |client| {
        for (user, role) in [("root", "root"), ("ftvmm", "witness")] {
            client.user_add(user, format!("{user}-secret"), None).await.unwrap();
            client.role_add(role).await.unwrap();
            client.user_grant_role(user, role).await.unwrap();
        }
        let below = Permission::new(PermissionType::Readwrite, "test/vm/").with_prefix();
        client.role_grant_permission("witness", below).await.unwrap();
        client.auth_enable().await.unwrap();
    });
    let with = |line: &str| Credentials {
        user: Some(User::from_text(line).unwrap()),
        ..Credentials::default()
    };
    let mut store = open(&cluster.address(), &with("ftvmm:ftvmm-secret\n")).unwrap();
    assert_eq!(go_on(&mut store, 1, "a"), "granted");
    let refused = open(&cluster.address(), &with("ftvmm:guess")).unwrap_err();
    assert!(refused.contains("--witness-user-file") && !refused.contains("guess"), "{refused}");
    let refused = open(&cluster.address(), &Credentials::default()).unwrap_err();
    assert!(refused.contains("--witness-user-file"), "{refused}");
    let other = format!("{}/test/vm2", cluster.url(0)).parse().unwrap();
    let refused = open(&other, &with("ftvmm:ftvmm-secret")).unwrap_err();
    assert!(refused.contains("right to read and write"), "{refused}");
    let root = ConnectOptions::new().with_user("root", "root-secret");
    let held = cluster.etcd_as(0, Some(root), async |client| client.get(crate::KEY, None).await);
    assert_eq!(held.unwrap().kvs().len(), 1);
}
