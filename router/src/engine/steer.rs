//! Programs that let the kernel choose the worker: by receiver index on the underlay, by allowed
//! IPs on the TUN device. Both are hints: a worker hands over what is not its own.

mod sockets;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use ipnet::IpNet;

pub(super) use sockets::by_receiver_index;

use super::tun::Queue;

/// The steering of a TUN device's queues by destination.
#[derive(Debug)]
pub(super) struct TunSteering {
    v4: OwnedFd,
    v6: OwnedFd,
    installed: HashMap<IpNet, u32>,
}

/// Allowed IPs that a family's map may hold, most first. Linux before 5.11 charges a map's memory in
/// advance to the user's RLIMIT_MEMLOCK, often 64 KiB; what does not fit is handed over instead.
const ENTRIES: [u32; 4] = [1 << 20, 1 << 16, 1 << 12, 1 << 8];

impl TunSteering {
    /// Loads the program and gives it to the device. All queues share it.
    pub(super) fn attach(queue: &Queue) -> io::Result<Self> {
        let this = Self {
            v4: largest_trie(4)?,
            v6: largest_trie(16)?,
            installed: HashMap::new(),
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

    /// Makes the maps say what `wanted` says: worker by allowed IP. What fails is tried again the
    /// next time.
    pub(super) fn set(&mut self, wanted: HashMap<IpNet, u32>) -> io::Result<()> {
        let mut result = Ok(());
        let gone = self.installed.keys().copied();
        let gone: Vec<_> = gone.filter(|cidr| !wanted.contains_key(cidr)).collect();
        for cidr in gone {
            let (map, key) = self.entry(&cidr);
            match bpf::delete(map, &key) {
                Ok(()) => drop(self.installed.remove(&cidr)),
                Err(error) => result = result.and(Err(error)),
            }
        }
        for (cidr, worker) in wanted {
            if self.installed.get(&cidr) != Some(&worker) {
                let (map, key) = self.entry(&cidr);
                match bpf::update(map, &key, worker) {
                    Ok(()) => drop(self.installed.insert(cidr, worker)),
                    Err(error) => result = result.and(Err(error)),
                }
            }
        }
        result
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

/// The few calls and instructions that steering needs (linux/bpf.h). This program is a dozen lines
/// and must work without the eBPF object and its loader.
mod bpf {
    use super::*;

    /// `struct bpf_insn`.
    #[derive(Clone, Copy)]
    #[repr(C)]
    pub(super) struct Instruction {
        code: u8,
        /// Destination in the low, source in the high half; on big-endian machines the reverse.
        registers: u8,
        offset: i16,
        immediate: i32,
    }

    pub(super) const R0: u8 = 0;
    pub(super) const R1: u8 = 1;
    pub(super) const R2: u8 = 2;
    pub(super) const R3: u8 = 3;
    pub(super) const R4: u8 = 4;
    pub(super) const R6: u8 = 6;
    pub(super) const R10: u8 = 10;

    pub(super) const MAP_LOOKUP: i32 = 1;
    pub(super) const SKB_LOAD_BYTES: i32 = 26;

    const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
        let registers = if cfg!(target_endian = "little") {
            from << 4 | to
        } else {
            to << 4 | from
        };
        Instruction {
            code,
            registers,
            offset,
            immediate,
        }
    }

    pub(super) const fn copy(to: u8, from: u8) -> Instruction {
        instruction(0xbf, to, from, 0, 0)
    }

    pub(super) const fn set(to: u8, value: i32) -> Instruction {
        instruction(0xb7, to, 0, 0, value)
    }

    pub(super) const fn add(to: u8, value: i32) -> Instruction {
        instruction(0x07, to, 0, 0, value)
    }

    pub(super) const fn shift_right(to: u8, bits: i32) -> Instruction {
        instruction(0x77, to, 0, 0, bits)
    }

    pub(super) const fn store_word(at: u8, offset: i16, value: i32) -> Instruction {
        instruction(0x62, at, 0, offset, value)
    }

    pub(super) const fn load_word(to: u8, at: u8) -> Instruction {
        instruction(0x61, to, at, 0, 0)
    }

    /// R0 = a byte of the packet, whose context is in R6. Ends the program beyond the packet.
    pub(super) const fn load_packet_byte(at: i32) -> Instruction {
        instruction(0x30, 0, 0, 0, at)
    }

    pub(super) const fn jump_equal(register: u8, value: i32, skip: i16) -> Instruction {
        instruction(0x15, register, 0, skip, value)
    }

    pub(super) const fn jump_not_equal(register: u8, value: i32, skip: i16) -> Instruction {
        instruction(0x55, register, 0, skip, value)
    }

    pub(super) const fn call(helper: i32) -> Instruction {
        instruction(0x85, 0, 0, 0, helper)
    }

    pub(super) const fn exit() -> Instruction {
        instruction(0x95, 0, 0, 0, 0)
    }

    /// A 64-bit load whose source register says: a map's descriptor.
    pub(super) const fn set_map(to: u8, map: RawFd) -> [Instruction; 2] {
        [instruction(0x18, to, 1, 0, map), instruction(0, 0, 0, 0, 0)]
    }

    const MAP_CREATE: libc::c_long = 0;
    const MAP_UPDATE: libc::c_long = 2;
    const MAP_DELETE: libc::c_long = 3;
    const PROG_LOAD: libc::c_long = 5;

    const MAP_TYPE_LPM_TRIE: u32 = 11;
    const NO_PREALLOC: u32 = 1;
    const PROG_TYPE_SOCKET_FILTER: u32 = 1;

    #[repr(C)]
    struct MapCreate {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
    }

    #[repr(C)]
    struct Element {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }

    #[repr(C)]
    struct ProgLoad {
        prog_type: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
    }

    fn call_kernel<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
        // SAFETY: pointer and size are those of a live struct, whose addresses lead to memory that
        // lives for the whole call; the kernel only reads for these commands.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                std::ptr::from_ref(attributes),
                size_of::<T>(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(result)
    }

    fn address<T>(of: &T) -> u64 {
        std::ptr::from_ref(of) as u64
    }

    fn owned(fd: libc::c_long) -> OwnedFd {
        // SAFETY: the kernel has just made this descriptor; nobody else has it.
        unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
    }

    /// A map from prefixes of `length` bytes to numbers.
    pub(super) fn lpm_trie(length: u32, entries: u32) -> io::Result<OwnedFd> {
        call_kernel(
            MAP_CREATE,
            &MapCreate {
                map_type: MAP_TYPE_LPM_TRIE,
                key_size: 4 + length,
                value_size: 4,
                max_entries: entries,
                map_flags: NO_PREALLOC,
            },
        )
        .map(owned)
    }

    fn element(map: &OwnedFd, key: &[u8; 20], value: u64) -> Element {
        Element {
            map: map.as_raw_fd() as u32,
            padding: 0,
            key: address(key),
            value,
            flags: 0,
        }
    }

    /// Sets an entry.
    pub(super) fn update(map: &OwnedFd, key: &[u8; 20], value: u32) -> io::Result<()> {
        call_kernel(MAP_UPDATE, &element(map, key, address(&value))).map(drop)
    }

    /// Removes an entry.
    pub(super) fn delete(map: &OwnedFd, key: &[u8; 20]) -> io::Result<()> {
        call_kernel(MAP_DELETE, &element(map, key, 0)).map(drop)
    }

    /// Loads a program. It calls no helper that is for the GPL only.
    pub(super) fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
        const LICENSE: &[u8; 13] = b"Dual MIT/GPL\0";
        call_kernel(
            PROG_LOAD,
            &ProgLoad {
                prog_type: PROG_TYPE_SOCKET_FILTER,
                count: program.len() as u32,
                instructions: program.as_ptr() as u64,
                license: address(LICENSE),
                log_level: 0,
                log_size: 0,
                log: 0,
            },
        )
        .map(owned)
    }
}
