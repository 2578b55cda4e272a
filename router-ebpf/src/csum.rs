//! Incremental update of the Internet checksum.

/// The checksum after the 16-bit word `from` under it became `to` (RFC 1624, equation 3).
#[inline(always)]
pub const fn update(checksum: [u8; 2], from: [u8; 2], to: [u8; 2]) -> [u8; 2] {
    let sum = !u16::from_be_bytes(checksum) as u32
        + !u16::from_be_bytes(from) as u32
        + u16::from_be_bytes(to) as u32;
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    (!(folded as u16)).to_be_bytes()
}
