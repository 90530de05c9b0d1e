//! `--witness` and the options beside it: which witness, and how this host shows there who it is.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use ftvmm_etcd::{Address, Credentials, EtcdWitness, User};
use ftvmm_host::FileWitness;
use ftvmm_host::user_file::{self, FileError};
use ftvmm_replication::witness::{Holder, WitnessStore};

use super::CommandError;

/// Longest file of certificates, in bytes.
const CERTIFICATES_BYTES_MAX: u64 = 1 << 20;
/// Longest file of a user's name and password, in bytes.
const USER_BYTES_MAX: u64 = 4096;

/// `file:PATH` or `etcd:URL[,URL…][/PREFIX]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WitnessArg {
    /// Files on storage that both hosts share.
    File(PathBuf),
    /// Keys in a cluster of etcd servers.
    Etcd(Address),
}

impl WitnessArg {
    /// The path of the files, for a witness in files.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Etcd(_) => None,
        }
    }
}

impl FromStr for WitnessArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("etcd", address)) => {
                let address: Address = address
                    .parse()
                    .map_err(|e| format!("{e}; an etcd witness is etcd:URL[,URL...][/PREFIX]"))?;
                Ok(Self::Etcd(address))
            }
            Some(("kubernetes" | "k8s" | "lease", _)) => {
                Err("a Lease of Kubernetes is no witness: its holder must renew it in time, and \
                 nothing stops a holder that was paused; use file:PATH or etcd:URL"
                    .into())
            }
            _ => Err(format!("'{text}' is neither file:PATH nor etcd:URL[,URL...][/PREFIX]")),
        }
    }
}

/// How this host and etcd find out who the other is.
#[derive(Args, Clone, Debug, Default)]
pub struct WitnessOptions {
    /// Certificates (PEM) of those who sign the etcd members' certificates; https needs it
    #[arg(long, value_name = "FILE", requires = "witness")]
    pub witness_ca: Option<PathBuf>,
    /// This host's certificate (PEM) for etcd
    #[arg(long, value_name = "FILE", requires = "witness_key")]
    pub witness_cert: Option<PathBuf>,
    /// The key (PEM) of that certificate; others may not read the file
    #[arg(long, value_name = "FILE", requires = "witness_cert")]
    pub witness_key: Option<PathBuf>,
    /// A file with the line NAME:PASSWORD of this host's user at etcd; others may not read it
    #[arg(long, value_name = "FILE", requires = "witness")]
    pub witness_user_file: Option<PathBuf>,
    /// Speak to etcd in clear over a network: whoever is on the way decides which host is active
    #[arg(long, requires = "witness")]
    pub insecure_witness: bool,
}

