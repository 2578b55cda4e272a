//! Frames of the map stream: a length of four bytes, little-endian, and JSON, compressed or not.

use std::io::Read as _;

use crate::tailnet::wire::MapResponse;

/// Most bytes of a frame as it comes.
const MOST_PACKED: usize = 64 << 20;
/// Most bytes of a frame unpacked: a map of 100,000 nodes.
const MOST: u64 = 256 << 20;
/// What a zstd frame begins with.
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Why a frame cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Longer than any map.
    #[error("the server sends a map of more than {0} bytes")]
    TooLong(u64),
    /// No zstd, though it begins so.
    #[error("the server sends a map that cannot be unpacked: {0}")]
    Packed(String),
    /// No JSON, or of other types than the protocol's.
    #[error("the server sends a map that is not understood: {0}")]
    Json(#[from] serde_json::Error),
}

/// Puts frames together from what the stream brings.
#[derive(Debug, Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    /// Takes what has arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next frame, if all of it is there.
    pub fn pop(&mut self) -> Result<Option<MapResponse>, Error> {
        let Some((length, rest)) = self.0.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MOST_PACKED {
            return Err(Error::TooLong(MOST_PACKED as u64));
        }
        let Some(frame) = rest.get(..length) else {
            return Ok(None);
        };
        let map = read(frame);
        self.0.drain(..4 + length);
        if self.0.is_empty() && self.0.capacity() > 1 << 20 {
            self.0 = Vec::new();
        }
        map.map(Some)
    }
}

/// Reads one frame without its length.
pub fn read(frame: &[u8]) -> Result<MapResponse, Error> {
    if !frame.starts_with(&ZSTD) {
        return Ok(serde_json::from_slice(frame)?);
    }
    let packed = |error: &dyn std::fmt::Display| Error::Packed(error.to_string());
    let decoder = ruzstd::decoding::StreamingDecoder::new(frame).map_err(|error| packed(&error))?;
    let mut text = Vec::new();
    let mut limited = decoder.take(MOST + 1);
    limited
        .read_to_end(&mut text)
        .map_err(|error| packed(&error))?;
    if text.len() as u64 > MOST {
        return Err(Error::TooLong(MOST));
    }
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pack(text: &str) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(
            text.as_bytes(),
            ruzstd::encoding::CompressionLevel::Fastest,
        )
    }

    fn framed(body: &[u8]) -> Vec<u8> {
        [&(body.len() as u32).to_le_bytes()[..], body].concat()
    }

    proptest! {
        /// However the stream is cut, the same frames come out, packed or not.
        #[test]
        fn cuts_do_not_matter(
            frames in proptest::collection::vec((any::<bool>(), "[a-z]{0,40}"), 1..5),
            cut in 1_usize..50,
        ) {
            let mut stream = Vec::new();
            for (zstd, domain) in &frames {
                let text = serde_json::json!({"Domain": domain}).to_string();
                let body = if *zstd { pack(&text) } else { text.into_bytes() };
                stream.extend(framed(&body));
            }
            let (mut reader, mut read) = (Frames::default(), Vec::new());
            for piece in stream.chunks(cut) {
                reader.push(piece);
                while let Some(map) = reader.pop().unwrap() {
                    read.push(map.domain.unwrap());
                }
            }
            let sent: Vec<String> = frames.into_iter().map(|(_, domain)| domain).collect();
            prop_assert_eq!(read, sent);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = read(&bytes);
            let _ = read(&[&ZSTD[..], &bytes].concat());
        }
    }

    #[test]
    fn a_length_beyond_all_maps_is_refused_at_once() {
        let mut frames = Frames::default();
        frames.push(&u32::MAX.to_le_bytes());
        assert!(matches!(frames.pop(), Err(Error::TooLong(_))));
    }

    #[test]
    fn a_bomb_is_refused() {
        // 300 MiB of one byte: few bytes as zstd.
        let block = |last: u32| (last | 1 << 1 | 0x1_ffff << 3).to_le_bytes();
        let mut bomb = [&ZSTD[..], &[0x00, 0x58]].concat();
        for _ in 0..2_500 {
            bomb.extend(&block(0)[..3]);
            bomb.push(b' ');
        }
        bomb.extend(&block(1)[..3]);
        bomb.push(b' ');
        assert!(matches!(
            read(&bomb),
            Err(Error::TooLong(_) | Error::Packed(_))
        ));
    }
}
