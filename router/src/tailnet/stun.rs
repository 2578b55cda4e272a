//! STUN (RFC 8489) as far as it tells a node its address: binding requests and their responses.

use std::net::{IpAddr, SocketAddr};

const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const REQUEST: [u8; 2] = [0, 1];
const SUCCESS: [u8; 2] = [1, 1];
const HEADER: usize = 20;

const MAPPED_ADDRESS: u16 = 0x0001;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;
/// What some servers send in its place.
const XOR_MAPPED_ADDRESS_ALT: u16 = 0x8020;
const SOFTWARE: u16 = 0x8022;
const FINGERPRINT: u16 = 0x8028;

/// Tailscale's relays answer only requests that name this software and end in a fingerprint.
const NAME: &[u8; 8] = b"tailnode";

/// Ties a response to its request; from a good random source.
pub type Transaction = [u8; 12];

/// Whether a datagram is STUN: neither WireGuard nor disco looks so.
pub fn is_stun(datagram: &[u8]) -> bool {
    datagram.len() >= HEADER && datagram[0] & 0xc0 == 0 && datagram[4..8] == COOKIE
}

/// A binding request.
pub fn request(transaction: &Transaction) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + 20);
    out.extend(REQUEST);
    out.extend(20_u16.to_be_bytes());
    out.extend(COOKIE);
    out.extend(transaction);
    out.extend(SOFTWARE.to_be_bytes());
    out.extend((NAME.len() as u16).to_be_bytes());
    out.extend(NAME);
    // The checksum covers a header that counts the fingerprint already.
    let fingerprint = crc32(&out) ^ 0x5354_554e;
    out.extend(FINGERPRINT.to_be_bytes());
    out.extend(4_u16.to_be_bytes());
    out.extend(fingerprint.to_be_bytes());
    out
}

/// Which request a response answers, and from where that came. `None` for everything else.
pub fn response(datagram: &[u8]) -> Option<(Transaction, SocketAddr)> {
    if !is_stun(datagram) || datagram[..2] != SUCCESS {
        return None;
    }
    let transaction: Transaction = datagram[8..HEADER].try_into().ok()?;
    let length = usize::from(u16::from_be_bytes([datagram[2], datagram[3]]));
    let mut rest = datagram[HEADER..].get(..length)?;
    let (mut xored, mut plain) = (None, None);
    while !rest.is_empty() {
        let (head, body) = rest.split_first_chunk::<4>()?;
        let kind = u16::from_be_bytes([head[0], head[1]]);
        let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
        let value = body.get(..length)?;
        rest = body.get(length.next_multiple_of(4)..)?;
        match kind {
            XOR_MAPPED_ADDRESS | XOR_MAPPED_ADDRESS_ALT => {
                let mut mask = [0; 16];
                mask[..4].copy_from_slice(&COOKIE);
                mask[4..].copy_from_slice(&transaction);
                xored = Some(address(value, mask)?);
            }
            MAPPED_ADDRESS => plain = Some(address(value, [0; 16])?),
            _ => {}
        }
    }
    Some((transaction, xored.or(plain)?))
}

/// Reads an address over which `mask` lies, the port under its first two bytes.
fn address(value: &[u8], mask: [u8; 16]) -> Option<SocketAddr> {
    let (head, address) = value.split_first_chunk::<4>()?;
    let port = u16::from_be_bytes([head[2] ^ mask[0], head[3] ^ mask[1]]);
    let ip: IpAddr = match head[1] {
        1 => {
            let bytes = *address.first_chunk::<4>()?;
            std::array::from_fn::<u8, 4, _>(|at| bytes[at] ^ mask[at]).into()
        }
        2 => {
            let bytes = *address.first_chunk::<16>()?;
            std::array::from_fn::<u8, 16, _>(|at| bytes[at] ^ mask[at]).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

/// CRC-32 of ITU-T V.42.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 5769 section 2.2: a response with software, XOR-mapped address, integrity and fingerprint.
    const SAMPLE: &[u8] = b"\x01\x01\x00\x3c\x21\x12\xa4\x42\
        \xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae\
        \x80\x22\x00\x0b\x74\x65\x73\x74\x20\x76\x65\x63\x74\x6f\x72\x20\
        \x00\x20\x00\x08\x00\x01\xa1\x47\xe1\x12\xa6\x43\
        \x00\x08\x00\x14\x2b\x91\xf5\x99\xfd\x9e\x90\xc3\x8c\x74\x89\xf9\x2a\xf9\xba\x53\xf0\x6b\xe7\xd7\
        \x80\x28\x00\x04\xc0\x7d\x4c\x96";

    #[test]
    fn a_published_response() {
        let (transaction, address) = response(SAMPLE).unwrap();
        assert_eq!(transaction[..4], [0xb7, 0xe7, 0xa7, 0x01]);
        assert_eq!(address, "192.0.2.1:32853".parse().unwrap());
    }

    #[test]
    fn a_published_checksum() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        // The fingerprint of the sample covers all before it.
        assert_eq!(
            crc32(&SAMPLE[..SAMPLE.len() - 8]) ^ 0x5354_554e,
            0xc07d_4c96
        );
    }

    #[test]
    fn ipv6_and_the_plain_form() {
        // RFC 5769 section 2.3.
        let mut sample = b"\x01\x01\x00\x18\x21\x12\xa4\x42\
            \xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae\
            \x00\x20\x00\x14\x00\x02\xa1\x47\
            \x01\x13\xa9\xfa\xa5\xd3\xf1\x79\xbc\x25\xf4\xb5\xbe\xd2\xb9\xd9"
            .to_vec();
        let address = response(&sample).unwrap().1;
        assert_eq!(
            address,
            "[2001:db8:1234:5678:11:2233:4455:6677]:32853"
                .parse()
                .unwrap()
        );
        sample[21] = 1;
        assert_eq!(response(&sample).unwrap().1.port(), 0xa147);
    }

    #[test]
    fn a_request_is_stun_and_no_response() {
        let request = request(&[3; 12]);
        assert_eq!(request.len(), 40);
        assert!(is_stun(&request));
        assert_eq!(response(&request), None);
        assert!(!is_stun(&[
            4, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
        ]));
    }

    #[test]
    fn cut_responses_are_refused() {
        for length in 0..SAMPLE.len() {
            assert_eq!(response(&SAMPLE[..length]), None, "{length}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = response(&[&[1, 1, 0, 60], &COOKIE[..], &bytes].concat());
        }
    }
}
