//! What is to be known of a relay's certificates that TLS does not tell: whose they are and for how long.

use crate::tailnet::keys::NodePublic;
use crate::tailnet::time::Timestamp;

const INTEGER: u8 = 0x02;
const OBJECT: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERAL_TIME: u8 = 0x18;
/// 2.5.4.3.
const COMMON_NAME: [u8; 3] = [0x55, 4, 3];
/// What the common name of a certificate that tells the relay's key begins with.
const META: &str = "derpkey";

/// A certificate, as far as is asked.
#[derive(Debug, PartialEq, Eq)]
pub struct Certificate<'a> {
    serial: &'a [u8],
    /// Not before, not after.
    pub valid: (Timestamp, Timestamp),
    common_name: Option<&'a str>,
}

impl<'a> Certificate<'a> {
    /// Reads DER (RFC 5280 section 4.1). `None` for what is no certificate.
    pub fn parse(der: &'a [u8]) -> Option<Self> {
        let mut outer = expect(&mut &der[..], SEQUENCE)?;
        let mut body = expect(&mut outer, SEQUENCE)?;
        if body.first() == Some(&VERSION) {
            expect(&mut body, VERSION)?;
        }
        let serial = expect(&mut body, INTEGER)?;
        expect(&mut body, SEQUENCE)?;
        expect(&mut body, SEQUENCE)?;
        let mut validity = expect(&mut body, SEQUENCE)?;
        let valid = (time(&mut validity)?, time(&mut validity)?);
        let mut subject = expect(&mut body, SEQUENCE)?;
        let mut common_name = None;
        while !subject.is_empty() {
            let mut set = expect(&mut subject, SET)?;
            while !set.is_empty() {
                let mut attribute = expect(&mut set, SEQUENCE)?;
                if expect(&mut attribute, OBJECT)? == COMMON_NAME {
                    let (_, text) = element(&mut attribute)?;
                    common_name = std::str::from_utf8(text).ok();
                }
            }
        }
        Some(Self {
            serial,
            valid,
            common_name,
        })
    }

    /// Whether it is there to tell the relay's key.
    pub fn is_meta(&self) -> bool {
        self.common_name.is_some_and(|name| name.starts_with(META))
    }

    /// The relay's key that it tells: its number is the protocol's version then.
    pub fn relay(&self) -> Option<NodePublic> {
        let digits = self.common_name?.strip_prefix(META)?;
        // A leading zero only keeps the number from being negative.
        let version = self.serial.strip_prefix(&[0]).unwrap_or(self.serial);
        match version {
            [version] if *version != 0 => format!("nodekey:{digits}").parse().ok(),
            _ => None,
        }
    }
}

/// The next element: its tag and what is in it.
fn element<'a>(input: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let [tag, first, rest @ ..] = *input else {
        return None;
    };
    let (length, rest) = match *first {
        short @ 0..=0x7f => (usize::from(short), rest),
        // Four bytes of length are enough for every certificate.
        long @ 0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(long & 0x7f))?;
            let length = bytes
                .iter()
                .fold(0usize, |sum, byte| sum << 8 | usize::from(*byte));
            (length, rest)
        }
        _ => return None,
    };
    let (body, rest) = rest.split_at_checked(length)?;
    *input = rest;
    Some((*tag, body))
}

fn expect<'a>(input: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    let (found, body) = element(input)?;
    (found == tag).then_some(body)
}

/// A time as certificates have it: `YYMMDDhhmmssZ` from 1950 to 2049, or `YYYYMMDDhhmmssZ`.
fn time(input: &mut &[u8]) -> Option<Timestamp> {
    let (tag, text) = element(input)?;
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let (century, text) = match tag {
        UTC_TIME if text.get(..2)? >= "50" => ("19", text),
        UTC_TIME => ("20", text),
        GENERAL_TIME => text.split_at_checked(2)?,
        _ => return None,
    };
    if text.len() != 12 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let part = |at: usize| text.get(at..at + 2).unwrap_or_default();
    Timestamp::parse(&format!(
        "{century}{}-{}-{}T{}:{}:{}Z",
        part(0),
        part(2),
        part(4),
        part(6),
        part(8),
        part(10)
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;

    use super::*;

    /// As derper makes it: number 2, Ed25519, `CN=derpkey…`.
    const META_CERT: &str = include_str!("certificate/meta.pem");
    /// As it is for a relay with an address and no name: P-256, a long number.
    const PLAIN_CERT: &str = include_str!("certificate/plain.pem");

    fn der(pem: &str) -> Vec<u8> {
        CertificateDer::from_pem_slice(pem.as_bytes())
            .unwrap()
            .to_vec()
    }

    #[test]
    fn the_relays_key_is_told() {
        let der = der(META_CERT);
        let certificate = Certificate::parse(&der).unwrap();
        assert!(certificate.is_meta());
        let key = certificate.relay().unwrap();
        assert_eq!(key.as_bytes(), &[0xab; 32]);
        let (from, until) = certificate.valid;
        assert_eq!(from.to_string(), "2026-01-02T03:04:05Z");
        assert_eq!(until.to_string(), "2036-01-02T03:04:05Z");
    }

    #[test]
    fn other_certificates_tell_none() {
        let der = der(PLAIN_CERT);
        let certificate = Certificate::parse(&der).unwrap();
        assert!(!certificate.is_meta());
        assert_eq!(certificate.relay(), None);
        assert_eq!(certificate.common_name, Some("192.0.2.1"));
        assert_eq!(certificate.valid.1.to_string(), "2060-01-02T03:04:05Z");
        for (serial, name) in [
            (&[0][..], format!("derpkey{}", "ab".repeat(32))),
            (&[1, 0], format!("derpkey{}", "ab".repeat(32))),
            (&[2], format!("derpkey{}", "ab".repeat(31))),
            (&[2], format!("derpkey{}", "00".repeat(32))),
            (&[2], "ab".repeat(32)),
        ] {
            let certificate = Certificate {
                serial,
                common_name: Some(&name),
                ..Certificate::parse(&der).unwrap()
            };
            assert_eq!(certificate.relay(), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            flips in proptest::collection::vec((0usize..400, any::<u8>()), 0..8),
        ) {
            let _ = Certificate::parse(&bytes);
            let mut changed = der(META_CERT);
            for (at, byte) in flips {
                let at = at % changed.len();
                changed[at] = byte;
            }
            if let Some(certificate) = Certificate::parse(&changed) {
                let _ = certificate.relay();
            }
        }
    }
}
