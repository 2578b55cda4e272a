//! Which certificate of a relay is believed.
//!
//! After `net/tlsdial/tlsdial.go` of Tailscale's sources: a map may name another name than the host's, pin one
//! certificate, or have it not looked at in tests.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

use super::certificate::Certificate;
use super::dial::Relay;
use crate::tailnet::client::{TlsError, TlsRoots, client_config_by};
use crate::tailnet::time::Timestamp;

/// What a pinned certificate's hash in hexadecimal digits stands behind.
const PINNED: &str = "sha256-raw:";

/// TLS toward a relay.
pub(super) fn client_config(
    roots: &TlsRoots,
    relay: &Relay,
) -> Result<Arc<ClientConfig>, TlsError> {
    let rule = match relay.cert_name.strip_prefix(PINNED) {
        Some(hash) => Rule::Pinned(hash.to_ascii_lowercase()),
        None if relay.insecure => Rule::Any,
        None if relay.cert_name.is_empty() || relay.cert_name == relay.host => {
            return roots.client_config();
        }
        None => {
            let name = ServerName::try_from(relay.cert_name.clone());
            let name = name.map_err(|error| TlsError::Setup(Error::General(error.to_string())))?;
            Rule::Named(name, roots.verifier()?)
        }
    };
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    client_config_by(Arc::new(Trust { rule, algorithms }))
}

#[derive(Debug)]
enum Rule {
    /// The certificate with this hash.
    Pinned(String),
    /// One for this name.
    Named(ServerName<'static>, Arc<WebPkiServerVerifier>),
    /// Any at all.
    Any,
}

#[derive(Debug)]
struct Trust {
    rule: Rule,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Whether the certificates are the one with this hash, for this host and now, beside one that tells the relay's key.
/// That one may not come first: the first is whose key the other end has shown to have.
fn pinned(
    hash: &str,
    certificates: &[&CertificateDer<'_>],
    host: &ServerName<'_>,
    now: UnixTime,
) -> Result<(), Error> {
    let wrong = |error| Err(Error::InvalidCertificate(error));
    let mut found = false;
    for (at, der) in certificates.iter().enumerate() {
        let Some(certificate) = Certificate::parse(der) else {
            return wrong(CertificateError::BadEncoding);
        };
        if at > 0 && certificate.is_meta() {
            continue;
        }
        let digest = ring::digest::digest(&ring::digest::SHA256, der);
        let digits: String = digest
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        if found || digits != hash {
            return Err(Error::General(format!(
                "the relay's certificate has the hash {digits}, and the map pins another"
            )));
        }
        // Who asks an address does not say for which name.
        if let ServerName::DnsName(_) = host {
            verify_server_name(&ParsedCertificate::try_from(*der)?, host)?;
        }
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let now = Timestamp(now.saturating_mul(1_000_000));
        if now < certificate.valid.0 {
            return wrong(CertificateError::NotValidYet);
        }
        if now > certificate.valid.1 {
            return wrong(CertificateError::Expired);
        }
        found = true;
    }
    match found {
        true => Ok(()),
        false => wrong(CertificateError::UnknownIssuer),
    }
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.rule {
            Rule::Named(name, verifier) => {
                verifier.verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
            }
            Rule::Pinned(hash) => {
                let all: Vec<_> = std::iter::once(end_entity).chain(intermediates).collect();
                pinned(hash, &all, server_name, now)?;
                Ok(ServerCertVerified::assertion())
            }
            Rule::Any => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls::pki_types::pem::PemObject as _;

    use super::*;

    #[test]
    fn one_certificate_is_pinned() {
        let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let plain = der(include_str!("certificate/plain.pem"));
        let meta = der(include_str!("certificate/meta.pem"));
        let digest = ring::digest::digest(&ring::digest::SHA256, &plain);
        let hash: String = digest
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let at = |text: &str| {
            let micros = Timestamp::parse(text).unwrap().0;
            UnixTime::since_unix_epoch(Duration::from_micros(micros.try_into().unwrap()))
        };
        let now = at("2030-01-01T00:00:00Z");
        let host = |text: &str| ServerName::try_from(text.to_owned()).unwrap();
        let address = host("192.0.2.1");
        let judge = |certificates: &[&CertificateDer<'_>], host: &ServerName<'_>, now| {
            pinned(&hash, certificates, host, now).is_ok()
        };
        assert!(judge(&[&plain], &address, now));
        assert!(judge(&[&plain, &meta], &address, now));
        assert!(!judge(&[&meta], &address, now));
        assert!(
            !judge(&[&meta, &plain], &address, now),
            "the key of the first one counts"
        );
        assert!(
            !judge(&[&plain, &plain], &address, now),
            "one, and no other"
        );
        assert!(!judge(&[&plain], &host("relay.example"), now));
        assert!(!judge(&[&plain], &address, at("2025-01-01T00:00:00Z")));
        assert!(!judge(&[&plain], &address, at("2061-01-01T00:00:00Z")));
        assert!(pinned(&"0".repeat(64), &[&plain], &address, now).is_err());
        assert!(!judge(
            &[&CertificateDer::from(vec![0x30, 0])],
            &address,
            now
        ));
    }
}
