//! Entries of the flow table as programs hold them.

use core::cell::UnsafeCell;

use crate::abi::{Flow, Side, Tuple};

/// An entry of the flow table, in place.
#[derive(Clone, Copy)]
pub struct Entry<'a>(&'a UnsafeCell<Flow>);

macro_rules! fields {
    ($($(#[$attribute:meta])* $name:ident $set:ident: $type:ty;)*) => {
        $(
            $(#[$attribute])*
            #[inline(always)]
            pub fn $name(self) -> $type {
                // SAFETY: the entry outlives `self`, is aligned, and any bytes are valid integers;
                // no reference to it is ever made.
                unsafe { (*self.0.get()).$name }
            }

            #[inline(always)]
            pub(super) fn $set(self, value: $type) {
                // SAFETY: as above; another writer's field is only ever replaced as a whole.
                unsafe { (*self.0.get()).$name = value }
            }
        )*
    };
}

impl<'a> Entry<'a> {
    /// The entry at a place that stays readable and writable.
    #[inline(always)]
    pub fn new(flow: &'a UnsafeCell<Flow>) -> Self {
        Self(flow)
    }

    fields! {
        /// [`Flow::last_used`].
        last_used set_last_used: u64;
        /// [`Flow::generation`].
        generation set_generation: u32;
        /// [`Flow::link`].
        link set_link: u32;
        /// [`Flow::acknowledged`].
        acknowledged set_acknowledged: u32;
        /// [`Flow::mtu`].
        mtu set_mtu: u16;
        /// [`Flow::clause`].
        clause set_clause: u16;
        /// [`Flow::tcp`].
        tcp set_tcp: u8;
    }

    /// [`Flow::hardware`].
    #[inline(always)]
    pub fn hardware(self) -> [u8; 12] {
        // SAFETY: as for the other fields; it begins at a word, as `abi` asserts.
        unsafe { by_words(&raw const (*self.0.get()).hardware) }
    }

    #[inline(always)]
    pub(super) fn set_hardware(self, value: [u8; 12]) {
        // SAFETY: as for the other fields.
        unsafe { (*self.0.get()).hardware = value }
    }

    /// [`Flow::address`].
    #[inline(always)]
    pub fn address(self) -> [u8; 16] {
        // SAFETY: as for the other fields; it begins at a word, as `abi` asserts.
        unsafe { by_words(&raw const (*self.0.get()).address) }
    }

    /// [`Flow::port`].
    #[inline(always)]
    pub fn port(self) -> [u8; 2] {
        // SAFETY: as for the other fields.
        unsafe { (*self.0.get()).port }
    }

    /// [`Flow::flags`].
    #[inline(always)]
    pub fn flags(self) -> u8 {
        // SAFETY: as for the other fields.
        unsafe { (*self.0.get()).flags }
    }

    /// [`Flow::other`]; the three fields that it needs never change.
    #[inline(always)]
    pub(super) fn other(self, side: Side, tuple: &Tuple) -> (Side, Tuple) {
        let flow = Flow {
            address: self.address(),
            port: self.port(),
            ..Flow::default()
        };
        flow.other(side, tuple)
    }
}

/// The bytes at `from`. Of a copy from one place in memory to another LLVM makes a call for BPF,
/// which copies byte by byte.
///
/// # Safety
///
/// `from` is readable and aligned to four bytes.
#[inline(always)]
unsafe fn by_words<const N: usize>(from: *const [u8; N]) -> [u8; N] {
    const { assert!(N.is_multiple_of(4)) };
    let from = from.cast::<u32>();
    let mut bytes = [0; N];
    let mut word = 0;
    while word < N / 4 {
        // SAFETY: by the caller's promise.
        let value = unsafe { from.add(word).read() };
        bytes[4 * word..4 * word + 4].copy_from_slice(&value.to_ne_bytes());
        word += 1;
    }
    bytes
}
