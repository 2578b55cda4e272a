//! Joining a tailnet: the router as a node that a coordination server of Tailscale's kind knows.
//!
//! What decides does no I/O: [`session`] (registration, map stream, answers), [`netmap`] (the map and what changes of
//! it), [`filter`] (its packet filter as policy), [`noise`] and [`frames`] (the protocol's layers), [`disco`],
//! [`tsmp`] and [`stun`] (messages between nodes). [`client`] makes connections, [`auth`] has keys made, [`driver`] ties
//! a connection to a session, [`state`] keeps what outlives a restart, and [`hostinfo`] tells what the router says of
//! itself. [`node`] runs it all in the daemon.
//!
//! The sources that rule are Tailscale's own; comments name the file.

pub mod auth;
pub mod client;
pub mod derp;
pub mod disco;
pub mod driver;
pub mod filter;
pub mod frames;
pub mod hostinfo;
pub mod inside;
pub mod keys;
pub mod netmap;
pub mod node;
pub mod noise;
pub mod paths;
pub mod relay;
pub mod session;
pub mod state;
pub mod stun;
pub mod time;
pub mod tsmp;
pub mod wire;
