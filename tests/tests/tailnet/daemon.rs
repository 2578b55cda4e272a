//! The daemon as a node, beside our own coordination server in network namespaces: needs root.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use lab::control_server::ControlServer;
use lab::relay_server::{CA, RelayServer};
use lab::site::{Arms, ENDPOINT, SERVER, Site, VPC};
use lab::sluice::{Config, Route, Sluice};
use lab::tailnet::{CONTROL, KEY, control_host, rule};
use lab::{Host, Keypair, Lab, Server, Tunnel, Wireguard, http, poll, wait_until};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);
const PORT: u16 = 8080;

/// A router that has joined, a laptop that is its peer by the tailnet, and a server behind it.
pub(super) struct Rig {
    pub(super) site: Site,
    control_host: Host,
    pub(super) control: ControlServer,
    config: Config,
    laptop: Keypair,
    _servers: [Server; 1],
}

impl Rig {
    pub(super) fn new(lab: &Lab, datapath: &'static str) -> Result<Self> {
        let site = Site::new(lab, Arms::Two)?;
        let control_host = control_host(lab, &site)?;
        let listener = control_host.tcp_listener((CONTROL[0], PORT).into())?;
        let control = ControlServer::on(listener)?;
        let mut config = Config::joining(&control.url(), KEY)?;
        config.datapath = datapath;
        config.routes = VPC
            .map(|cidr| Route {
                cidr: cidr.to_owned(),
                snat: true,
                mode: "fast",
            })
            .into();
        let servers = [site.server.http_server(80)?];
        Ok(Self {
            site,
            control_host,
            control,
            config,
            laptop: Keypair::generate()?,
            _servers: servers,
        })
    }

    pub(super) fn start(&self) -> Result<Sluice> {
        self.site.router.sluice(&self.config)
    }

    /// Has the laptop be a peer, and its tunnel up.
    pub(super) fn connect(&self) -> Result<Wireguard> {
        let node = self.control.introduce("laptop", &self.laptop.public)?;
        let [v4, v6] = node.addresses();
        self.connect_as(&v4, &v6)
    }

    /// Brings the laptop's tunnel up.
    fn connect_as(&self, v4: &str, v6: &str) -> Result<Wireguard> {
        let router = self.router_key()?;
        let inside = VPC.into_iter().chain(["100.64.0.1/32"]);
        let tunnel = Tunnel::new(&self.laptop)
            .address(&format!("{v4}/32"))
            .address(&format!("{v6}/128"))
            .peer(&router, ENDPOINT, inside);
        self.site.laptop.wireguard_go(&tunnel)
    }

    /// The router's public key as its node has it, in base64.
    fn router_key(&self) -> Result<String> {
        let nodes = self.control.nodes();
        let node = nodes.first().context("nobody has joined")?;
        let hex = node.key.strip_prefix("nodekey:").context("a node key")?;
        let bytes = (0..32).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16));
        let bytes = bytes.collect::<Result<Vec<u8>, _>>()?;
        Ok(base64::engine::general_purpose::STANDARD.encode(bytes))
    }

    /// Whether the laptop gets a page of the server in the VPC.
    pub(super) fn reaches(&self, family: usize) -> bool {
        http::get(
            &self.site.laptop,
            (SERVER[family], 80).into(),
            "/bytes/1000",
        )
        .is_ok()
    }

    pub(super) fn wait_reaches(&self, what: &str) -> Result<()> {
        wait_until(SOON, what, || self.reaches(0))
    }

    fn registrations(&self) -> usize {
        let requests = self.control.requests();
        let registered = requests
            .iter()
            .filter(|(path, _)| path == "/machine/register");
        registered.count()
    }
}

fn problems(sluice: &Sluice) -> Result<Vec<Value>> {
    let status = sluice.status()?;
    Ok(status["problems"].as_array().cloned().unwrap_or_default())
}

