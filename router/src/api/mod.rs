//! The status and metrics service: HTTP on a local socket and, if configured, on TCP.
//!
//! `GET /status` is a JSON [`Status`], `GET /metrics` the Prometheus text, `GET /healthz` is 200
//! when everything wanted is in force and 503 with the problems otherwise. On the local socket alone
//! `GET /flows` is a JSON [`FlowList`] and `GET /denied` a [`DeniedList`]: who talks to whom is nobody
//! else's business. Over TCP only requests for addresses, `localhost` and configured names are answered.
//! The server owns no state: every request asks the runtime.

mod client;
mod denied;
mod flows;
mod host;
mod server;
mod status;

pub use client::{ClientError, fetch_status, print_denied, print_flows, print_status};
pub use denied::{DeniedEntry, DeniedList};
pub use flows::{FlowEntry, FlowList, Question, parse_address, parse_protocol};
pub use server::{Error, Request, Server};
pub use status::{
    DatapathStatus, DeviceStatus, EngineStatus, FlowStatus, FlowTableStatus, GuardStatus, Packets,
    PeerStatus, Problem, RouteStatus, Status,
};
