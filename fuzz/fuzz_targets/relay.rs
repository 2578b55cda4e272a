//! What relays and those behind them send: DERP frames, certificates, Geneve headers, disco messages about peer relays,
//! and what anybody sends to the peer relay that the router is.
#![no_main]

use bytes::BytesMut;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use router::tailnet::derp::certificate::Certificate;
use router::tailnet::derp::frames::{self, Frame};
use router::tailnet::disco::Boxes;
use router::tailnet::keys::DiscoSecret;
use router::tailnet::relay::server::{Leg, Verdict, runs};
use router::tailnet::relay::{Handshake, Header, Inner, Message, Server};

fuzz_target!(|data: &[u8]| {
    let Some((mode, rest)) = data.split_first() else {
        return;
    };
    match mode % 5 {
        0 => {
            // However a stream is cut, the same comes out of it.
            let read = |size: usize| {
                let (mut buffer, mut found) = (BytesMut::new(), Vec::<Frame>::new());
                for piece in rest.chunks(size.max(1)) {
                    buffer.extend_from_slice(piece);
                    loop {
                        match frames::next(&mut buffer) {
                            Ok(Some(frame)) => found.push(frame),
                            Ok(None) => break,
                            Err(error) => return (found, Some(error)),
                        }
                    }
                }
                (found, None)
            };
            assert_eq!(read(usize::MAX), read(1 + usize::from(mode / 5)));
        }
        1 => {
            if let Some(certificate) = Certificate::parse(rest) {
                let _ = (certificate.is_meta(), certificate.relay());
            }
        }
        2 => {
            if let Some((header, behind)) = Header::parse(rest) {
                let again = [&header.bytes()[..], behind].concat();
                assert_eq!(Header::parse(&again), Some((header, behind)));
            }
        }
        3 => {
            if let Some(message) = Message::parse(rest) {
                assert_eq!(Message::parse(&message.clear()), Some(message));
            }
        }
        _ => serve(rest),
    }
});

fn secret(digit: u8) -> DiscoSecret {
    let digits = format!("{digit:02x}").repeat(32);
    format!("privkey:{digits}").parse().unwrap()
}

fn head(number: u32, control: bool) -> [u8; 8] {
    let inner = Inner::Disco;
    let header = Header {
        inner,
        control,
        number,
    };
    header.bytes()
}

/// Two clients of the relay and somebody else say what the bytes have them say, each from one of four addresses.
fn serve(mut script: &[u8]) {
    let random = Box::new(|bytes: &mut [u8]| {
        bytes.fill(7);
        true
    });
    let mut server = Server::new(&secret(1), random);
    let secrets = [secret(2), secret(3)];
    let keys = [secrets[0].public(), secrets[1].public()];
    let mut boxes = [Boxes::new(&secrets[0]), Boxes::new(&secrets[1])];
    let mut now = Instant::now();
    let place = server.allocate(keys[0], keys, now).unwrap();
    let mut heard = [[0; 32]; 2];
    let mut bound = [None; 2];
    while let Some(([what, from, detail], rest)) = script.split_first_chunk::<3>() {
        script = rest;
        let leg = Leg {
            remote: SocketAddr::new([192, 0, 2, 1].into(), 1 + u16::from(from % 4)),
            local: None,
        };
        let at = usize::from(what & 1);
        let said = Handshake {
            number: place.number,
            generation: u32::from(detail % 4),
            remote: keys[1 - at],
            challenge: heard[at],
        };
        let sealed = |boxes: &mut [Boxes; 2], message: Message| {
            let sealed = boxes[at].seal_clear(&server.key(), &message.clear(), [9; 24]);
            let head = head(place.number, true);
            [&head[..], &sealed.unwrap()].concat()
        };
        let buffer = match what % 6 {
            0 | 1 => sealed(&mut boxes, Message::Bind(said)),
            2 | 3 => sealed(&mut boxes, Message::Answer(said)),
            4 => {
                now += Duration::from_secs(u64::from(*detail));
                server.handle_timeout(now);
                continue;
            }
            _ => {
                let (bytes, rest) = script.split_at(usize::from(*detail).min(script.len()));
                script = rest;
                let head = head(place.number, false);
                [&head[..], bytes].concat()
            }
        };
        let stride = if what % 6 == 5 {
            usize::from(*from)
        } else {
            buffer.len()
        };
        for run in runs(&buffer, stride) {
            match server.handle(run, stride, leg, now) {
                Verdict::Answer(answer) => {
                    assert!(answer.len() <= run.len());
                    let (header, sealed) = Header::parse(&answer).unwrap();
                    assert!(header.control && header.number == place.number);
                    let clear = boxes[at].open_clear(&server.key(), sealed).unwrap();
                    match Message::parse(&clear) {
                        Some(Message::Challenge(challenge)) => heard[at] = challenge.challenge,
                        other => panic!("{other:?}"),
                    }
                }
                Verdict::Bound => {
                    bound[at] = Some(leg);
                    if bound[1 - at] == Some(leg) {
                        bound[1 - at] = None;
                    }
                }
                Verdict::Carry(to) => {
                    let from = bound.iter().position(|bound| *bound == Some(leg));
                    assert_eq!(bound[1 - from.unwrap()], Some(to));
                    assert_ne!(to, leg);
                }
                Verdict::Drop(_) => {}
            }
        }
    }
}
