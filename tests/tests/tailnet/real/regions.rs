//! Two regions with a real relay each: the router's home moves, and what goes through the relays goes on.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::relay_server::StunServer;
use lab::site::SERVER;
use lab::tailnet::{CONTROL, Nat, Tailnet};
use lab::tailscaled::{self, Derper};
use lab::{Lab, Stream, http, wait_until};
use serde_json::{Value, json};

use super::SOON;
use super::diagnosis;
use super::paths::Apart;

const ECHO: u16 = 7777;
const HTTP: u16 = 80;
/// One transfer of several in a row, at a Mbyte each second.
const SIZE: usize = 6 << 20;
/// No transfer may stand still for longer.
const STALL: Duration = Duration::from_secs(15);

/// A client without UDP, a router with a public address, and regions whose distance can be set.
struct Regions {
    apart: Apart,
    relays: [Value; 2],
    stun: [StunServer; 2],
    _second: Derper,
}

impl Regions {
    /// The router's home is the first, which is nearer; the client has all that it gets at a Mbyte each second.
    fn new(lab: &Lab) -> Result<Self> {
        let mut parts = None;
        let before = |net: &Tailnet| {
            let first = net.derper.as_ref().context("no relay")?;
            let second = net.second_relay(lab)?;
            let socket = || net.control_host.udp_socket(SocketAddr::new(CONTROL[0], 0));
            let stun = [StunServer::on(socket()?)?, StunServer::on(socket()?)?];
            stun[0].faults(|faults| faults.late = Duration::from_millis(40));
            stun[1].faults(|faults| faults.late = Duration::from_millis(90));
            let relays = [
                region(first.region(1)?, &stun[0])?,
                region(second.region(2)?, &stun[1])?,
            ];
            net.control.set_derp(map(&relays));
            parts = Some((relays, stun, second));
            Ok(())
        };
        let apart = Apart::prepared(lab, Nat::NoUdp, None, before, |_| {})?;
        let (relays, stun, _second) = parts.context("they were started")?;
        let slow = "tc qdisc replace dev lan root tbf rate 8mbit burst 128kb latency 50ms";
        apart.hotel.gateway.run(slow.split(' '))?;
        let regions = Self {
            apart,
            relays,
            stun,
            _second,
        };
        regions.apart.wait_reach()?;
        regions.wait_home(1)?;
        Ok(regions)
    }

    /// The region that the router takes for its home.
    fn home(&self) -> Result<String> {
        let status = self.apart.sluice.status()?;
        let home = status["tailnet"]["home_relay"].as_str();
        Ok(home.unwrap_or_default().to_owned())
    }

    /// The region that is nearest to the router, measured now.
    fn nearest(&self) -> Option<u64> {
        let told = self.apart.sluice.command(&["netcheck", "--format=json"]);
        let told: Value = serde_json::from_str(&told.ok()?.stdout).ok()?;
        told["PreferredDERP"].as_u64()
    }

    /// Waits until a region is the router's home, and the server and the client know it.
    fn wait_home(&self, number: u64) -> Result<()> {
        let Apart {
            client,
            sluice,
            net,
            ..
        } = &self.apart;
        wait_until(2 * SOON, &format!("region {number} to be the home"), || {
            self.nearest();
            self.home().is_ok_and(|home| home == format!("r{number}"))
        })
        .with_context(|| sluice.log())?;
        wait_until(SOON, "the server to know the home", || {
            let node = net.control.node("router");
            node.is_ok_and(|node| node.hostinfo["NetInfo"]["PreferredDERP"] == number)
        })?;
        let code = format!("r{number}");
        client.wait_peer("router", "its home", |peer| peer["Relay"] == code.as_str())?;
        Ok(())
    }

    /// Has something go on in the middle of transfers, which must be byte-exact and not stand still. They begin before
    /// it and end after it.
    fn during_transfers(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let site = &self.apart.net.site;
        let (host, at) = (
            self.apart.hotel.host.clone(),
            SocketAddr::new(SERVER[0], HTTP),
        );
        let _servers = (site.server.http_server(HTTP)?, site.server.udp_echo(ECHO)?);
        let stream = Stream::start(&host, SocketAddr::new(SERVER[0], ECHO))?;
        stream.wait(50)?;
        let is_over = AtomicBool::new(false);
        let transfers = std::thread::scope(|scope| {
            let transfers = scope.spawn(|| -> Result<u32> {
                let mut count = 0;
                while !is_over.load(Ordering::Relaxed) {
                    http::download(&host, at, SIZE)?;
                    count += 1;
                }
                Ok(count)
            });
            let changed = change(self);
            is_over.store(true, Ordering::Relaxed);
            let transfers = transfers.join();
            changed?;
            transfers.map_err(|_| anyhow::anyhow!("the thread of transfers"))?
        });
        let transfers =
            transfers.with_context(|| diagnosis(&self.apart.client, &self.apart.sluice))?;
        stream.wait(50)?;
        let counted = stream.end()?;
        eprintln!("{transfers} transfers while the home moved: {counted:?}");
        ensure!(transfers > 0 && counted.gap < STALL, "{counted:?}");
        self.apart.wait_way(false)
    }
}

/// A region whose STUN server is one that can be late.
fn region(mut region: Value, stun: &StunServer) -> Result<Value> {
    let number = region["RegionID"].clone();
    let nodes = region["Nodes"].as_array_mut().context("no nodes")?;
    for node in nodes.iter_mut() {
        node["STUNPort"] = json!(-1);
    }
    let at = stun.address();
    nodes.push(json!({
        "Name": format!("{number}s"), "RegionID": number, "HostName": at.ip().to_string(),
        "IPv4": at.ip().to_string(), "IPv6": "none", "STUNOnly": true, "STUNPort": at.port(),
    }));
    Ok(region)
}

fn map(regions: &[Value]) -> Value {
    let number = |region: &Value| region["RegionID"].to_string();
    let all = regions
        .iter()
        .map(|region| (number(region), region.clone()));
    let all: serde_json::Map<String, Value> = all.collect();
    json!({"Regions": all, "OmitDefaultRegions": true})
}

/// Another region is nearer from now on. It is not the home before the server can hear of it.
#[test]
fn the_home_moves_to_a_nearer_region_when_the_server_hears_of_it() {
    tailscaled::test(|lab| {
        let mut regions = Regions::new(lab)?;
        regions.during_transfers(|regions| {
            regions.apart.net.pause_control();
            wait_until(SOON, "the server to be missed", || {
                let status = regions.apart.sluice.status().unwrap_or_default();
                status["tailnet"]["connected_since"].is_null()
            })?;
            regions.stun[1].faults(|faults| faults.late = Duration::ZERO);
            wait_until(SOON, "region 2 to be nearest", || {
                regions.nearest() == Some(2)
            })?;
            ensure!(regions.home()? == "r1", "the home has moved unheard");
            regions.apart.net.resume_control()?;
            regions.wait_home(2)
        })
    });
}

/// The home's region is in the map no more, and then its relay is gone.
#[test]
fn a_home_that_leaves_the_map_is_left() {
    tailscaled::test(|lab| {
        let mut regions = Regions::new(lab)?;
        regions.during_transfers(|regions| {
            let net = &regions.apart.net;
            net.control.set_derp(map(&regions.relays[1..]));
            regions.wait_home(2)?;
            regions.apart.net.relay()?.stop();
            let rest = &regions.apart.client;
            rest.wait_peer("router", "the other region", |peer| peer["Relay"] == "r2")
                .map(drop)
        })
    });
}
