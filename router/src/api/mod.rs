//! The status and metrics service: HTTP on a local socket and, if configured, on TCP.
//!
//! `GET /status` is a JSON [`Status`], `GET /metrics` the Prometheus text, `GET /healthz` is 200
//! when everything wanted is in force and 503 with the problems otherwise, `GET /readyz` when what carries packets
//! is. In a container of Tailscale's manner, healthy is what has an address in the tailnet. On the local socket alone
//! `GET /flows` is a JSON [`FlowList`] and `GET /denied` a [`DeniedList`]: who talks to whom is nobody
//! else's business. There alone `GET /ping` and `GET /netcheck` look for ways through the network, an [`Order`] is
//! taken by `POST /tailnet`, and `POST /drain` (with `?timeout=` in seconds) and `POST /undrain` have the router make
//! room for another one, and take that back. Over TCP only requests for addresses, `localhost` and configured names are answered.
//! The server owns no state: every request asks the runtime.

mod client;
mod cloud;
mod denied;
mod flows;
mod host;
mod orders;
mod ping;
mod server;
mod status;
mod tailnet;

pub use client::{
    ClientError, ask, drain, fetch_status, order, print_denied, print_flows, print_status, undrain,
};
pub use denied::{DeniedEntry, DeniedList};
pub use flows::{FlowEntry, FlowList, Question, parse_address, parse_protocol};
pub use orders::Order;
pub use ping::{Answer as PingAnswer, Netcheck};
pub use server::{Error, Request, Server, Ways};
pub use status::{
    CloudStatus, DatapathStatus, DeviceStatus, EngineStatus, FlowStatus, FlowTableStatus,
    GuardStatus, LifeStatus, Packets, PeerStatus, Problem, RouteStatus, Status,
};
#[cfg(test)]
pub(crate) use tailnet::tests::relay_server as relay_server_of_tests;
#[cfg(test)]
pub(crate) use tailnet::tests::tailnet as tailnet_of_tests;
pub use tailnet::{AdvertisedRoute, Tailnet};
