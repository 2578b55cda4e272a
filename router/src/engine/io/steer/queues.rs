//! The choice of a TUN queue, by allowed IPs.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};

use ipnet::IpNet;

use super::bpf;
use crate::engine::io::tun::Queue;

/// The steering of a TUN device's queues by destination.
#[derive(Debug)]
pub(crate) struct TunSteering {
    v4: OwnedFd,
    v6: OwnedFd,
    /// What the maps do not say though they should.
    failed: BTreeMap<IpNet, Option<u32>>,
}

/// Allowed IPs that a family's map may hold, most first. Linux before 5.11 charges a map's memory in
/// advance to the user's RLIMIT_MEMLOCK, often 64 KiB; what does not fit is handed over instead.
const ENTRIES: [u32; 4] = [1 << 20, 1 << 16, 1 << 12, 1 << 8];

/// Entries that failed and are tried again with one change.
const RETRIES: usize = 16;

impl TunSteering {
    /// Loads the program and gives it to the device. All queues share it.
    pub(crate) fn attach(queue: &Queue) -> io::Result<Self> {
        let this = Self {
            v4: largest_trie(4)?,
            v6: largest_trie(16)?,
            failed: BTreeMap::new(),
        };
        let program = bpf::load(&by_destination(this.v4.as_raw_fd(), this.v6.as_raw_fd()))?;
        let mut fd = program.as_raw_fd();
        // SAFETY: the ioctl reads an int, which lives for the whole call. The device keeps its own
        // reference to the program, and the program to its maps.
        let done = unsafe {
            libc::ioctl(
                queue.as_fd().as_raw_fd(),
                libc::TUNSETSTEERINGEBPF,
                std::ptr::from_mut(&mut fd),
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(this)
    }

    /// Allowed IPs have gone, others now belong to these workers. What fails is tried again with later
    /// changes, for until then it costs a hand-over, no more.
    pub(crate) fn change(
        &mut self,
        gone: &[IpNet],
        new: impl Iterator<Item = (IpNet, u32)>,
    ) -> io::Result<()> {
        let old = self
            .failed
            .keys()
            .copied()
            .take(RETRIES)
            .collect::<Vec<_>>();
        let gone = gone.iter().map(|cidr| (*cidr, None));
        let mut result = Ok(());
        for (cidr, worker) in gone.chain(new.map(|(cidr, worker)| (cidr, Some(worker)))) {
            if let Err(error) = self.set(cidr, worker) {
                self.failed.insert(cidr, worker);
                result = Err(error);
            } else {
                self.failed.remove(&cidr);
            }
        }
        for cidr in old {
            if let Some(worker) = self.failed.get(&cidr).copied() {
                self.set(cidr, worker)?;
                self.failed.remove(&cidr);
            }
        }
        result
    }

    fn set(&self, cidr: IpNet, worker: Option<u32>) -> io::Result<()> {
        let (map, key) = self.entry(&cidr);
        match worker {
            Some(worker) => bpf::update(map, &key, worker),
            None => match bpf::delete(map, &key) {
                // It may never have got in.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                result => result,
            },
        }
    }

    /// Map and key (`struct bpf_lpm_trie_key`) of a CIDR. IPv4 uses the first 8 bytes.
    fn entry(&self, cidr: &IpNet) -> (&OwnedFd, [u8; 20]) {
        let mut key = [0; 20];
        key[..4].copy_from_slice(&u32::from(cidr.prefix_len()).to_ne_bytes());
        match cidr.network() {
            IpAddr::V4(address) => {
                key[4..8].copy_from_slice(&address.octets());
                (&self.v4, key)
            }
            IpAddr::V6(address) => {
                key[4..].copy_from_slice(&address.octets());
                (&self.v6, key)
            }
        }
    }
}

/// The largest map that the kernel grants.
fn largest_trie(length: u32) -> io::Result<OwnedFd> {
    let mut result = Err(io::ErrorKind::InvalidInput.into());
    for entries in ENTRIES {
        result = bpf::lpm_trie(length, entries);
        // EPERM, not ENOMEM, is what a used-up RLIMIT_MEMLOCK gives.
        match &result {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOMEM)) => {}
            _ => break,
        }
    }
    result
}

/// Looks the destination up; gives its worker, or 0.
fn by_destination(v4: RawFd, v6: RawFd) -> Vec<bpf::Instruction> {
    use bpf::{Instruction, R0, R1, R2, R3, R4, R6, R10, call, exit, jump_equal, jump_not_equal};
    // Stack offset of the key: prefix length, then up to 16 bytes of address.
    const KEY: i16 = -24;
    let lookup = |map, prefix, at, length| -> Vec<Instruction> {
        let mut code = vec![
            bpf::store_word(R10, KEY, prefix),
            bpf::copy(R1, R6),
            bpf::set(R2, at),
            bpf::copy(R3, R10),
            bpf::add(R3, i32::from(KEY) + 4),
            bpf::set(R4, length),
            call(bpf::SKB_LOAD_BYTES),
            // Too short: leave R0 = 0 and give up.
            jump_equal(R0, 0, 2),
            bpf::set(R0, 0),
            exit(),
        ];
        code.extend(bpf::set_map(R1, map));
        code.extend([
            bpf::copy(R2, R10),
            bpf::add(R2, KEY.into()),
            call(bpf::MAP_LOOKUP),
            jump_equal(R0, 0, 1),
            bpf::load_word(R0, R0),
            exit(),
        ]);
        code
    };
    let v4 = lookup(v4, 32, 16, 4);
    let v6 = lookup(v6, 128, 24, 16);
    let mut program = vec![
        bpf::copy(R6, R1),
        bpf::load_packet_byte(0),
        bpf::shift_right(R0, 4),
        jump_not_equal(R0, 4, v4.len() as i16),
    ];
    program.extend(v4);
    program.push(jump_not_equal(R0, 6, v6.len() as i16));
    program.extend(v6);
    program.extend([bpf::set(R0, 0), exit()]);
    program
}
