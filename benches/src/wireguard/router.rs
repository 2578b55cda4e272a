//! A router under measurement, whichever program it is.

use std::net::Ipv4Addr;
use std::time::Duration;

use ::router::wireguard::keys::PrivateKey;
use anyhow::Context as _;
use base64::Engine as _;
use lab::control_server::ControlServer;
use lab::sluice::{self, Config, Sluice};
use lab::tailnet::{KEY, rule};
use lab::{Host, Keypair, Tunnel, Wireguard};

use serde_json::json;

use super::programs::Program;
use crate::cpu;
use crate::scale::crowd::Crowd;

/// The router's UDP port.
pub(crate) const PORT: u16 = 51820;
/// How long a router in a tailnet has to know its peers.
const SOON: Duration = Duration::from_secs(20);

/// What the router is to do.
#[derive(Clone, Debug)]
pub(crate) struct Job<'a> {
    /// Where it runs; forwarding and, if wanted, clamping are set up there for plain programs.
    pub(crate) host: &'a Host,
    /// Its key.
    pub(crate) key: &'a Keypair,
    /// Its overlay address with the prefix length.
    pub(crate) address: &'a str,
    /// Tunnel MTU in bytes.
    pub(crate) mtu: u16,
    /// Public key and allowed IP of each peer.
    pub(crate) peers: &'a [(String, String)],
    /// The network behind it.
    pub(crate) network: &'a str,
    /// The NIC toward that network.
    pub(crate) lan: &'a str,
    /// Whether a plain program gets the MSS clamp rule that its users have to know of.
    pub(crate) clamp: bool,
    /// The CPUs it may use; `None` for all.
    pub(crate) cpus: Option<&'a [usize]>,
    /// What else Sluice has in its configuration.
    pub(crate) crowd: Crowd,
}

/// A running router.
pub(crate) enum Router {
    Sluice(Sluice),
    /// With the server of its tailnet, which lives as long.
    Tailnet {
        sluice: Sluice,
        _control: Box<ControlServer>,
    },
    Plain(Wireguard),
}

/// Clear packets that Sluice has carried, by its own counters; super-packets count once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Paths {
    /// By the eBPF programs alone.
    pub(crate) fast: u64,
    /// By the kernel.
    pub(crate) slow: u64,
    /// Whether its status says that the route's packets take the fast path.
    pub(crate) claims_fast: bool,
}

/// A fresh key pair. A lab's keys protect nothing.
pub(crate) fn key_pair() -> anyhow::Result<Keypair> {
    let private = PrivateKey::generate().context("generate a key")?;
    Ok(Keypair {
        private: private.expose_base64(),
        public: private.public().to_string(),
    })
}

impl Router {
    /// Starts `program` and gives it its job.
    pub(crate) fn start(program: &Program, job: &Job<'_>) -> anyhow::Result<Self> {
        let Some(cpus) = job.cpus else {
            return Self::start_here(program, job);
        };
        // What is started from a pinned thread is pinned from its first instruction, so that it
        // makes as many threads as it has CPUs.
        let before = cpu::affinity()?;
        cpu::pin_thread(cpus)?;
        let router = Self::start_here(program, job);
        cpu::pin_thread(&before)?;
        router
    }

    fn start_here(program: &Program, job: &Job<'_>) -> anyhow::Result<Self> {
        match program {
            Program::Sluice { mode, snat, guard } => {
                let mut config = job.config(mode, *snat)?;
                config.guard = *guard;
                Ok(Self::Sluice(job.host.sluice(&config)?))
            }
            Program::Tailnet => job.join(),
            Program::Daemon(argv) => {
                job.forward()?;
                Ok(Self::Plain(
                    job.host.wireguard_program(argv, &job.tunnel())?,
                ))
            }
            Program::Kernel => {
                job.forward()?;
                Ok(Self::Plain(job.host.wireguard_kernel(&job.tunnel())?))
            }
        }
    }

    /// Its process; `None` for the kernel's own.
    pub(crate) fn process_id(&self) -> Option<u32> {
        match self {
            Self::Sluice(router) | Self::Tailnet { sluice: router, .. } => Some(router.id()),
            Self::Plain(wireguard) => wireguard.process_id(),
        }
    }

    /// Its public key, if that is not the one it was given: a node of a tailnet has its own.
    pub(crate) fn own_key(&self) -> anyhow::Result<Option<String>> {
        let Self::Tailnet { sluice: router, .. } = self else {
            return Ok(None);
        };
        let status = router.status()?;
        let key = status["device"]["public_key"].as_str();
        Ok(Some(key.context("no key in the status")?.to_owned()))
    }

