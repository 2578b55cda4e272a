//! Who asks the daemon: the API, and wg(8).

use tokio::sync::mpsc;

use super::{Daemon, Error};
use crate::api;
use crate::config::Local;
use crate::datapath::ebpf::Ebpf;
use crate::telemetry::Metrics;
use crate::uapi;

/// Questions that wait; then those who ask do.
const WAITING: usize = 16;

/// The sockets on which questions come.
pub(super) struct Doors {
    requests: mpsc::Receiver<api::Request>,
    _api: api::Server,
    questions: mpsc::Receiver<uapi::Question>,
    /// A courtesy: without it the router routes as well.
    _wireguard: Option<uapi::Server>,
}

/// A question.
pub(super) enum Asked {
    Api(api::Request),
    Wireguard(uapi::Question),
}

impl Doors {
    /// Opens the API; wg(8) comes with [`Doors::open_wireguard`].
    pub(super) fn open(local: &Local) -> Result<Self, Error> {
        let (sender, requests) = mpsc::channel(WAITING);
        let hosts = local.http_hosts.clone();
        let http = local.http.map(|address| (address, local.http_pages, hosts));
        let api = api::Server::start(&local.socket, http, Metrics::default(), sender)?;
        let (_, questions) = mpsc::channel(WAITING);
        Ok(Self {
            requests,
            _api: api,
            questions,
            _wireguard: None,
        })
    }

    /// Lets wg(8) in for the device of this name.
    pub(super) fn open_wireguard(&mut self, device: &str) {
        let (sender, questions) = mpsc::channel(WAITING);
        let server = uapi::Server::start(device, sender)
            .inspect_err(|error| tracing::warn!("`wg` will not see this router: {error}"));
        self.questions = questions;
        self._wireguard = server.ok();
    }

    /// Waits for the next question. Cancel safe.
    pub(super) async fn asked(&mut self) -> Asked {
        tokio::select! {
            Some(request) = self.requests.recv() => Asked::Api(request),
            Some(question) = self.questions.recv() => Asked::Wireguard(question),
            else => std::future::pending().await,
        }
    }
}

impl Daemon {
    /// Answers; whoever has asked may have gone meanwhile.
    pub(super) async fn answer(&mut self, asked: Asked) {
        match asked {
            Asked::Api(api::Request::Status(answer)) => drop(answer.send(self.status())),
            Asked::Api(api::Request::Order(order, answer)) => self.obey(*order, answer).await,
            Asked::Api(api::Request::Drain(timeout, answer)) => {
                drop(answer.send(self.drain_by_hand(timeout)));
            }
            Asked::Api(api::Request::Undrain(answer)) => drop(answer.send(self.undrain())),
            Asked::Api(api::Request::Ways(answer)) => {
                let ways = self.tailnet.as_ref().map(|tailnet| api::Ways {
                    report: tailnet.node.report(),
                    paths: tailnet.paths.clone(),
                    inside: tailnet.inside.clone(),
                });
                drop(answer.send(ways));
            }
            Asked::Api(api::Request::Flows(answer)) => {
                drop(answer.send(self.machine.ebpf.as_ref().map(Ebpf::flows)));
            }
            Asked::Api(api::Request::Denied(question, answer)) => {
                let denied = self.machine.denied.as_ref();
                let peers = &self.sources.state().peers;
                let list = denied.map(|log| log.answer(&question, peers));
                drop(answer.send(list));
            }
            Asked::Wireguard(uapi::Question::Get(answer)) => {
                drop(answer.send(self.wireguard_state()));
            }
            Asked::Wireguard(uapi::Question::Set(set, answer)) => {
                let outcome = self.set(&set).await;
                drop(answer.send(outcome));
            }
        }
    }
}
