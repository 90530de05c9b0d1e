//! One member of the cluster: how it is reached, how long that may take, and what its refusals
//! mean to a person.

use std::future::Future;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use thiserror::Error;

use crate::address::{Address, MemberAddress};
use crate::request::{Answer, Fault, Moment, Question, ask, cluster_of};

/// Longest wait for a connection, TLS aside.
const CONNECT_LONGEST: Duration = Duration::from_secs(1);
/// Longest wait for a member, from the connection to the answer. etcd itself gives up a proposal
/// after five seconds and two elections (server/etcdserver, `ReqTimeout`), so an answer may be lost
/// that would have come.
pub const ATTEMPT_LONGEST: Duration = Duration::from_secs(3);
/// Longest text of a server in a message, in characters.
const TEXT_LONGEST: usize = 200;

/// A user of etcd, with the password.
#[derive(Clone)]
pub struct User {
    name: String,
    password: String,
}

/// Why a text names no user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("it is not one line NAME:PASSWORD")]
pub struct UserError;

impl User {
    /// Reads `NAME:PASSWORD`, with or without a line feed at the end.
    ///
    /// # Errors
    /// [`UserError`] for anything else. The text is in no message: it may hold the password.
    pub fn from_text(text: &str) -> Result<Self, UserError> {
        let line = text.strip_suffix('\n').unwrap_or(text);
        let (name, password) = line.split_once(':').ok_or(UserError)?;
        let is_line = !line.contains(['\n', '\r', '\0']);
        if !is_line || name.is_empty() || password.is_empty() {
            return Err(UserError);
        }
        Ok(Self { name: name.into(), password: password.into() })
    }
}

/// With what this host shows who it is, and finds out who answers.
#[derive(Clone, Default)]
pub struct Credentials {
    /// Certificates, in PEM, of those who sign the members' certificates.
    pub ca: Option<Vec<u8>>,
    /// This host's certificate and its key, both in PEM.
    pub own: Option<(Vec<u8>, Vec<u8>)>,
    /// This host's user.
    pub user: Option<User>,
}

/// What a member did not do, as a person should read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The member and what it said: `https://a:2379: connection refused`.
    pub reason: String,
    /// What can be done about it.
    pub remedy: &'static str,
}

/// A member that can be asked.
#[derive(Clone)]
pub struct Member {
    shown: String,
    url: String,
    options: ConnectOptions,
}

impl Member {
    /// Looks its name up, once: later a claim depends on no other server than etcd.
    ///
    /// # Errors
    /// [`Refusal`] when the name has no address.
    pub fn new(address: &MemberAddress, credentials: &Credentials) -> Result<Self, Refusal> {
        let shown = address.to_string();
        let mut found = (address.host.as_str(), address.port).to_socket_addrs();
        let number: Option<SocketAddr> = found.as_mut().ok().and_then(Iterator::next);
        let Some(number) = number else {
            let why = found.err().map_or_else(|| "it has no address".into(), |e| e.to_string());
            return Err(Refusal {
                reason: format!("{shown}: {why}"),
                remedy: "give the member's IP address, or mend the look-up of names",
            });
        };
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_LONGEST)
            .with_timeout(ATTEMPT_LONGEST)
            .with_require_leader(true);
        if address.is_tls {
            // The certificate is for the name, not for the number that it was looked up to be.
            let mut tls = TlsOptions::new().domain_name(address.host.clone());
            if let Some(ca) = &credentials.ca {
                tls = tls.ca_certificate(Certificate::from_pem(ca));
            }
            if let Some((certificate, key)) = &credentials.own {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            options = options.with_tls(tls);
        }
        if let Some(user) = &credentials.user {
            options = options.with_user(&user.name, &user.password);
        }
        let scheme = if address.is_tls { "https" } else { "http" };
        Ok(Self { shown, url: format!("{scheme}://{number}"), options })
    }

