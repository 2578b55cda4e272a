//! Peer relays: nodes that carry datagrams between two others over UDP, where DERP would over TLS.
//!
//! After `disco/disco.go`, `net/packet/geneve.go` and `wgengine/magicsock/relaymanager.go` of Tailscale's sources. A
//! node asks a relay for an endpoint ([`Message::Allocate`], by DERP) and tells its peer of it
//! ([`Message::CallMeMaybeVia`], by DERP); then both bind to it ([`binding`]) and ping each other through it. From
//! then on every datagram has a [`Header`], whose number tells the relay whose it is.
//!
//! The router uses such relays, and is one if it is told to: [`server`] decides, [`service`] is its thread.

pub mod binding;
pub mod message;
pub mod server;
pub mod service;

pub use crate::geneve::{Header, Inner};
pub use binding::{Binding, Outcome};
pub use message::{Endpoint, Handshake, Message};
pub use server::Server;
