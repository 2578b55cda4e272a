//! The tailnet's part of the daemon: the node, the ways to its peers, and what passes between them and the rest.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::sources::{Sources, TAILNET};
use super::{Daemon, Error};
use crate::api;
use crate::control::Changed;
use crate::core::{Action, Facts};
use crate::tailnet::client::Proxies;
use crate::tailnet::derp;
use crate::tailnet::inside::Inside;
use crate::tailnet::node::{self, Command, Opened, Settings};
use crate::tailnet::paths::{self, portmap};

/// How long the node has to end.
const END: Duration = Duration::from_secs(5);

/// The router as a node of a tailnet.
pub(super) struct Tailnet {
    pub(super) node: node::Handle,
    pub(super) paths: paths::Handle,
    /// Pings inside the tunnel.
    pub(super) inside: Inside,
    /// What passes between nodes there.
    pub(super) messages: mpsc::Receiver<Box<[u8]>>,
    /// The settings in force.
    settings: Settings,
    /// What the paths were told of this machine last.
    local: Option<(u16, Vec<IpAddr>)>,
    /// The gateway that the paths were told of last.
    gateway: Option<portmap::Wanted>,
    _thread: paths::Thread,
}

impl Tailnet {
    /// Opens the state directory, if the router joins a tailnet, and has the sources say what was known last. The
    /// machine may be a cloud's `instance`. Before there are `facts`, whoever gathers them judges the routes.
    pub(super) fn open(
        sources: &mut Sources,
        instance: Option<&str>,
        facts: Option<&Facts>,
    ) -> Result<Option<(Opened, Changed)>, Error> {
        let Some(settings) = sources.config.tailnet.clone() else {
            return Ok(None);
        };
        let opened = node::open(&settings, instance)?;
        let opened = match sources.is_up() {
            true => opened,
            false => opened.idle(),
        };
        let mut update = opened.update(&settings);
        if let Some(facts) = facts {
            sources.spare(&mut update, facts);
        }
        let changed = sources.apply(TAILNET, update);
        Ok(Some((opened, changed)))
    }

    /// What is wrong with the node.
    pub(super) fn problems(&self) -> Vec<api::Problem> {
        let report = self.node.report();
        let problems = report.problems.iter().map(|problem| api::Problem {
            part: problem.part.to_owned(),
            error: problem.text.clone(),
        });
        let ways = self.paths.report();
        let relay = ways.relay_server.as_ref();
        let relay = relay.and_then(paths::RelayServer::problem);
        let relay = relay.map(|error| api::Problem {
            part: "relay-server".to_owned(),
            error,
        });
        // An address that was set by hand serves as well.
        let is_named = !self.settings.static_endpoints.is_empty();
        let refused = ways.port.problem().filter(|_| !is_named);
        let refused = refused.map(|error| api::Problem {
            part: "port-mapping".to_owned(),
            error,
        });
        let relays = ways.relay_problems.iter().map(|error| api::Problem {
            part: "relay".to_owned(),
            error: error.clone(),
        });
        problems.chain(relays).chain(relay).chain(refused).collect()
    }
}

impl Daemon {
    /// Starts the node.
    pub(super) fn join_tailnet(&mut self, opened: Opened) -> Result<(), Error> {
        let Some(settings) = &self.sources.config.tailnet else {
            return Ok(());
        };
        let settings = self.node_settings(settings);
        let io = |source| Error::Io {
            what: "start the tailnet's threads",
            source,
        };
        let engine = Arc::downgrade(&self.machine.engine);
        let inside = Inside::new(engine.clone());
        let messages = self.machine.engine.inside().map_err(Error::Engine)?;
        let options = derp::Options {
            roots: node::roots(settings.ca.as_deref())
                .map_err(|error| io(std::io::Error::other(error)))?,
            proxies: Proxies::from_environment()
                .map_err(|error| io(std::io::Error::other(error)))?,
            // As tailscaled has it, for laboratories.
            plain: std::env::var("TS_DEBUG_USE_DERP_HTTP")
                .is_ok_and(|on| on == "1" || on == "true"),
            mark: self.machine.marks.underlay,
        };
        let (thread, paths, events) = paths::spawn(engine, options).map_err(io)?;
        let options = node::Options {
            mark: self.machine.marks.underlay,
            paths: Some((paths.clone(), events)),
            inside: Some(inside.clone()),
            secrets: self.cloud.secrets(),
        };
        let (node, source) = node::spawn(settings.clone(), opened, options).map_err(io)?;
        if self.life.has_withdrawn() {
            node.send(Command::Offer(false));
        }
        self.sources.add(TAILNET, source);
        self.tailnet = Some(Tailnet {
            node,
            paths,
            inside,
            messages,
            settings,
            local: None,
            gateway: None,
            _thread: thread,
        });
        self.tell_paths_local();
        Ok(())
    }

