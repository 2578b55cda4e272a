//! The Noise session of the control protocol (ts2021), without I/O.
//!
//! `Noise_IK_25519_ChaChaPoly_BLAKE2s`, after Tailscale's `control/controlbase`. Two things differ from Noise's
//! own transport: each message has a head of three bytes, type and length, and nonces count in big-endian.

use crate::tailnet::keys::{MachinePublic, MachineSecret};

const PATTERN: &str = "Noise_IK_25519_ChaChaPoly_BLAKE2s";

/// Bytes of the initiation with its head: version and length big-endian, type between them.
pub const INITIATION: usize = 101;
/// Bytes of a head: type, length big-endian.
pub const HEAD: usize = 3;
/// Bytes of the response behind its head.
const RESPONSE: usize = 48;
/// Most bytes of a message with its head, and what of that is no text.
const MESSAGE: usize = 4096;
const TAG: usize = 16;
/// Most bytes of clear text in a record.
pub const RECORD: usize = MESSAGE - HEAD - TAG;

const TYPE_INITIATION: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
const TYPE_ERROR: u8 = 3;
const TYPE_RECORD: u8 = 4;

/// Why there is no session, or no more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cryptography failed: another key than the one that was told, or altered bytes.
    #[error("the server is not the one whose key it told, or somebody alters what it sends: {0}")]
    Noise(#[from] snow::Error),
    /// The server has refused, with its words.
    #[error("the server refuses the handshake: {0}")]
    Refused(String),
    /// Something else than Noise.
    #[error("the server does not speak the control protocol (message type {kind}, {length} bytes)")]
    Unexpected {
        /// Type of the message.
        kind: u8,
        /// Its length without the head.
        length: usize,
    },
    /// So many records that no nonce is left.
    #[error("the session is worn out")]
    Exhausted,
}

/// A handshake that awaits its response.
pub struct Handshake(snow::HandshakeState);

impl Handshake {
    /// Begins a handshake of capability version `version`, and gives the initiation.
    pub fn start(
        machine: &MachineSecret,
        server: &MachinePublic,
        version: u16,
    ) -> Result<(Self, [u8; INITIATION]), Error> {
        let prologue = format!("Tailscale Control Protocol v{version}");
        let mut state = snow::Builder::new(PATTERN.parse()?)
            .prologue(prologue.as_bytes())?
            .local_private_key(machine.expose())?
            .remote_public_key(server.as_bytes())?
            .build_initiator()?;
        let mut initiation = [0; INITIATION];
        let (head, payload) = initiation.split_at_mut(HEAD + 2);
        state.write_message(&[], payload)?;
        head[..2].copy_from_slice(&version.to_be_bytes());
        head[2] = TYPE_INITIATION;
        head[3..].copy_from_slice(&(payload.len() as u16).to_be_bytes());
        Ok((Self(state), initiation))
    }

    /// Takes the response: its type and what stands behind its head.
    pub fn finish(mut self, kind: u8, payload: &[u8]) -> Result<Session, Error> {
        match kind {
            TYPE_RESPONSE if payload.len() == RESPONSE => {}
            TYPE_ERROR => {
                let text: String = String::from_utf8_lossy(payload).chars().take(200).collect();
                return Err(Error::Refused(text));
            }
            _ => {
                let length = payload.len();
                return Err(Error::Unexpected { kind, length });
            }
        }
        self.0.read_message(payload, &mut [0; RESPONSE])?;
        Ok(Session {
            transport: self.0.into_stateless_transport_mode()?,
            sent: 0,
            received: 0,
        })
    }
}

/// Type and length of the message that begins with `head`.
pub fn head(head: [u8; HEAD]) -> (u8, usize) {
    let [kind, length @ ..] = head;
    (kind, usize::from(u16::from_be_bytes(length)))
}

/// Seals and opens records.
pub struct Session {
    transport: snow::StatelessTransportState,
    sent: u64,
    received: u64,
}

impl Session {
    /// Appends to `out` one record with as much of `clear` as it holds, and tells how much that is.
    pub fn seal(&mut self, clear: &[u8], out: &mut Vec<u8>) -> Result<usize, Error> {
        let clear = &clear[..clear.len().min(RECORD)];
        let nonce = next(&mut self.sent)?;
        let length = clear.len() + TAG;
        let start = out.len();
        out.push(TYPE_RECORD);
        out.extend((length as u16).to_be_bytes());
        out.resize(start + HEAD + length, 0);
        self.transport
            .write_message(nonce, clear, &mut out[start + HEAD..])?;
        Ok(clear.len())
    }

