//! The Noise protocol behind one adapter; no other module names boringtun's types.
//!
//! Nothing here reads or writes a socket. A `Tunnel` is the session with one peer: it opens and
//! seals data messages in batches and answers handshake messages. A `Limiter` stands in front of
//! it and decides which handshake messages are worth any work.
//!
//! Time: callers pass `now`, from any clock that only goes forward. boringtun reads clocks of its
//! own to date sessions and initiations; under test those are simulated too (`clock`).

#[cfg(test)]
pub(crate) mod clock;
pub mod keys;
mod limiter;
mod local;
pub(crate) mod message;
mod timers;
mod tunnel;

pub(crate) use limiter::{Limiter, Verdict};
pub(crate) use local::LocalKey;
pub(crate) use tunnel::{Completed, Refused, Tunnel};

/// Packets to be sealed, one after the other. Each lies in one piece and is padded already.
pub(crate) trait Packets {
    /// The next packet; it may reuse the memory of the one before.
    fn next(&mut self) -> Option<&[u8]>;
}

/// Where sealed data messages are put.
pub(crate) trait Arena {
    /// Room for a message of `length` bytes.
    fn slot(&mut self, length: usize) -> &mut [u8];
    /// The message is in the slot.
    fn filled(&mut self, length: usize);
}

/// What becomes of opened data messages.
pub(crate) trait Opened {
    /// Room for a packet, its tag and padding: never less than the message that is opened.
    fn slot(&mut self) -> &mut [u8];
    /// A packet of `length` bytes is in the slot: authentic and not seen before, its source not
    /// checked. `length` is 0 for a keepalive.
    fn packet(&mut self, length: usize);
    /// A message was refused.
    fn refused(&mut self, why: Refused);
}
