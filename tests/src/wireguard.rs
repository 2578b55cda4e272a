//! WireGuard in a host: Debian's wireguard-go, other programs, or the kernel, configured by `wg`.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::command::{Cmd, Process};
use crate::topology::Host;

/// A WireGuard key pair, both halves in base64.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keypair {
    /// The private key. A lab's keys protect nothing.
    pub private: String,
    /// The public key.
    pub public: String,
}

impl Keypair {
    /// A fresh one.
    pub fn generate() -> anyhow::Result<Self> {
        let private = Cmd::new(["wg", "genkey"]).run()?.trim().to_owned();
        let public = Cmd::new(["wg", "pubkey"]).stdin(&*private).run()?;
        Ok(Self {
            private,
            public: public.trim().to_owned(),
        })
    }
}

/// A tunnel end to be brought up.
#[derive(Clone, Debug)]
#[must_use]
pub struct Tunnel {
    private: String,
    port: u16,
    mtu: u32,
    addresses: Vec<String>,
    peers: Vec<Peer>,
}

#[derive(Clone, Debug)]
struct Peer {
    public: String,
    endpoint: Option<SocketAddr>,
    allowed: Vec<String>,
}

impl Tunnel {
    /// An end with this key, MTU 1420, on port 51820.
    pub fn new(key: &Keypair) -> Self {
        Self {
            private: key.private.clone(),
            port: 51820,
            mtu: 1420,
            addresses: Vec::new(),
            peers: Vec::new(),
        }
    }

    /// Adds a tunnel address with its prefix length.
    pub fn address(mut self, address: &str) -> Self {
        self.addresses.push(address.to_owned());
        self
    }

    /// Sets the MTU in bytes.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Adds a peer. Its allowed IPs get routes into the tunnel.
    pub fn peer<'a>(
        mut self,
        public: &str,
        endpoint: impl Into<Option<SocketAddr>>,
        allowed: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        self.peers.push(Peer {
            public: public.to_owned(),
            endpoint: endpoint.into(),
            allowed: allowed.into_iter().map(str::to_owned).collect(),
        });
        self
    }

    /// The form that `wg setconf` reads.
    fn to_conf(&self) -> String {
        let mut conf = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {}\n",
            self.private, self.port
        );
        for peer in &self.peers {
            conf += &format!(
                "[Peer]\nPublicKey = {}\nAllowedIPs = {}\n",
                peer.public,
                peer.allowed.join(", ")
            );
            if let Some(endpoint) = peer.endpoint {
                conf += &format!("Endpoint = {endpoint}\n");
            }
        }
        conf
    }
}

/// A running tunnel end.
#[derive(Debug)]
#[must_use = "the tunnel goes when this is dropped"]
pub struct Wireguard {
    /// The program, or `None` for the kernel's own.
    process: Option<Process>,
    device: String,
    host: Host,
}

impl Host {
    /// Brings up a tunnel end with Debian's wireguard-go.
    pub fn wireguard_go(&self, tunnel: &Tunnel) -> anyhow::Result<Wireguard> {
        self.wireguard_program(&["wireguard-go", "--foreground"], tunnel)
    }

    /// Brings up a tunnel end with a program that takes a device name as its last argument, stays
    /// in the foreground and answers `wg`.
    pub fn wireguard_program(
        &self,
        argv: &[impl AsRef<OsStr>],
        tunnel: &Tunnel,
    ) -> anyhow::Result<Wireguard> {
        let device = self.tunnel_name();
        let name = OsStr::new(&device);
        let argv = argv.iter().map(AsRef::as_ref).chain([name]);
        let command = self
            .command(argv)
            .env("LOG_LEVEL", "error")
            // Or wireguard-go fills its log with advice.
            .env("WG_PROCESS_FOREGROUND", "1");
        let mut process = self.spawn("wireguard", command)?;
        // It answers `wg` some time after it has started, and only then is its device there. `wg`
        // must not come too early: it removes a socket that has a name and does not listen yet.
        let socket = format!("/run/wireguard/{device}.sock");
        process.ready(Duration::from_secs(10), "the device to answer `wg`", || {
            UnixStream::connect(&socket).is_ok() && self.run(["wg", "show", &device]).is_ok()
        })?;
        self.configure_wireguard(Some(process), device, tunnel)
    }

    /// Brings up a tunnel end with the kernel's WireGuard, where it has one.
    pub fn wireguard_kernel(&self, tunnel: &Tunnel) -> anyhow::Result<Wireguard> {
        let device = self.tunnel_name();
        self.ip(&format!("link add {device} type wireguard"))?;
        self.configure_wireguard(None, device, tunnel)
    }

    fn configure_wireguard(
        &self,
        process: Option<Process>,
        device: String,
        tunnel: &Tunnel,
    ) -> anyhow::Result<Wireguard> {
        self.command(["wg", "setconf", &device, "/dev/stdin"])
            .stdin(tunnel.to_conf())
            .run()?;
        self.ip(&format!("link set {device} mtu {} up", tunnel.mtu))?;
        for address in &tunnel.addresses {
            self.add_address(address, &device)?;
        }
        for cidr in tunnel.peers.iter().flat_map(|peer| &peer.allowed) {
            self.ip(&format!("route replace {cidr} dev {device}"))?;
        }
        Ok(Wireguard {
            process,
            device,
            host: self.clone(),
        })
    }
}

impl Wireguard {
    /// The name of its device.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The process id of its program; `None` for the kernel's own.
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// Whether the handshake with a peer has completed.
    pub fn has_handshake(&self, public: &str) -> anyhow::Result<bool> {
        let table = self
            .host
            .run(["wg", "show", &self.device, "latest-handshakes"])?;
        Ok(table
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .any(|(key, time)| key == public && time != "0"))
    }

    /// Forgets the sessions, as if the peers were new: the next packet begins a handshake. Without,
    /// it takes 15 seconds to notice that the other end has forgotten them.
    pub fn begin_anew(&self, tunnel: &Tunnel) -> anyhow::Result<()> {
        for peer in &tunnel.peers {
            self.host
                .run(["wg", "set", &self.device, "peer", &peer.public, "remove"])?;
        }
        self.host
            .command(["wg", "setconf", &self.device, "/dev/stdin"])
            .stdin(tunnel.to_conf())
            .run()
            .map(drop)
    }

    /// What its program has printed.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }
}
