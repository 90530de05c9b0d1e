//! Someone who signs certificates for the hosts of a lab.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use libtest_mimic::Failed;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// An authority.
pub struct Authority {
    name: &'static str,
    issuer: Issuer<'static, KeyPair>,
}

/// Names of files in the shared directory.
pub struct Signed {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

impl Authority {
    /// A new one; its own certificate is in the shared directory as [`Self::file`].
    pub fn new(share: &Path, name: &'static str) -> Result<Self, Failed> {
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate()?;
        let own = params.self_signed(&key)?.pem();
        let this = Self { name, issuer: Issuer::new(params, key) };
        fs::write(share.join(this.file()), own)?;
        Ok(this)
    }

    /// Name of its certificate in the shared directory.
    pub fn file(&self) -> String {
        format!("{}-ca.pem", self.name)
    }

    /// A certificate for a name or an address, and its key, which only its owner may read.
    pub fn sign(&self, share: &Path, name: &str) -> Result<Signed, Failed> {
        let params = CertificateParams::new([name.to_owned()])?;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let [cert_file, key_file] =
            ["cert", "key"].map(|kind| format!("{}-{name}-{kind}.pem", self.name));
        fs::write(share.join(&cert_file), certificate.pem())?;
        fs::write(share.join(&key_file), key.serialize_pem())?;
        fs::set_permissions(share.join(&key_file), fs::Permissions::from_mode(0o600))?;
        Ok(Signed { certificate: cert_file, key: key_file })
    }
}
