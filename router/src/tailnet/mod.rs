//! Joining a tailnet: the router as a node that a coordination server of Tailscale's kind knows.
//!
//! What decides does no I/O: [`session`] (registration, map stream, answers), [`netmap`] (the map and what changes of
//! it), [`filter`] (its packet filter as policy), [`noise`] and [`frames`] (the protocol's layers), [`disco`],
//! [`tsmp`] and [`stun`] (messages between nodes). [`client`] makes connections, [`driver`] ties it to a session, and
//! [`state`] keeps what outlives a restart, and [`hostinfo`] tells what the router says of itself.
//!
//! The sources that rule are Tailscale's own; comments name the file.

pub mod client;
pub mod disco;
pub mod driver;
pub mod filter;
pub mod frames;
pub mod hostinfo;
pub mod keys;
pub mod netmap;
pub mod noise;
pub mod session;
pub mod state;
pub mod stun;
pub mod time;
pub mod tsmp;
pub mod wire;