impl WitnessOptions {
    /// An option that was given and does nothing with this witness, and why.
    #[must_use]
    pub fn vain(&self, witness: Option<&WitnessArg>) -> Option<(&'static str, &'static str)> {
        let of_tls = [
            ("witness_ca", self.witness_ca.is_some()),
            ("witness_cert", self.witness_cert.is_some()),
        ];
        let given = |options: &[(&'static str, bool)]| {
            options.iter().find(|(_, given)| *given).map(|(option, _)| *option)
        };
        match witness? {
            WitnessArg::Etcd(address) if address.is_tls() => self
                .insecure_witness
                .then_some(("insecure_witness", "with https: nothing is in clear")),
            WitnessArg::Etcd(_) => {
                given(&of_tls).map(|option| (option, "without https:// in --witness"))
            }
            WitnessArg::File(_) => {
                let others = [
                    ("witness_user_file", self.witness_user_file.is_some()),
                    ("insecure_witness", self.insecure_witness),
                ];
                let option = given(&of_tls).or_else(|| given(&others))?;
                Some((option, "with --witness file:PATH; it is for etcd"))
            }
        }
    }

    fn credentials(&self, address: &Address) -> Result<Credentials, CommandError> {
        let refused = |message: String| Err(CommandError::Configuration(message));
        if address.is_tls() && self.witness_ca.is_none() {
            return refused(format!(
                "{address} needs --witness-ca FILE: the certificate of whoever signed the members'"
            ));
        }
        if let Some(member) = address.in_clear().filter(|_| !self.insecure_witness) {
            return refused(format!(
                "{member} would be spoken to in clear, and whoever is on the way would decide \
                 which host is active: use https:// with --witness-ca, or say --insecure-witness"
            ));
        }
        let holds = |option, path: &PathBuf, content: Vec<u8>, holds: &str| {
            let text = String::from_utf8_lossy(&content);
            let is_there =
                text.lines().any(|line| line.starts_with("-----BEGIN ") && line.contains(holds));
            match is_there {
                true => Ok(content),
                false => Err(CommandError::Configuration(format!(
                    "{option} {}: it holds no \"-----BEGIN … {holds}-----\" (PEM)",
                    path.display()
                ))),
            }
        };
        let certificates = |option, path: &PathBuf| {
            let limit = most(CERTIFICATES_BYTES_MAX);
            let content = user_file::read(option, path, CERTIFICATES_BYTES_MAX, &limit);
            holds(option, path, content?, "CERTIFICATE")
        };
        let ca = self.witness_ca.as_ref().map(|path| certificates("--witness-ca", path));
        let own = self.witness_cert.as_ref().zip(self.witness_key.as_ref());
        let own = own.map(|(cert, key)| {
            let option = "--witness-key";
            let secret = secret(option, key, CERTIFICATES_BYTES_MAX)?;
            let cert = certificates("--witness-cert", cert)?;
            Ok::<_, CommandError>((cert, holds(option, key, secret, "PRIVATE KEY")?))
        });
        let user = self.witness_user_file.as_ref().map(|path| {
            let option = "--witness-user-file";
            let line = secret(option, path, USER_BYTES_MAX)?;
            User::from_text(&String::from_utf8_lossy(&line)).map_err(|error| {
                CommandError::Configuration(format!("{option} {}: {error}", path.display()))
            })
        });
        Ok(Credentials { ca: ca.transpose()?, own: own.transpose()?, user: user.transpose()? })
    }
}

fn most(bytes: u64) -> String {
    format!("{bytes} bytes are the most")
}

/// A file that not every user of this machine may read.
fn secret(option: &'static str, path: &Path, most_bytes: u64) -> Result<Vec<u8>, FileError> {
    user_file::read_secret(option, path, most_bytes, &most(most_bytes))
}

/// Opens the witness, for the process `holder`.
///
/// # Errors
/// When an option is wrong, or no member of etcd answers.
pub fn open(
    witness: &WitnessArg,
    options: &WitnessOptions,
    holder: &Holder,
) -> Result<Box<dyn WitnessStore + Send>, CommandError> {
    match witness {
        WitnessArg::File(path) => Ok(Box::new(FileWitness::new(path.clone(), holder.as_str()))),
        WitnessArg::Etcd(address) => {
            let credentials = options.credentials(address)?;
            if let Some(member) = address.in_clear() {
                tracing::warn!(%member, "the witness is spoken to in clear");
            }
            let store = EtcdWitness::open(address.clone(), &credentials)
                .map_err(|error| CommandError::Configuration(error.to_string()))?;
            for reason in store.silent_members() {
                tracing::warn!(reason, "a member of the witness does not answer");
            }
            Ok(Box::new(store))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::super::args::tests::run_args;
    use super::*;

    const PAIR: &str = "--kernel k --role primary --listen 1.2.3.4:5 --witness";

    fn refused(line: &str) -> String {
        let args = run_args(&format!("{PAIR} {line}"));
        let holder = Holder::from_text("here").unwrap();
        let witness = args.witness.as_ref().unwrap();
        let error = open(witness, &args.witness_options, &holder).err().expect(line);
        assert_eq!(error.status(), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn a_witness_is_read_or_refused_with_what_would_be_right() {
        assert_eq!("file:/w".parse(), Ok(WitnessArg::File("/w".into())));
        let etcd: WitnessArg = "etcd:https://a,https://b/vm".parse().unwrap();
        assert!(matches!(etcd, WitnessArg::Etcd(address) if address.members().len() == 2));
        for (text, says) in [
            ("/w", "neither file:PATH nor etcd:URL"),
            ("file:", "neither file:PATH nor etcd:URL"),
            ("etcd:10.0.0.1:2379", "etcd:URL[,URL...][/PREFIX]"),
            ("kubernetes:ns/lease", "Lease of Kubernetes is no witness"),
        ] {
            let refused = text.parse::<WitnessArg>().unwrap_err();
            assert!(refused.contains(says), "{refused}");
        }
    }

    #[test]
    fn what_is_in_clear_or_not_checked_is_refused_before_anything_is_sent() {
        let refused_clear = refused("etcd:http://192.0.2.1/vm");
        assert!(refused_clear.contains("--insecure-witness"), "{refused_clear}");
        let unchecked = refused("etcd:https://192.0.2.1/vm");
        assert!(unchecked.contains("needs --witness-ca FILE"), "{unchecked}");
    }

    #[test]
    fn a_file_that_is_none_of_its_kind_or_is_no_secret_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str, mode| {
            let path = folder.path().join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path.display().to_string()
        };
        let (cert, key) = ("-----BEGIN CERTIFICATE-----\n", "-----BEGIN PRIVATE KEY-----\n");
        let (ca, empty) = (file("ca", cert, 0o644), file("empty", "", 0o600));
        let (secret, open) = (file("secret", key, 0o600), file("open", key, 0o644));
        let (user, no_user) = (file("user", "a:b", 0o644), file("no-user", "ab", 0o600));
        let https = "etcd:https://127.0.0.1:9/vm --witness-ca";
        for (line, says) in [
            (format!("{https} {empty}"), format!("--witness-ca {empty}: it holds no")),
            (format!("{https} /nowhere/ca"), "/nowhere/ca".to_owned()),
            (
                format!("{https} {ca} --witness-cert {ca} --witness-key {open}"),
                format!("chmod o= '{open}'"),
            ),
            (
                format!("{https} {ca} --witness-cert {empty} --witness-key {secret}"),
                format!("--witness-cert {empty}"),
            ),
            (
                format!("{https} {ca} --witness-cert {ca} --witness-key {empty}"),
                "PRIVATE KEY".to_owned(),
            ),
            (format!("{https} {ca} --witness-user-file {user}"), format!("chmod o= '{user}'")),
            (format!("{https} {ca} --witness-user-file {no_user}"), "NAME:PASSWORD".to_owned()),
        ] {
            let refused = refused(&line);
            assert!(refused.contains(&says), "{line}: {refused}");
        }
    }

    #[test]
    fn a_cluster_that_is_not_there_ends_the_start_with_each_members_reason() {
        let refused = refused("etcd:http://127.0.0.1:9,http://127.0.0.1:10/vm");
        assert_eq!(refused.matches("Connection refused").count(), 2, "{refused}");
        assert!(refused.contains("start etcd there"), "{refused}");
    }
}
