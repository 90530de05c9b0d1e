//! Who may be the other host, and how it proves that it is (decision 0032).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    AlwaysResolvesClientRawPublicKeys, Resumption, verify_server_cert_signed_by_trust_anchor,
};
use rustls::crypto::{CryptoProvider, verify_tls13_signature, verify_tls13_signature_with_raw_key};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer,
    UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as TlsError,
    RootCertStore, ServerConfig, SignatureScheme, version,
};
use thiserror::Error;

use super::key_file::{self, KEY_BYTES, KeyFileError};
use crate::user_file::{self, FileError};

/// PKCS#8 of an Ed25519 private key (RFC 8410 section 7); the key's 32 bytes follow.
const PKCS8_HEAD: [u8; 16] =
    [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// Bytes of a file with certificates or a key.
const PEM_BYTES_MAX: u64 = 1 << 20;
const PEM_LIMIT: &str = "no certificate or key is so long";

/// What the other host has to prove.
#[derive(Clone, Debug, Default)]
pub struct Security {
    tls: Option<Tls>,
    open_anywhere: bool,
}

/// Both ends of TLS: either host may be the one that is connected to.
#[derive(Clone, Debug)]
pub(super) struct Tls {
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
}

/// Why a channel cannot be secured.
#[derive(Debug, Error)]
pub enum SecurityError {
    /// The key file.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// A file with certificates or their key.
    #[error(transparent)]
    File(#[from] FileError),
    /// It holds something else.
    #[error("{what} '{path}' holds no {wanted} in PEM: {cause}", path = path.display())]
    Pem {
        /// The option.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wanted.
        wanted: &'static str,
        /// The cause.
        cause: rustls::pki_types::pem::Error,
    },
    /// Certificates and key that TLS does not take.
    #[error("{what} '{path}' cannot be used: {cause}", path = path.display())]
    Unusable {
        /// The option.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: String,
    },
    /// The key cannot be used.
    #[error("the channel key cannot be used: {0}")]
    Tls(#[from] TlsError),
}

impl Security {
    /// No proof: on a loopback address, or with `anywhere` on every one.
    pub fn open(anywhere: bool) -> Self {
        Self { tls: None, open_anywhere: anywhere }
    }

    /// Proof that the other host has the same key file.
    ///
    /// # Errors
    /// When the file is none, or others may read it.
    pub fn shared_key(path: &Path) -> Result<Self, SecurityError> {
        let tls = Tls::shared_key(&key_file::read(path)?)?;
        Ok(Self { tls: Some(tls), open_anywhere: false })
    }

    /// Proof by certificates: own chain and key, and the authority that has signed the other's.
    ///
    /// # Errors
    /// When a file cannot be used.
    pub fn certificates(cert: &Path, key: &Path, ca: &Path) -> Result<Self, SecurityError> {
        let tls = Tls::certificates(cert, key, ca)?;
        Ok(Self { tls: Some(tls), open_anywhere: false })
    }

    /// Whether the other host has to prove who it is.
    pub fn is_proved(&self) -> bool {
        self.tls.is_some()
    }

    pub(super) fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// Whether a channel may use this address.
    pub fn allows(&self, address: SocketAddr) -> bool {
        self.tls.is_some() || self.open_anywhere || address.ip().to_canonical().is_loopback()
    }
}

impl Tls {
    /// Both sides show the same raw public key (RFC 7250) and accept no other.
    fn shared_key(secret: &[u8; KEY_BYTES]) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivatePkcs8KeyDer::from([&PKCS8_HEAD[..], secret].concat());
        let key = provider.key_provider.load_private_key(key.into())?;
        let public = key.public_key().ok_or(TlsError::General("no public key".into()))?;
        let public = CertificateDer::from(public.to_vec());
        let own = Arc::new(CertifiedKey::new(vec![public.clone()], key));
        let only = Arc::new(OnlyKey { public, provider: provider.clone() });
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(only.clone())
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
                own.clone(),
            )));
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])?
            .with_client_cert_verifier(only)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(own)));
        // It tells the client that its proof was accepted (RFC 8446 section 4.6.1).
        server.send_tls13_tickets = 1;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    fn certificates(cert: &Path, key: &Path, ca: &Path) -> Result<Self, SecurityError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = read_certificates("--tls-cert", cert)?;
        let key_text = user_file::read_secret("--tls-key", key, PEM_BYTES_MAX, PEM_LIMIT)?;
        let own_key = PrivateKeyDer::from_pem_slice(&key_text).map_err(|cause| {
            SecurityError::Pem { what: "--tls-key", path: key.into(), wanted: "private key", cause }
        })?;
        let unusable = |what, path: &Path, cause: String| SecurityError::Unusable {
            what,
            path: path.into(),
            cause,
        };
        let mut roots = RootCertStore::empty();
        for root in read_certificates("--tls-ca", ca)? {
            roots.add(root).map_err(|e| unusable("--tls-ca", ca, e.to_string()))?;
        }
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| unusable("--tls-ca", ca, e.to_string()))?;
        let servers = Arc::new(AnyOfAuthority { roots, provider: provider.clone() });
        let unfit = |e: TlsError| unusable("--tls-cert", cert, e.to_string());
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(servers)
            .with_client_auth_cert(chain.clone(), own_key.clone_key())
            .map_err(unfit)?;
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, own_key)
            .map_err(unfit)?;
        server.send_tls13_tickets = 1;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

fn read_certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, SecurityError> {
    let no = |cause| SecurityError::Pem { what, path: path.into(), wanted: "certificate", cause };
    let text = user_file::read(what, path, PEM_BYTES_MAX, PEM_LIMIT)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(no)?;
    match found.is_empty() {
        true => Err(no(rustls::pki_types::pem::Error::NoItemsFound)),
        false => Ok(found),
    }
}

/// Accepts one raw public key.
#[derive(Debug)]
struct OnlyKey {
    public: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl OnlyKey {
    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), TlsError> {
        match *shown == self.public {
            true => Ok(()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn signed(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &key, dss, known)
    }
}

/// Accepts every certificate of the authority, whatever name it bears: a guest's hosts may change
/// their addresses, and nobody else has a certificate of an authority that is for them alone.
#[derive(Debug)]
struct AnyOfAuthority {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

/// TLS 1.2 is never spoken.
fn no_tls12() -> Result<HandshakeSignatureValid, TlsError> {
    Err(TlsError::General("TLS 1.2 is not spoken".into()))
}

/// What rustls asks both of a server's verifier and of a client's.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, TlsError> {
            no_tls12()
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, TlsError> {
            self.signed(message, cert, dss)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for OnlyKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    signatures!();
}

impl ClientCertVerifier for OnlyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    signatures!();
}

impl ServerCertVerifier for AnyOfAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let known = self.provider.signature_verification_algorithms.all;
        let cert = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&cert, &self.roots, intermediates, now, known)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