    /// All members of a cluster.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn all(address: &Address, credentials: &Credentials) -> Result<Vec<Self>, Refusal> {
        address.members().iter().map(|member| Self::new(member, credentials)).collect()
    }

    /// Its address as the user wrote it.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// A connection of its own for each question: one that is kept may be half dead when it is
    /// needed, and is needed seldom.
    async fn connect(&self) -> Result<Client, Fault> {
        Ok(Client::connect([&self.url], Some(self.options.clone())).await?)
    }

    /// Which cluster it belongs to.
    ///
    /// # Errors
    /// [`Refusal`], at the latest after [`ATTEMPT_LONGEST`].
    pub async fn cluster(&self, key: &str) -> Result<u64, Refusal> {
        let asked = async { cluster_of(&mut self.connect().await?, key).await };
        self.in_time(asked).await
    }

    /// Asks it.
    ///
    /// # Errors
    /// [`Refusal`], at the latest after [`ATTEMPT_LONGEST`].
    pub async fn ask(
        &self,
        question: Question,
        known: Option<u64>,
    ) -> Result<(Answer, Moment), Refusal> {
        let asked = async { ask(&mut self.connect().await?, question, known).await };
        self.in_time(asked).await
    }

    async fn in_time<T>(
        &self,
        asked: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Refusal> {
        match tokio::time::timeout(ATTEMPT_LONGEST, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(fault)) => Err(self.refusal(&fault)),
            Err(_) => Err(Refusal {
                reason: format!("{}: no answer in {} s", self.shown, ATTEMPT_LONGEST.as_secs()),
                remedy: MAJORITY,
            }),
        }
    }

    fn refusal(&self, fault: &Fault) -> Refusal {
        let (said, remedy) = match fault {
            Fault::Incomplete => ("an answer that etcd does not give".into(), "is it etcd?"),
            Fault::OtherCluster { known, found } => (
                format!("it belongs to the cluster {found:x}, and {known:x} has answered before"),
                "name members of one cluster only; one that was made anew from a snapshot may have \
                 forgotten a term",
            ),
            Fault::Etcd(error) => (said_by(error), remedy_for(error)),
        };
        Refusal { reason: format!("{}: {said}", self.shown), remedy }
    }
}

/// In TLS 1.3 a server refuses a client after the client took the connection for made, and its
/// reason is often lost with the connection. So may be the answer of one that speaks no TLS.
const REFUSED_BY_TLS: &str = "it may want a certificate (--witness-cert, --witness-key), or one \
                              that another CA has signed, or https, or it speaks no TLS";
const MAJORITY: &str = "more than half of the cluster's members must run and reach each other";

/// The innermost cause, which names the reason; what is around it says "transport error" only.
fn said_by(error: &Error) -> String {
    let (outer, shown): (&dyn std::error::Error, String) = match error {
        Error::TransportError(error) => (error, error.to_string()),
        Error::GRpcStatus(status) => (status, status.message().to_owned()),
        other => return bounded(&other.to_string()),
    };
    let inner = std::iter::successors(outer.source(), |cause| (*cause).source()).last();
    bounded(&inner.map_or(shown, ToString::to_string))
}

/// A server's text, as far as a person needs it and a log can bear it.
fn bounded(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_LONGEST).collect()
}

/// What etcd's refusals ask of a person. The texts are etcd's (api/v3rpc/rpctypes/error.go),
/// rustls' and the kernel's.
const REMEDIES: &[(&str, &str)] = &[
    ("Connection refused", "start etcd there, or correct its address"),
    ("received fatal alert", REFUSED_BY_TLS),
    ("connection closed", REFUSED_BY_TLS),
    ("Connection reset", REFUSED_BY_TLS),
    ("Broken pipe", REFUSED_BY_TLS),
    // h2 has words of its own for it.
    ("broken pipe", REFUSED_BY_TLS),
    ("connection reset", REFUSED_BY_TLS),
    ("not valid for name", "name the member as its certificate does"),
    ("certificate expired", "renew the certificate, or set this host's clock"),
    ("certificate not valid yet", "renew the certificate, or set this host's clock"),
    (
        "certificate",
        "--witness-ca must hold who signed the members' certificates, and they who signed ours",
    ),
    ("tls handshake eof", "this member speaks no TLS: is its URL http://?"),
    ("InvalidContentType", "this member speaks no TLS: is its URL http://?"),
    ("authentication failed", "correct the line in --witness-user-file"),
    ("user name is empty", "etcd asks who we are: --witness-user-file"),
    ("permission denied", "give etcd's user the right to read and write what begins with PREFIX"),
    ("space exceeded", "make room: etcdctl compact, etcdctl defrag, etcdctl alarm disarm"),
];

fn remedy_for(error: &Error) -> &'static str {
    let said = said_by(error);
    let known = REMEDIES.iter().find(|(text, _)| said.contains(text));
    known.map_or(MAJORITY, |(_, remedy)| remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_one_line() {
        for text in ["root:pass", "root:pass\n", "a:b:c"] {
            assert!(User::from_text(text).is_ok(), "{text:?}");
        }
        for text in ["", "root", ":x", "root:", "root:a\nroot:b\n", "root:a\r\n"] {
            assert!(User::from_text(text).is_err(), "{text:?}");
        }
        assert_eq!(User::from_text("a:b:c").ok().map(|user| user.password), Some("b:c".into()));
    }

    #[test]
    fn a_name_that_nobody_has_is_refused_with_its_reason() {
        let address: Address = "https://no-such-host.invalid".parse().unwrap();
        let refused = Member::all(&address, &Credentials::default()).err().unwrap();
        assert!(refused.reason.starts_with("https://no-such-host.invalid:2379: "), "{refused:?}");
    }

    #[test]
    fn a_servers_text_is_short_and_one_line() {
        assert_eq!(bounded("a\nb\u{1b}[31m"), "ab[31m");
        assert_eq!(bounded(&"x".repeat(9000)).len(), TEXT_LONGEST);
    }
}
