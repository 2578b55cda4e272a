//! Entries of the flow table as programs hold them.

use core::cell::UnsafeCell;
use core::marker::PhantomData;

use crate::abi::{Address, Flow, Side, Tuple};
use crate::frame::Bytes;

/// An entry of the flow table, in place. What is behind the first [`Flow::V4_LEN`] bytes
/// of an IPv4 flow may be something else, so it is no reference.
#[derive(Clone, Copy)]
pub struct Entry<'a>(*mut Flow, PhantomData<&'a UnsafeCell<Flow>>);

macro_rules! fields {
    ($($(#[$attribute:meta])* $name:ident $set:ident: $type:ty;)*) => {
        $(
            $(#[$attribute])*
            #[inline(always)]
            pub fn $name(self) -> $type {
                // SAFETY: by the promise of `new`, and any bytes are valid integers.
                unsafe { (*self.0).$name }
            }

            #[inline(always)]
            pub(crate) fn $set(self, value: $type) {
                // SAFETY: as above; another writer's field is only ever replaced as a whole.
                unsafe { (*self.0).$name = value }
            }
        )*
    };
}

impl<'a> Entry<'a> {
    /// The entry at a place.
    ///
    /// # Safety
    ///
    /// The place is aligned, and stays readable for `'a`, and writable: of an IPv4 flow its first
    /// [`Flow::V4_LEN`] bytes, else all of it. No reference to it is made meanwhile.
    #[inline(always)]
    pub unsafe fn new(flow: *mut Flow) -> Self {
        Self(flow, PhantomData)
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
        /// [`Flow::tcp`].
        tcp set_tcp: u8;
    }

    /// [`Flow::hardware`].
    #[inline(always)]
    pub fn hardware(self) -> [u8; 12] {
        // SAFETY: as for the other fields; it begins at a word, as `abi` asserts.
        unsafe { by_words(&raw const (*self.0).hardware, [u32::MAX; 3]) }
    }

    #[inline(always)]
    pub(crate) fn set_hardware(self, value: &Bytes<12>) {
        // SAFETY: as for the other fields.
        unsafe { (*self.0).hardware = value.0 }
    }

    /// [`Flow::address`]; `v4`: whether it is an IPv4 flow.
    #[inline(always)]
    pub fn address(self, v4: bool) -> [u8; 16] {
        // Of an IPv4 flow what is behind the first word is something else in places, but it is there.
        let kept = u32::from(!v4).wrapping_neg();
        // SAFETY: as for the other fields; it begins at a word, as `abi` asserts.
        unsafe { by_words(&raw const (*self.0).address, [u32::MAX, kept, kept, kept]) }
    }

    /// [`Flow::port`].
    #[inline(always)]
    pub fn port(self) -> [u8; 2] {
        // SAFETY: as for the other fields.
        unsafe { (*self.0).port }
    }

    /// [`Flow::flags`].
    #[inline(always)]
    pub fn flags(self) -> u8 {
        // SAFETY: as for the other fields.
        unsafe { (*self.0).flags }
    }

    /// [`Flow::other`]; the two fields that it needs never change.
    #[inline(always)]
    pub(crate) fn other(self, side: Side, tuple: &Tuple) -> (Side, Tuple) {
        let address = Address {
            family: tuple.source.family,
            octets: self.address(tuple.source.is_v4()),
        };
        (side.other(), tuple.other(side, address, self.port()))
    }
}

/// The bits of `mask` of the bytes at `from`. Of a copy from one place in memory to another LLVM makes a
/// call for BPF, which copies byte by byte.
///
/// # Safety
///
/// `from` is readable and aligned to four bytes.
#[inline(always)]
unsafe fn by_words<const N: usize, const WORDS: usize>(
    from: *const [u8; N],
    mask: [u32; WORDS],
) -> [u8; N] {
    const { assert!(N == 4 * WORDS) };
    let from = from.cast::<u32>();
    let mut bytes = [0; N];
    let mut word = 0;
    while word < WORDS {
        // SAFETY: by the caller's promise.
        let value = unsafe { from.add(word).read() } & mask[word];
        bytes[4 * word..4 * word + 4].copy_from_slice(&value.to_ne_bytes());
        word += 1;
    }
    bytes
}
