//! TLS toward coordination servers and relays.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

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

/// TLS that believes the roots of browsers and, if there are any, the CA certificates in `pem`.
pub fn client_config(pem: Option<&[u8]>) -> Result<Arc<ClientConfig>, TlsError> {
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
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
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
