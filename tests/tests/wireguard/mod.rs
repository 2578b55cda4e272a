//! `sluice wireguard` and the UAPI socket: wg(8), wg-quick(8) and wireguard-go are the judges.

mod device;
mod import;
mod quick;
mod roamed;
mod roaming;
mod router;
mod tools;
mod traffic;
mod uplinks;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::{Host, Keypair, Lab, Port, Tunnel, Wireguard};

const SOON: Duration = Duration::from_secs(10);
/// Longer than a handshake that was lost takes to be repeated, twice.
const REKEY: Duration = Duration::from_secs(20);
const PORT: u16 = 51820;

/// Inner addresses of Sluice's side and of wireguard-go's, by family.
const NEAR: [&str; 2] = ["192.168.241.1", "fd41::1"];
const FAR: [&str; 2] = ["192.168.241.2", "fd41::2"];
/// Outer addresses of the same.
const NEAR_OUTER: [&str; 2] = ["10.9.0.1", "2001:db8:9::1"];
const FAR_OUTER: [&str; 2] = ["10.9.0.2", "2001:db8:9::2"];

/// Sluice as a plain device.
fn sluice(host: &Host, tunnel: &Tunnel) -> anyhow::Result<Wireguard> {
    let program = lab::sluice::binary()?;
    host.wireguard_program(
        &[program.as_os_str(), "wireguard".as_ref(), "-f".as_ref()],
        tunnel,
    )
}

/// Two hosts on one wire.
struct Wire {
    near: Host,
    far: Host,
    near_key: Keypair,
    far_key: Keypair,
}

impl Wire {
    fn new(lab: &Lab, mtu: u32) -> anyhow::Result<Self> {
        let (near, far) = (lab.host("near")?, lab.host("far")?);
        lab.link(
            addressed(near.port("eth0").mtu(mtu), NEAR_OUTER),
            addressed(far.port("eth0").mtu(mtu), FAR_OUTER),
        )?;
        Ok(Self {
            near,
            far,
            near_key: Keypair::generate()?,
            far_key: Keypair::generate()?,
        })
    }

    fn near_tunnel(&self, mtu: u32, endpoint: Option<&str>) -> anyhow::Result<Tunnel> {
        let peer = (&*self.far_key.public, FAR);
        tunnel(&self.near_key, NEAR, mtu, peer, endpoint)
    }

    fn far_tunnel(&self, mtu: u32, endpoint: Option<&str>) -> anyhow::Result<Tunnel> {
        let peer = (&*self.near_key.public, NEAR);
        tunnel(&self.far_key, FAR, mtu, peer, endpoint)
    }

    /// Sluice on the near side, wireguard-go on the far side; both know the other's endpoint.
    fn connect(self, mtu: u32, family: usize) -> anyhow::Result<Pair> {
        let sluice = sluice(&self.near, &self.near_tunnel(mtu, Some(FAR_OUTER[family]))?)?;
        let go = self
            .far
            .wireguard_go(&self.far_tunnel(mtu, Some(NEAR_OUTER[family]))?)?;
        Ok(Pair {
            wire: self,
            sluice,
            go,
        })
    }
}

fn addressed(port: Port, [v4, v6]: [&str; 2]) -> Port {
    port.address(&format!("{v4}/24"))
        .address(&format!("{v6}/64"))
}

fn tunnel(
    key: &Keypair,
    own: [&str; 2],
    mtu: u32,
    (peer, theirs): (&str, [&str; 2]),
    endpoint: Option<&str>,
) -> anyhow::Result<Tunnel> {
    let endpoint = endpoint.map(|ip| anyhow::Ok((ip.parse::<std::net::IpAddr>()?, PORT).into()));
    let allowed = [format!("{}/32", theirs[0]), format!("{}/128", theirs[1])];
    Ok(Tunnel::new(key)
        .mtu(mtu)
        .address(&format!("{}/24", own[0]))
        .address(&format!("{}/64", own[1]))
        .peer(
            peer,
            endpoint.transpose()?,
            allowed.iter().map(String::as_str),
        ))
}

/// Two connected hosts.
struct Pair {
    wire: Wire,
    sluice: Wireguard,
    go: Wireguard,
}

impl Pair {
    fn new(lab: &Lab, family: usize) -> anyhow::Result<Self> {
        Wire::new(lab, 1500)?.connect(1420, family)
    }

    /// Runs `wg set` on Sluice's device with these words.
    fn set(&self, words: &str) -> anyhow::Result<()> {
        set(&self.wire.near, self.sluice.device(), words)
    }

    /// Received and sent bytes as `wg show transfer` has them: Sluice's, then wireguard-go's.
    fn transfers(&self) -> anyhow::Result<[[u64; 2]; 2]> {
        Ok([
            transfer(&self.wire.near, &self.sluice, &self.wire.far_key.public)?,
            transfer(&self.wire.far, &self.go, &self.wire.near_key.public)?,
        ])
    }

    /// Both sides ping each other over both inner families.
    fn pings(&self) -> anyhow::Result<()> {
        for (near, far) in NEAR.iter().zip(FAR) {
            ensure!(self.wire.near.pings(far, &[])?, "ping {far}");
            ensure!(self.wire.far.pings(near, &[])?, "ping {near}");
        }
        Ok(())
    }
}

fn set(host: &Host, device: &str, words: &str) -> anyhow::Result<()> {
    let argv = ["wg", "set", device].into_iter();
    host.run(argv.chain(words.split_whitespace())).map(drop)
}

/// What `wg show DEVICE WHAT` prints for a peer, in words.
fn shown(host: &Host, device: &Wireguard, what: &str, peer: &str) -> anyhow::Result<Vec<String>> {
    let table = host.run(["wg", "show", device.device(), what])?;
    let line = table.lines().find_map(|line| line.strip_prefix(peer));
    let line = line.with_context(|| format!("no peer {peer} in\n{table}"))?;
    Ok(line.split_whitespace().map(str::to_owned).collect())
}

fn transfer(host: &Host, device: &Wireguard, peer: &str) -> anyhow::Result<[u64; 2]> {
    let words = shown(host, device, "transfer", peer)?;
    let numbers: Vec<u64> = words.iter().map(|n| n.parse()).collect::<Result<_, _>>()?;
    numbers.try_into().ok().context("two numbers")
}

fn socket(device: &str) -> PathBuf {
    PathBuf::from(format!("/run/wireguard/{device}.sock"))
}

/// Sends a text to the socket of a device and yields all that comes back.
fn ask(device: &str, text: &str) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(socket(device)).context(device.to_owned())?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
