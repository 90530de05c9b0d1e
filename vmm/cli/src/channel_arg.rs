//! How the two hosts of a pair prove to each other who they are.

use std::path::PathBuf;

use clap::Args;
use ftvmm_host::channel::{Security, SecurityError};

/// Options of the channel.
#[derive(Clone, Debug, Default, Args)]
pub struct ChannelArgs {
    /// Key file that both hosts have, made by 'ftvmm keygen': the channel is encrypted, and no
    /// other host gets in
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tls_cert", "insecure_channel"])]
    pub channel_key: Option<PathBuf>,
    /// This host's certificate chain in PEM, signed by --tls-ca; its names are not compared
    #[arg(
        long,
        value_name = "FILE",
        requires_all = ["tls_key", "tls_ca"],
        conflicts_with = "insecure_channel",
    )]
    pub tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Certificates in PEM of the authority for the hosts of this guest alone: whoever has a
    /// certificate of it gets in
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_ca: Option<PathBuf>,
    /// Let the channel be open to everybody who reaches it, in clear
    #[arg(long)]
    pub insecure_channel: bool,
}

impl ChannelArgs {
    /// What the other host has to prove.
    ///
    /// # Errors
    /// When a file cannot be used.
    pub fn security(&self) -> Result<Security, SecurityError> {
        match (&self.channel_key, &self.tls_cert, &self.tls_key, &self.tls_ca) {
            (Some(key), ..) => Security::shared_key(key),
            (None, Some(cert), Some(key), Some(ca)) => Security::certificates(cert, key, ca),
            _ => Ok(Security::open(self.insecure_channel)),
        }
    }
}