    /// Memory that its process holds, in bytes (`VmRSS`); `None` for the kernel's own.
    pub(crate) fn resident(&self) -> Option<u64> {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.process_id()?)).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kibibytes * 1024)
    }

    /// Messages of unknown sessions that Sluice has refused so far, at the uplink's guard and in the
    /// engine; zeros for other programs.
    pub(crate) fn strangers(&self) -> anyhow::Result<[u64; 2]> {
        let Self::Sluice(sluice) = self else {
            return Ok([0; 2]);
        };
        let status = sluice.status()?;
        let guard = &status["uplink_guard"]["frames"];
        let guard =
            ["drop_index", "drop_malformed"].map(|label| guard[label].as_u64().unwrap_or(0));
        Ok([
            guard.iter().sum(),
            sluice.engine_counter("drop_index")? + sluice.engine_counter("drop_other")?,
        ])
    }

    /// Has Sluice carry out a `set` of wg(8)'s protocol.
    pub(crate) fn set(&self, lines: &str) -> anyhow::Result<()> {
        match self {
            Self::Sluice(sluice) => sluice.set(lines),
            Self::Tailnet { .. } | Self::Plain(_) => anyhow::bail!("only Sluice is asked this"),
        }
    }

    /// Has Sluice end in favour of the next daemon, which is started, and need not be ready yet.
    pub(crate) fn hand_over(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Sluice(sluice) => sluice.hand_over(),
            Self::Tailnet { .. } | Self::Plain(_) => anyhow::bail!("only Sluice is asked this"),
        }
    }

    /// Which paths packets took so far; `None` for other programs than Sluice.
    pub(crate) fn paths(&self) -> anyhow::Result<Option<Paths>> {
        let (Self::Sluice(sluice) | Self::Tailnet { sluice, .. }) = self else {
            return Ok(None);
        };
        let status = sluice.status()?;
        let mut paths = Paths {
            claims_fast: status["routes"][0]["path"] == "fast",
            ..Paths::default()
        };
        let rows = status["packets"]
            .as_array()
            .context("no packet counters in the status")?;
        for row in rows.iter().filter(|row| row["verdict"] == "forwarded") {
            let packets = row["packets"].as_u64().context("a counter is no number")?;
            match row["program"].as_str() {
                Some("from_overlay" | "from_subnet") => paths.fast += packets,
                _ => paths.slow += packets,
            }
        }
        Ok(Some(paths))
    }
}

impl Job<'_> {
    fn config(&self, mode: &'static str, snat: bool) -> anyhow::Result<Config> {
        let mut config = Config::new()?;
        config.key = self.key.clone();
        config.listen_port = PORT;
        config.addresses = vec![self.address.to_owned()];
        config.mtu = Some(self.mtu);
        config.datapath = mode;
        let workers = self.crowd.workers.map(|workers| workers as usize);
        config.workers = workers.or(self.cpus.map(<[usize]>::len));
        // The generator plays many sources at once.
        config.flows_per_source = Some(u16::MAX.into());
        config.log = "warn";
        config.peers = (0..)
            .zip(self.peers)
            .map(|(n, (public, allowed))| sluice::Peer {
                name: format!("peer{n}"),
                public_key: public.clone(),
                allowed_ips: vec![allowed.clone()],
            })
            .collect();
        config.routes = vec![sluice::Route {
            cidr: self.network.to_owned(),
            snat,
            mode: "fast",
        }];
        if self.crowd.rules > 0 {
            // The last rule, so that a router which tries one after the other tries them all.
            config.rules = self.crowd.rules().collect();
            config.rules.push(sluice::Rule {
                from: self.peers.iter().map(|(_, ip)| ip.clone()).collect(),
                to: vec![format!("{}:*", self.network)],
                protocols: Vec::new(),
            });
        }
        config.peers.extend(self.crowd.peers());
        config.routes.extend(self.crowd.routes());
        Ok(config)
    }

    /// Has the router join a tailnet of its own, and waits until the peers are in force.
    fn join(&self) -> anyhow::Result<Router> {
        let listener = self.host.tcp_listener((Ipv4Addr::LOCALHOST, 8080).into())?;
        let control = ControlServer::on(listener)?;
        control.set_filter(json!([rule(&["*"], &[self.network])]));
        let mut config = self.config("ebpf", true)?;
        let joining = Config::joining(&control.url(), KEY)?;
        config.tailnet = joining.tailnet;
        config.peers.clear();
        config.addresses.clear();
        let sluice = self.host.sluice(&config)?;
        let node = control.nodes().pop().context("the router has joined")?;
        control.approve(node.id, &[self.network]);
        let peers = (1000..).zip(self.peers).map(|(id, (key, address))| {
            let key = base64::engine::general_purpose::STANDARD.decode(key)?;
            let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
            Ok(json!({
                "ID": id, "StableID": format!("n{id}"), "Name": format!("peer{id}.lab."),
                "Key": format!("nodekey:{key}"), "Addresses": [address], "AllowedIPs": [address],
                "DiscoKey": format!("discokey:{id:064x}"), "MachineAuthorized": true,
            }))
        });
        let peers = peers.collect::<anyhow::Result<Vec<_>>>()?;
        control.push(node.id, json!({"PeersChanged": peers}));
        lab::wait_until(SOON, "the peers", || {
            let status = sluice.status().unwrap_or_default();
            status["peers"].as_array().map_or(0, Vec::len) == self.peers.len()
        })?;
        Ok(Router::Tailnet {
            sluice,
            _control: Box::new(control),
        })
    }

    fn tunnel(&self) -> Tunnel {
        let tunnel = Tunnel::new(self.key)
            .address(self.address)
            .mtu(u32::from(self.mtu));
        self.peers.iter().fold(tunnel, |tunnel, (public, allowed)| {
            tunnel.peer(public, None, [allowed.as_str()])
        })
    }

    /// What the users of a plain WireGuard program set up beside it: forwarding, masquerade, clamp.
    fn forward(&self) -> anyhow::Result<()> {
        self.host.sysctl("net/ipv4/ip_forward", "1")?;
        let lan = self.lan;
        let clamp = if self.clamp {
            "chain clamp { type filter hook forward priority mangle; policy accept;
                tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu; }"
        } else {
            ""
        };
        let rules = format!(
            "table ip plain {{
                chain nat {{ type nat hook postrouting priority srcnat; policy accept;
                    oifname {lan} masquerade; }}
                {clamp}
            }}"
        );
        self.host
            .command(["nft", "-f", "-"])
            .stdin(rules)
            .run()
            .map(drop)
    }
}
