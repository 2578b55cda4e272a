//! The status and metrics service: HTTP on a local socket and, if configured, on TCP.
//!
//! `GET /status` is a JSON [`Status`], `GET /metrics` the Prometheus text, `GET /healthz` is 200
//! when everything wanted is in force and 503 with the problems otherwise. The server owns no
//! state: every request asks the runtime for a fresh [`Status`].

mod client;
mod server;
mod status;

pub use client::{ClientError, fetch_status, print_status};
pub use server::{Error, Request, Server};
pub use status::{
    DatapathStatus, DeviceStatus, EngineStatus, Packets, PeerStatus, Problem, RouteStatus, Status,
};