/// Joins by a key, is approved, and lets a peer reach a server over both families; the filter opens and shuts while
/// all runs.
fn carries(datapath: &'static str) {
    lab::test(|lab| {
        let rig = Rig::new(lab, datapath)?;
        let sluice = rig.start()?;
        let node = poll(SOON, "the router's routes at the server", || {
            let node = rig.control.nodes().pop()?;
            (!node.hostinfo["RoutableIPs"].is_null()).then_some(node)
        })?;
        ensure!(node.hostinfo["RoutableIPs"] == json!(VPC), "{node:?}");
        rig.control.approve(node.id, &VPC);
        let status = sluice.status()?;
        ensure!(status["device"]["mtu"] == 1280, "{}", status["device"]);
        let own = status["device"]["addresses"].to_string();
        ensure!(own.contains("100.64.0.1/32"), "{own}");

        let _tunnel = rig.connect()?;
        rig.wait_reaches("the laptop to reach the server")?;
        ensure!(rig.reaches(1), "over IPv6");
        ensure!(rig.registrations() == 1);

        // The filter is live.
        rig.control.set_filter(json!([]));
        wait_until(SOON, "the filter to shut", || !rig.reaches(0))?;
        rig.control
            .set_filter(json!([rule(&["100.64.0.2"], &["10.20.0.0/16"])]));
        rig.wait_reaches("the filter to open")?;
        ensure!(!rig.reaches(1), "IPv6 is not in the rule");
        sluice.stop()
    });
}

#[test]
fn carries_fast() {
    carries("ebpf");
}

#[test]
fn carries_by_the_kernel() {
    carries("kernel");
}

/// Neither a server that goes nor a router that comes again changes anything for a peer that is there.
#[test]
fn lives_without_the_server_and_across_a_restart() {
    lab::test(|lab| {
        let mut rig = Rig::new(lab, "ebpf")?;
        let sluice = rig.start()?;
        let tunnel = rig.connect()?;
        rig.wait_reaches("the laptop to reach the server")?;
        let key = rig.router_key()?;

        // The server comes again.
        let host = rig.control_host.clone();
        rig.control = rig.control.restart_on(|at| host.tcp_listener(at))?;
        ensure!(rig.reaches(0), "with the server just gone");
        wait_until(SOON, "the router to be back", || {
            rig.control.nodes().iter().any(|node| node.online)
        })?;
        ensure!(
            rig.registrations() == 0,
            "a node that is known registers not"
        );

        // The router ends, and comes again while the server is away: what it knew is in force.
        sluice.stop_by(libc::SIGUSR1)?;
        let address = (CONTROL[0], PORT).into();
        rig.control.pause();
        let sluice = rig.site.router.sluice_unsettled(&rig.config)?;
        rig.wait_reaches("the laptop to reach the server without a coordination server")?;
        let told = poll(SOON, "the problem that the server is away", || {
            let problems = problems(&sluice).ok()?;
            problems.into_iter().find(|p| p["part"] == "control")
        })?;
        ensure!(
            told["error"]
                .as_str()
                .is_some_and(|text| text.contains("no map from")),
            "{told}"
        );
        rig.control
            .resume(rig.control_host.tcp_listener(address)?)?;
        wait_until(Duration::from_secs(60), "the router to be back", || {
            problems(&sluice).is_ok_and(|problems| problems.is_empty())
        })?;
        ensure!(rig.registrations() == 0 && rig.router_key()? == key);
        ensure!(rig.control.nodes().len() == 1);
        ensure!(rig.reaches(0));
        drop(tunnel);
        sluice.stop()
    });
}

/// A key that ends is replaced by another one, by the auth key; peers stay meanwhile.
#[test]
fn an_ended_key_is_replaced() {
    lab::test(|lab| {
        let rig = Rig::new(lab, "ebpf")?;
        let sluice = rig.start()?;
        let tunnel = rig.connect()?;
        rig.wait_reaches("the laptop to reach the server")?;
        let key = rig.router_key()?;
        let id = rig.control.nodes()[0].id;
        rig.control.expire(id);
        let new = poll(SOON, "another key", || {
            rig.router_key().ok().filter(|new| *new != key)
        })?;
        wait_until(SOON, "the device to have it", || {
            sluice
                .status()
                .is_ok_and(|status| status["device"]["public_key"] == new.as_str())
        })?;
        drop(tunnel);
        let node = rig.control.introduced("laptop")?;
        let [v4, v6] = node.addresses();
        let _tunnel = rig.connect_as(&v4, &v6)?;
        rig.wait_reaches("the laptop to reach the server by the new key")?;
        ensure!(rig.control.nodes().len() == 1, "one node all the time");
        sluice.stop()
    });
}

