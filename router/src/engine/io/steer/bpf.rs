//! The few calls and instructions that steering needs (linux/bpf.h). Its program is a dozen lines
//! and must work without the eBPF object and its loader.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

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
