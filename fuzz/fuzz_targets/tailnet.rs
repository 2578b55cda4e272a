//! What a coordination server and other nodes send: map frames, disco, TSMP, STUN, and deltas on top of each other.
#![no_main]

use libfuzzer_sys::fuzz_target;
use router::tailnet::frames::{Frames, read};
use router::tailnet::netmap::Netmap;
use router::tailnet::time::Timestamp;
use router::tailnet::{disco, stun, tsmp};
use sluice_fuzz::parts;

fuzz_target!(|data: &[u8]| {
    let Some((mode, rest)) = data.split_first() else {
        return;
    };
    match mode % 5 {
        0 => {
            // A stream, in pieces.
            let mut frames = Frames::default();
            for piece in rest.chunks(1 + usize::from(mode / 5)) {
                frames.push(piece);
                while let Ok(Some(_)) = frames.pop() {}
            }
        }
        1 => {
            // Responses one after the other: each change is told, and the map can be kept.
            let mut map = Netmap::default();
            for (at, part) in parts(rest).enumerate() {
                let Ok(response) = read(part) else {
                    continue;
                };
                let before = map.clone();
                match map.apply(response, at == 0, Timestamp(0)) {
                    Ok(change) => assert!(!change.is_empty() || before == map),
                    Err(_) => assert_eq!(before, map),
                }
                let _ = map.policy();
            }
            let kept = serde_json::to_vec(&map).expect("a map can be written");
            let read: Netmap = serde_json::from_slice(&kept).expect("and read");
            assert_eq!(read.policy(), map.policy());
            assert!(read.peers().eq(map.peers()));
        }
        2 => {
            let _ = disco::sender(rest);
            if let Some(message) = disco::Message::parse(rest) {
                assert!(disco::Message::parse(&message.clear()).is_some());
            }
        }
        3 => {
            if let Some(message) = tsmp::Message::parse(rest) {
                assert_eq!(tsmp::Message::parse(&message.payload()), Some(message));
            }
        }
        _ => {
            let _ = stun::response(rest);
        }
    }
});
