//! What `--witness etcd:…` names: the cluster's members, and the guest's place in it.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Most members that may be named. etcd advises five, seven at most
/// (<https://etcd.io/docs/v3.4/faq/>, "What is maximum cluster size?").
pub const MEMBERS_MAX: usize = 9;
/// Longest prefix, in bytes.
const PREFIX_BYTES_MAX: usize = 200;
/// Longest name of a host, in bytes (RFC 1035, 2.3.4).
const HOST_BYTES_MAX: usize = 253;
/// Where the entry is when the user names no place.
const DEFAULT_PREFIX: &str = "ftvmm";
/// etcd's port for clients (IANA: etcd-client).
const DEFAULT_PORT: u16 = 2379;

/// One member's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberAddress {
    /// Whether it is spoken to through TLS.
    pub is_tls: bool,
    /// Its name or IP address, without brackets.
    pub host: String,
    /// Its TCP port.
    pub port: u16,
}

/// A cluster, and the place of one guest's witness in it: `URL[,URL…][/PREFIX]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    members: Vec<MemberAddress>,
    prefix: String,
}

/// What is wrong with an address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// A member's address does not begin as it must.
    #[error("'{0}' begins with neither http:// nor https://")]
    Scheme(String),
    /// A member's address has a host that is none.
    #[error("'{0}' names no host")]
    Host(String),
    /// A member's address has a port that is none.
    #[error("'{0}' is no port")]
    Port(String),
    /// Something follows the port where nothing may.
    #[error("only the last URL may be followed by /PREFIX, but '{0}' is not the last")]
    PathInside(String),
    /// The place has a spelling that is not accepted.
    #[error(
        "the prefix '{0}' is not one or more words of letters, digits, '-', '_' and '.', with '/' \
         between them, {PREFIX_BYTES_MAX} bytes at most"
    )]
    Prefix(String),
    /// Some members with TLS, some without.
    #[error("the URLs are partly http and partly https; members of one cluster are all of a kind")]
    Mixed,
    /// Too many.
    #[error("{0} members are named; {MEMBERS_MAX} is the most")]
    TooMany(usize),
    /// One twice.
    #[error("{0} is named twice")]
    Twice(String),
}

impl MemberAddress {
    fn parse(text: &str) -> Result<Self, AddressError> {
        let (is_tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => return Err(AddressError::Scheme(text.into())),
        };
        let none = || AddressError::Host(text.into());
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(none)?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| none())?;
                (host, port)
            }
            None => rest.find(':').map_or((rest, ""), |at| rest.split_at(at)),
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        if !(1..=HOST_BYTES_MAX).contains(&host.len()) || !host.chars().all(is_name) {
            return Err(none());
        }
        let port = match port.strip_prefix(':') {
            None if port.is_empty() => DEFAULT_PORT,
            Some(digits) if digits.bytes().all(|digit| digit.is_ascii_digit()) => digits
                .parse()
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| AddressError::Port(digits.into()))?,
            other => return Err(AddressError::Port(other.unwrap_or(port).into())),
        };
        Ok(Self { is_tls, host: host.to_owned(), port })
    }

    /// Host and port, as in a URL.
    #[must_use]
    pub fn authority(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    /// Whether the address names this host itself, by number or as `localhost`.
    fn is_loopback(&self) -> bool {
        let number = self.host.parse::<std::net::IpAddr>();
        number.map_or(self.host == "localhost", |address| address.is_loopback())
    }
}

impl fmt::Display for MemberAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.is_tls { "https" } else { "http" }, self.authority())
    }
}

impl Address {
    /// The members, in the order in which they were named.
    #[must_use]
    pub fn members(&self) -> &[MemberAddress] {
        &self.members
    }