/// A node that is ephemeral is gone from the server when the router has stopped.
#[test]
fn an_ephemeral_node_leaves() {
    lab::test(|lab| {
        let mut rig = Rig::new(lab, "kernel")?;
        if let Some(tailnet) = &mut rig.config.tailnet {
            tailnet.ephemeral = true;
        }
        let sluice = rig.start()?;
        ensure!(rig.control.nodes().len() == 1);
        sluice.stop()?;
        ensure!(rig.control.nodes().is_empty(), "{:?}", rig.control.nodes());
        // The next start is a new node.
        let sluice = rig.start()?;
        ensure!(rig.control.nodes().len() == 1);
        sluice.stop()
    });
}

/// A peer of the file reaches the server beside those of the tailnet, whatever the tailnet's filter says.
#[test]
fn static_peers_stand_beside() {
    lab::test(|lab| {
        let mut rig = Rig::new(lab, "ebpf")?;
        let phone = lab::site::Client::new("phone", 9)?;
        let mut peer = phone.peer();
        peer.allowed_ips = vec!["10.99.0.9/32".to_owned()];
        rig.config.peers = vec![peer];
        rig.control.set_filter(json!([]));
        let sluice = rig.start()?;
        let tunnel =
            Tunnel::new(&phone.key)
                .address("10.99.0.9/32")
                .peer(&rig.router_key()?, ENDPOINT, VPC);
        let _phone = rig.site.phone.wireguard_go(&tunnel)?;
        let reaches = || http::get(&rig.site.phone, (SERVER[0], 80).into(), "/bytes/1000").is_ok();
        wait_until(SOON, "the phone to reach the server", reaches)?;
        let _laptop = rig.connect()?;
        wait_until(SOON, "the laptop to be a peer", || {
            sluice
                .status()
                .is_ok_and(|status| status["peers"].as_array().is_some_and(|p| p.len() == 2))
        })?;
        ensure!(!rig.reaches(0), "the filter lets nobody in");
        ensure!(reaches());
        sluice.stop()
    });
}

/// Where no STUN server answers, connections to the relays tell which is near, and that one becomes the home.
#[test]
fn the_home_is_near_where_udp_is_blocked() {
    lab::test(|lab| {
        const NEAR: usize = 4;
        let mut rig = Rig::new(lab, "kernel")?;
        let relay = |at: u16| {
            let listener = rig
                .control_host
                .tcp_listener((CONTROL[0], 9000 + at).into())?;
            RelayServer::on(listener)
        };
        let relays = (0..6).map(relay).collect::<Result<Vec<_>>>()?;
        let mut regions = serde_json::Map::new();
        for (at, relay) in relays.iter().enumerate() {
            let number = at + 1;
            relay.faults(|faults| {
                if at != NEAR {
                    faults.slow = Duration::from_millis(300);
                }
            });
            let mut node = relay.node(&format!("{number}a"));
            node["HostName"] = json!("localhost");
            node["STUNPort"] = json!(3478);
            regions.insert(
                number.to_string(),
                json!({"RegionID": number, "RegionCode": format!("r{number}"), "Nodes": [node]}),
            );
        }
        rig.control
            .set_derp(json!({"Regions": regions, "OmitDefaultRegions": true}));
        let ca = rig.site.router.folder().join("relays.pem");
        std::fs::write(&ca, CA)?;
        let tailnet = rig.config.tailnet.as_mut().context("a tailnet")?;
        tailnet.hostname = Some("router".to_owned());
        tailnet.more.push(("ca", format!("{ca:?}")));
        let sluice = rig.start()?;
        wait_until(SOON, "the nearest relay to be the home", || {
            relays[NEAR].homes().len() == 1
        })
        .with_context(|| sluice.log())?;
        // The server knows it, and so do peers.
        wait_until(SOON, "the server to know it", || {
            let told = rig.control.node("router").map(|node| node.hostinfo);
            told.is_ok_and(|host| host["NetInfo"]["PreferredDERP"] == NEAR + 1)
        })
        .with_context(|| sluice.log())
    });
}
