//! TLS toward coordination servers and relays.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No PEM, or none with a certificate.
    #[error("the file of CA certificates holds none in PEM")]
    NoCertificates,
    /// Not usable as a root.
    #[error("a CA certificate cannot be used: {0}")]
    Certificate(rustls::Error),
    /// The library refuses its own defaults.
    #[error("TLS cannot be set up: {0}")]
    Setup(rustls::Error),
}

/// Who is believed.
#[derive(Clone, Debug)]
pub struct TlsRoots(Arc<RootCertStore>);

impl TlsRoots {
    /// The roots of browsers and, if there are any, the CA certificates in `pem`.
    pub fn new(pem: Option<&[u8]>) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        if let Some(pem) = pem {
            let before = roots.len();
            for certificate in CertificateDer::pem_slice_iter(pem) {
                let certificate = certificate.map_err(|_| TlsError::NoCertificates)?;
                roots.add(certificate).map_err(TlsError::Certificate)?;
            }
            if roots.len() == before {
                return Err(TlsError::NoCertificates);
            }
        }
        Ok(Self(Arc::new(roots)))
    }

    /// TLS that believes them.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let config = builder()?.with_root_certificates(self.0.clone());
        Ok(Arc::new(config.with_no_client_auth()))
    }

    /// What judges a certificate by them.
    pub(in crate::tailnet) fn verifier(&self) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        WebPkiServerVerifier::builder_with_provider(self.0.clone(), provider)
            .build()
            .map_err(|error| TlsError::Setup(rustls::Error::General(error.to_string())))
    }
}

/// TLS that believes whom `verifier` does.
pub(in crate::tailnet) fn client_config_by(
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let config = builder()?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    Ok(Arc::new(config.with_no_client_auth()))
}

fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)
}

/// TLS that believes the roots of browsers and, if there are any, the CA certificates in `pem`.
pub fn client_config(pem: Option<&[u8]>) -> Result<Arc<ClientConfig>, TlsError> {
    TlsRoots::new(pem)?.client_config()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots() {
        assert!(client_config(None).is_ok());
        for pem in [
            "",
            "nonsense",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            assert!(client_config(Some(pem.as_bytes())).is_err(), "{pem}");
        }
    }
}
