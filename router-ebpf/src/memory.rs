//! A packet in memory: the host's [`Frame`], for tests and measurements.

use crate::abi::Side;
use crate::csum::Delta;
use crate::frame::{self, Bytes, Covers, Frame, Sum};
use crate::packet::JUMBO_HEADER;
use crate::verdict::Verdict;

/// A packet as a program of one side sees it, with complete checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All bytes, with the link-layer header if there is one.
    pub bytes: Vec<u8>,
    /// Bytes in front of the IP header.
    pub offset: usize,
    /// Payload bytes of each segment of a super-packet; zero for a plain packet.
    pub gso_size: u32,
}

impl Memory {
    /// `bytes` as the program of `side` finds them.
    pub fn new(side: Side, bytes: Vec<u8>, gso_size: u32) -> Self {
        Self {
            bytes,
            offset: side.header_offset() as usize,
            gso_size,
        }
    }

    fn slice(&mut self, at: u32, len: usize) -> Result<&mut [u8], Verdict> {
        let start = self.offset + at as usize;
        self.bytes
            .get_mut(start..start + len)
            .ok_or(Verdict::DropInternal)
    }
}

impl Frame for Memory {
    fn len(&self) -> u32 {
        self.bytes.len().saturating_sub(self.offset) as u32
    }

    fn gso_size(&self) -> u32 {
        self.gso_size
    }

    fn header<const AT: usize, const N: usize>(&self, to: &mut [u8; N]) -> bool {
        let bytes = self.read::<N>(AT as u32);
        if let Some(Bytes(bytes)) = bytes {
            *to = bytes;
        }
        bytes.is_some()
    }

    fn read<const N: usize>(&self, at: u32) -> Option<Bytes<N>> {
        let bytes = self.bytes.get(self.offset + at as usize..)?;
        bytes.first_chunk().copied().map(Bytes)
    }

    fn read_into<const N: usize>(&self, at: u32, len: u32, to: &mut Bytes<N>) -> bool {
        let start = self.offset + at as usize;
        let bytes = self.bytes.get(start..start + len as usize);
        match (bytes, to.0.get_mut(..len as usize)) {
            (Some(bytes), Some(to)) if len > 0 => {
                to.copy_from_slice(bytes);
                true
            }
            _ => false,
        }
    }

    fn write_header<const AT: usize, const N: usize>(
        &mut self,
        bytes: &Bytes<N>,
    ) -> Result<(), Verdict> {
        self.write(AT as u32, bytes, Sum::Kept)
    }

    fn write<const N: usize>(&mut self, at: u32, bytes: &Bytes<N>, _: Sum) -> Result<(), Verdict> {
        self.slice(at, N)?.copy_from_slice(&bytes.0);
        Ok(())
    }

    fn replace_checksum(&mut self, at: u32, delta: Delta, covers: Covers) -> Result<(), Verdict> {
        let field = self.slice(at, 2)?;
        let udp = matches!(covers, Covers::UdpPayload | Covers::UdpPseudo);
        if udp && field == [0, 0] {
            return Ok(());
        }
        let mut new = delta.apply([field[0], field[1]]);
        if udp && new == [0, 0] {
            new = [0xff, 0xff];
        }
        field.copy_from_slice(&new);
        Ok(())
    }

    fn sum(&self, len: u32) -> Option<u16> {
        frame::sum(self, len)
    }

    fn change_sum(&mut self, _: Delta) {}

    fn trim(&mut self, len: u32) -> Result<(), Verdict> {
        self.bytes.truncate(self.offset + len as usize);
        self.gso_size = 0;
        Ok(())
    }

    fn push_ethernet(&mut self, header: &Bytes<14>) -> Result<(), Verdict> {
        self.bytes.splice(..0, header.0);
        self.offset += header.0.len();
        Ok(())
    }

    fn insert<const N: usize>(&mut self, headers: &Bytes<N>) -> Result<(), Verdict> {
        self.bytes.splice(self.offset..self.offset, headers.0);
        Ok(())
    }

    fn cut_jumbo_header(&mut self) -> Result<(), Verdict> {
        let start = self.offset + 40;
        self.bytes.drain(start..start + JUMBO_HEADER as usize);
        Ok(())
    }

    fn swap_ethernet(&mut self) -> Result<(), Verdict> {
        if self.offset >= 12 {
            self.bytes[..12].rotate_left(6);
        }
        Ok(())
    }
}