    /// Takes the file's settings; what needs a restart comes back as sentences.
    pub(super) fn take_tailnet(&mut self, wanted: Option<&Settings>) -> Option<String> {
        let restart = |what| {
            Some(format!(
                "{what} has changed, which takes effect when sluice is restarted"
            ))
        };
        let wanted = wanted.map(|settings| self.node_settings(settings));
        let waits = self.cloud.is_waiting();
        let (tailnet, wanted) = match (&mut self.tailnet, wanted) {
            (None, None) => return None,
            (None, Some(_)) if waits => return None,
            (Some(tailnet), Some(wanted)) => (tailnet, wanted),
            _ => return restart("whether the router joins a tailnet ([tailnet])"),
        };
        if tailnet.settings == wanted {
            return None;
        }
        let told = [
            (
                "tailnet.control_url",
                tailnet.settings.control_url != wanted.control_url,
            ),
            (
                "tailnet.state_dir",
                tailnet.settings.state_dir != wanted.state_dir,
            ),
            ("tailnet.ca", tailnet.settings.ca != wanted.ca),
        ];
        let told = told.into_iter().find(|(_, changed)| *changed);
        tailnet.node.send(Command::Set(Box::new(wanted.clone())));
        tailnet.settings = wanted;
        // The fixed endpoints may be others.
        tailnet.local = None;
        self.tell_paths_local();
        told.and_then(|(key, _)| restart(key))
    }

    /// Judges the routes of the tailnet's peers anew, for this machine's networks may be others.
    pub(super) fn judge_routes(&mut self) {
        if let Some(tailnet) = &self.tailnet
            && self.sources.spares()
        {
            // What is not in the way any more is said again.
            tailnet.node.send(Command::SayAgain);
        }
        let changed = self.sources.judge(&self.network.facts);
        self.take(&changed);
    }

    /// Tells the paths what this machine has, if it is not as before.
    pub(super) fn tell_paths_local(&mut self) {
        let port = self.machine.engine.listen_port();
        let addresses = self.underlay_addresses();
        let gateway = self.gateway();
        let Some(tailnet) = &mut self.tailnet else {
            return;
        };
        if tailnet.gateway != gateway {
            tailnet.gateway = gateway;
            tailnet.paths.tell(paths::Command::Gateway(gateway));
        }
        let local = (port, addresses);
        if tailnet.local.as_ref() == Some(&local) {
            return;
        }
        tailnet.paths.tell(paths::Command::Local {
            port: local.0,
            addresses: local.1.clone(),
            fixed: tailnet.settings.static_endpoints.clone(),
        });
        tailnet.local = Some(local);
    }

    /// The gateway whose port is to lead here, if one may be asked.
    fn gateway(&self) -> Option<portmap::Wanted> {
        let tailnet = self.tailnet.as_ref()?;
        let mut gateways = self.network.facts.gateways.iter();
        let gateway = gateways.find_map(|gateway| match gateway {
            IpAddr::V4(gateway) => Some(*gateway),
            IpAddr::V6(_) => None,
        });
        Some(portmap::Wanted {
            // Gateways of clouds know no such questions.
            gateway: gateway.filter(|_| tailnet.settings.port_mapping && !self.cloud.is_here())?,
            port: NonZeroU16::new(self.machine.engine.listen_port())?,
        })
    }

    /// Addresses of this machine at which peers may reach it: not those inside the tunnel, nor of one link alone.
    fn underlay_addresses(&self) -> Vec<IpAddr> {
        let links = self.network.facts.links.iter();
        let links = links.filter(|(index, _)| **index != self.machine.tun.index);
        let addresses = links.flat_map(|(_, link)| link.addresses.iter().map(ipnet::IpNet::addr));
        let usable = |address: &IpAddr| match address {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
        };
        let mut addresses: Vec<IpAddr> = addresses.filter(usable).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    /// The engine knows peers that it did not know before.
    pub(super) fn tell_paths_applied(&self, action: &Action) {
        let Some(tailnet) = &self.tailnet else {
            return;
        };
        match action {
            Action::Peers { .. } => tailnet.paths.tell(paths::Command::AppliedAll),
            Action::PeersChanged { keys, .. } => {
                tailnet.paths.tell(paths::Command::Applied(keys.clone()));
            }
            _ => {}
        }
    }

    /// Ends the node; one that is ephemeral is gone with a `stop`.
    pub(super) async fn leave_tailnet(&mut self, stop: bool) {
        let Some(tailnet) = self.tailnet.take() else {
            return;
        };
        let (done, given_back) = oneshot::channel();
        if stop {
            tailnet.paths.tell(paths::Command::GiveBack(done));
        }
        let (done, ended) = oneshot::channel();
        tailnet.node.send(Command::End { stop, done });
        if tokio::time::timeout(END, ended).await.is_err() {
            tracing::warn!("the tailnet's node has not ended in time: its last map may be missing");
        }
        if stop {
            // It gives up by itself before.
            let _ = tokio::time::timeout(END, given_back).await;
        }
    }
}