    /// Appends to `out` what is in the record of type `kind` that is `sealed`.
    pub fn open(&mut self, kind: u8, sealed: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        if kind != TYPE_RECORD || sealed.len() < TAG {
            let length = sealed.len();
            return Err(Error::Unexpected { kind, length });
        }
        let nonce = next(&mut self.received)?;
        let start = out.len();
        out.resize(start + sealed.len() - TAG, 0);
        self.transport
            .read_message(nonce, sealed, &mut out[start..])?;
        Ok(())
    }
}

/// The next nonce. Noise writes it in little-endian, this protocol in big-endian.
fn next(counter: &mut u64) -> Result<u64, Error> {
    let nonce = counter.swap_bytes();
    *counter = counter.checked_add(1).ok_or(Error::Exhausted)?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The server's side, by hand.
    fn respond(server: &MachineSecret, initiation: &[u8], version: u16) -> (Vec<u8>, Session) {
        let mut state = snow::Builder::new(PATTERN.parse().unwrap())
            .prologue(format!("Tailscale Control Protocol v{version}").as_bytes())
            .unwrap()
            .local_private_key(server.expose())
            .unwrap()
            .build_responder()
            .unwrap();
        state.read_message(&initiation[5..], &mut []).unwrap();
        let mut response = vec![0; RESPONSE];
        state.write_message(&[], &mut response).unwrap();
        let session = Session {
            transport: state.into_stateless_transport_mode().unwrap(),
            sent: 0,
            received: 0,
        };
        (response, session)
    }

    #[test]
    fn records_go_both_ways() {
        let (machine, server) = (
            MachineSecret::generate().unwrap(),
            MachineSecret::generate().unwrap(),
        );
        let (handshake, initiation) = Handshake::start(&machine, &server.public(), 119).unwrap();
        assert_eq!(initiation[..5], [0, 119, 1, 0, 96]);
        let (response, mut there) = respond(&server, &initiation, 119);
        let mut here = handshake.finish(TYPE_RESPONSE, &response).unwrap();

        let text = vec![7; RECORD + 10];
        // Beyond 255 records the two byte orders of nonces differ in more than one byte.
        for _ in 0..300 {
            for (from, to) in [(true, false), (false, true)] {
                let (a, b) = if from {
                    (&mut here, &mut there)
                } else {
                    (&mut there, &mut here)
                };
                assert!(to != from);
                let (mut sealed, mut clear) = (Vec::new(), Vec::new());
                assert_eq!(a.seal(&text, &mut sealed).unwrap(), RECORD);
                assert_eq!(sealed.len(), MESSAGE);
                let (kind, length) = head(sealed[..HEAD].try_into().unwrap());
                assert_eq!((kind, length), (TYPE_RECORD, RECORD + TAG));
                b.open(kind, &sealed[HEAD..], &mut clear).unwrap();
                assert_eq!(clear, text[..RECORD]);
            }
        }
    }

    #[test]
    fn another_server_is_noticed() {
        let machine = MachineSecret::generate().unwrap();
        let (told, other) = (
            MachineSecret::generate().unwrap(),
            MachineSecret::generate().unwrap(),
        );
        let (handshake, _) = Handshake::start(&machine, &told.public(), 119).unwrap();
        let (_, for_other) = Handshake::start(&machine, &other.public(), 119).unwrap();
        let (response, _) = respond(&other, &for_other, 119);
        assert!(matches!(
            handshake.finish(TYPE_RESPONSE, &response),
            Err(Error::Noise(_))
        ));
    }

    #[test]
    fn a_refusal_is_told_in_the_servers_words() {
        let (machine, server) = (
            MachineSecret::generate().unwrap(),
            MachineSecret::generate().unwrap(),
        );
        let start = || Handshake::start(&machine, &server.public(), 119).unwrap().0;
        let error = start().finish(TYPE_ERROR, b"too old").err().unwrap();
        assert!(error.to_string().contains("too old"));
        let error = start().finish(TYPE_RESPONSE, &[0; 47]).err().unwrap();
        assert!(matches!(error, Error::Unexpected { length: 47, .. }));
    }

    #[test]
    fn altered_records_end_it() {
        let (machine, server) = (
            MachineSecret::generate().unwrap(),
            MachineSecret::generate().unwrap(),
        );
        let (handshake, initiation) = Handshake::start(&machine, &server.public(), 1).unwrap();
        let (response, mut there) = respond(&server, &initiation, 1);
        let mut here = handshake.finish(TYPE_RESPONSE, &response).unwrap();
        let mut sealed = Vec::new();
        there.seal(b"hello", &mut sealed).unwrap();
        sealed[HEAD] ^= 1;
        assert!(
            here.open(TYPE_RECORD, &sealed[HEAD..], &mut Vec::new())
                .is_err()
        );
        assert!(here.open(TYPE_RECORD, &[0; 3], &mut Vec::new()).is_err());
    }
}
