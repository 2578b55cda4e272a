//! What one read of memory takes, among as many lines of the cache as there are flows.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::thread;

use anyhow::Context as _;

use super::test_run::Clock;
use crate::bpf::{self, instruction};
use crate::case::{Case, CaseId, Failure, Measurement, Outcome, Round};
use crate::cpu::{self, Cores};

/// Bytes of a line.
const LINE: usize = 64;
/// Where a packet says which line is to be read, behind its Ethernet header.
const AT: usize = 14;

/// A program that looks up a value of an array and reads it: no table finds a flow with less.
pub(super) struct OneRead {
    id: CaseId,
    lines: u32,
    cores: Cores,
    made: Option<Made>,
}

impl OneRead {
    pub(super) fn new(id: CaseId, lines: u32, cores: &Cores) -> Self {
        Self {
            id,
            lines,
            cores: cores.clone(),
            made: None,
        }
    }
}

struct Made {
    clock: Clock,
    program: OwnedFd,
    /// Packets that there were.
    packets: u32,
}

impl Made {
    fn new(lines: u32) -> anyhow::Result<Self> {
        let array = bpf::array(LINE, lines).context("make an array")?;
        let fd = array.as_raw_fd();
        let program = [
            // r2 = the packet, r3 = its end
            instruction(0x61, 2, 1, 76, 0),
            instruction(0x61, 3, 1, 80, 0),
            instruction(0xb7, 0, 0, 0, 0),
            // To the end, unless the number of the line is in the packet.
            instruction(0xbf, 4, 2, 0, 0),
            instruction(0x07, 4, 0, 0, AT as i32 + 4),
            instruction(0x2d, 4, 3, 9, 0),
            // r0 = bpf_map_lookup_elem(array, &number)
            instruction(0x61, 2, 2, AT as i16, 0),
            instruction(0x63, 10, 2, -4, 0),
            instruction(0x18, 1, 1, 0, fd),
            instruction(0, 0, 0, 0, 0),
            instruction(0xbf, 2, 10, 0, 0),
            instruction(0x07, 2, 0, 0, -4),
            instruction(0x85, 0, 0, 0, 1),
            // r0 = the value's first word
            instruction(0x15, 0, 0, 1, 0),
            instruction(0x79, 0, 0, 0, 0),
            instruction(0x95, 0, 0, 0, 0),
        ];
        Ok(Self {
            clock: Clock::new().context("load an empty program")?,
            program: bpf::load(bpf::SCHED_CLS, &program).context("load a program that reads")?,
            packets: 0,
        })
    }
}

/// The packet that has a line read; the lines are in no order.
fn packet(n: u32, lines: u32) -> Vec<u8> {
    let mut hash = u64::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let line = ((hash >> 32) * u64::from(lines)) >> 32;
    let mut packet = vec![0; LINE];
    packet[AT..AT + 4].copy_from_slice(&(line as u32).to_ne_bytes());
    packet
}

impl Case for OneRead {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        let count = super::count(round);
        let made = match self.made.as_mut() {
            Some(made) => made,
            None => self.made.insert(Made::new(self.lines)?),
        };
        let (first, lines) = (made.packets, self.lines);
        made.packets = first.wrapping_add(count);
        let packets = (0..count).map(|n| packet(first.wrapping_add(n), lines));
        let (made, cores) = (&*made, [self.cores.router]);
        let timed = || -> anyhow::Result<f64> {
            cpu::pin_thread(&cores)?;
            let time = made.clock.time(made.program.as_fd(), packets, 0);
            time.context("run the program that reads")
        };
        let time = thread::scope(|scope| {
            let pinned = scope.spawn(timed).join();
            pinned.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        // It tells of the machine, not of us.
        Ok(vec![Measurement::fact("time", "ns/packet", time)].into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_that_there_are_and_most_of_them() {
        for lines in [1, 10, 1000] {
            let seen: std::collections::HashSet<u32> = (0..4 * lines)
                .map(|n| packet(n, lines))
                .map(|packet| u32::from_ne_bytes([packet[14], packet[15], packet[16], packet[17]]))
                .collect();
            assert!(seen.iter().all(|line| *line < lines));
            assert!(
                seen.len() as u32 * 10 >= lines * 9,
                "{lines}: {}",
                seen.len()
            );
        }
    }
}