    /// What the keys begin with, without a `/` at the end.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Whether the members are spoken to through TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.members.iter().all(|member| member.is_tls)
    }

    /// A member to which everything, and a password, would go in clear over a network.
    #[must_use]
    pub fn in_clear(&self) -> Option<&MemberAddress> {
        self.members.iter().find(|member| !member.is_tls && !member.is_loopback())
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let mut urls: Vec<&str> = text.split(',').collect();
        if urls.len() > MEMBERS_MAX {
            return Err(AddressError::TooMany(urls.len()));
        }
        let past_scheme = |url: &str| url.find("://").map_or(0, |at| at + 3);
        let mut prefix = DEFAULT_PREFIX;
        if let Some(last) = urls.last_mut() {
            let host = past_scheme(last);
            if let Some(at) = last[host..].find('/') {
                prefix = &last[host + at + 1..];
                *last = &last[..host + at];
            }
        }
        let mut members: Vec<MemberAddress> = Vec::new();
        for url in urls {
            if url[past_scheme(url)..].contains('/') {
                return Err(AddressError::PathInside(url.into()));
            }
            let member = MemberAddress::parse(url)?;
            if members.contains(&member) {
                return Err(AddressError::Twice(member.to_string()));
            }
            members.push(member);
        }
        if members.iter().any(|member| member.is_tls != members[0].is_tls) {
            return Err(AddressError::Mixed);
        }
        let is_word = |word: &str| {
            let may = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !word.is_empty() && word.chars().all(may)
        };
        if prefix.len() > PREFIX_BYTES_MAX || !prefix.split('/').all(is_word) {
            return Err(AddressError::Prefix(prefix.into()));
        }
        Ok(Self { members, prefix: prefix.to_owned() })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, member) in self.members.iter().enumerate() {
            write!(f, "{}{member}", if at == 0 { "etcd:" } else { "," })?;
        }
        write!(f, "/{}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_and_a_place_in_it_are_read() {
        for (text, shown) in [
            ("http://127.0.0.1:2379", "etcd:http://127.0.0.1:2379/ftvmm"),
            ("https://a/vm1", "etcd:https://a:2379/vm1"),
            (
                "https://etcd-1.example:2379,https://[fd00::1],https://10.0.0.3:4000/lab/vm-1",
                "etcd:https://etcd-1.example:2379,https://[fd00::1]:2379,\
                 https://10.0.0.3:4000/lab/vm-1",
            ),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), shown);
            let again: Address = shown.strip_prefix("etcd:").unwrap().parse().unwrap();
            assert_eq!(again, address);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        let many = ["http://a"; 10].join(",");
        for (text, says) in [
            ("", "begins with neither"),
            ("10.0.0.1:2379", "begins with neither"),
            ("http://a,ftp://b", "'ftp://b'"),
            ("http://", "names no host"),
            ("http://a,", "begins with neither"),
            ("http://[fd00::1", "names no host"),
            ("http://[a]:5", "names no host"),
            ("http://a b", "names no host"),
            ("http://user:password@a:1", "is no port"),
            ("http://a:", "is no port"),
            ("http://a:0", "is no port"),
            ("http://a:65536", "is no port"),
            ("http://a:+5", "is no port"),
            ("http://a/x,http://b/x", "'http://a/x' is not the last"),
            ("http://a,https://b", "partly"),
            ("http://a,http://a:2379", "named twice"),
            ("http://a/", "prefix ''"),
            ("http://a/x/", "prefix 'x/'"),
            ("http://a/x?y", "prefix 'x?y'"),
            (&many, "10 members"),
            (&format!("http://a/{}", "x".repeat(201)), "prefix"),
        ] {
            let refused = text.parse::<Address>().unwrap_err().to_string();
            assert!(refused.contains(says), "{text}: {refused}");
        }
    }

    #[test]
    fn what_would_cross_a_network_in_clear_is_told() {
        for (text, in_clear) in [
            ("http://127.0.0.1:1,http://[::1]:2,http://localhost:3", false),
            ("http://127.0.0.1:1,http://10.0.0.1:2", true),
            ("https://10.0.0.1:2", false),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().in_clear().is_some(), in_clear, "{text}");
        }
    }
}
