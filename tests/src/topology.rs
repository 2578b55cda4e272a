//! Hosts and the links between them.

use std::ffi::OsStr;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once, OnceLock};
use std::time::Duration;

use anyhow::Context;

use crate::command::{Cmd, Process};
use crate::netns::Netns;
use crate::sweep;
use crate::wait::wait_until;

/// Long after the kernel has put an address in force.
const ADDED: Duration = Duration::from_secs(10);

static LABS: AtomicUsize = AtomicUsize::new(0);
static SWEPT: Once = Once::new();

/// A set of network namespaces and all that runs in them. Everything goes when this is dropped.
#[derive(Debug)]
pub struct Lab {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    id: String,
    folder: PathBuf,
    /// Whether processes outlive us.
    lasting: bool,
    tunnels: AtomicUsize,
    bpffs: OnceLock<Result<PathBuf, String>>,
}

impl Lab {
    /// An empty lab. The first one of a process removes what killed runs have left.
    pub fn new() -> anyhow::Result<Self> {
        Self::create(false)
    }

    /// A lab whose processes do not die with ours, so that it can be kept (see [`Lab::keep`]).
    pub fn lasting() -> anyhow::Result<Self> {
        Self::create(true)
    }

    fn create(lasting: bool) -> anyhow::Result<Self> {
        SWEPT.call_once(|| {
            if let Err(error) = sweep::sweep() {
                eprintln!("what an earlier run left could not all be removed: {error:#}");
            }
        });
        let n = LABS.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{n}", std::process::id());
        let folder = sweep::claim(&id)?;
        let shared = Shared {
            id,
            folder,
            lasting,
            tunnels: AtomicUsize::new(0),
            bpffs: OnceLock::new(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// The lab's id, part of the name of everything that it makes.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// The folder for logs and files; it goes with the lab.
    pub fn folder(&self) -> &Path {
        &self.shared.folder
    }

    /// Leaves everything in place, also when our process has ended.
    pub fn keep(self) -> anyhow::Result<()> {
        sweep::keep(self.id())?;
        std::mem::forget(self);
        Ok(())
    }

    /// Adds a host: a namespace with its loopback up, IPv6 on, and no forwarding.
    pub fn host(&self, name: &str) -> anyhow::Result<Host> {
        let netns = Netns::create(sweep::namespace(self.id(), name))?;
        let host = Host {
            name: name.to_owned(),
            netns,
            lab: Arc::clone(&self.shared),
        };
        host.ip("link set lo up")?;
        // A namespace takes some settings from the machine around it: a lab must not depend on them.
        for (key, value) in [
            ("net/ipv4/ip_forward", "0"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv6/conf/all/disable_ipv6", "0"),
            ("net/ipv6/conf/default/disable_ipv6", "0"),
            // Duplicate address detection would hold every address back for a second.
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_ra", "0"),
        ] {
            host.sysctl(key, value)?;
        }
        Ok(host)
    }

    /// Adds a router without Sluice: a host that forwards.
    pub fn gateway(&self, name: &str) -> anyhow::Result<Host> {
        let host = self.host(name)?;
        host.sysctl("net/ipv4/ip_forward", "1")?;
        host.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        Ok(host)
    }

    /// Lays a cable between two ports.
    pub fn link(&self, a: Port, b: Port) -> anyhow::Result<()> {
        a.host.ip(&format!(
            "link add name {} type veth peer name {} netns {}",
            a.name, b.name, b.host.netns.name
        ))?;
        a.configure()?;
        b.configure()
    }

    /// Joins ports by a switch, which is a bridge in a namespace of its own.
    pub fn switch(
        &self,
        name: &str,
        ports: impl IntoIterator<Item = Port>,
    ) -> anyhow::Result<Host> {
        let switch = self.host(name)?;
        switch.ip("link add name br0 type bridge")?;
        switch.ip("link set br0 up")?;
        for (n, port) in ports.into_iter().enumerate() {
            let name = format!("port{n}");
            let mtu = port.mtu;
            self.link(switch.port(&name).mtu(mtu), port)?;
            switch.ip(&format!("link set {name} master br0"))?;
        }
        Ok(switch)
    }

    /// Prints the end of every log, for the report of a failure.
    pub fn print_logs(&self) {
        const LINES: usize = 60;
        let Ok(entries) = std::fs::read_dir(self.folder()) else {
            return;
        };
        let mut logs: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension() == Some(OsStr::new("log")))
            .collect();
        logs.sort();
        for log in logs {
            let bytes = std::fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().collect();
            let name = log.file_name().unwrap_or_default().to_string_lossy();
            eprintln!("---- {name}");
            for line in &lines[lines.len().saturating_sub(LINES)..] {
                eprintln!("{line}");
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        if let Err(error) = sweep::remove(self.id()) {
            eprintln!("lab {} could not be removed: {error:#}", self.id());
        }
    }
}

/// A namespace with a name.
#[derive(Clone, Debug)]
pub struct Host {
    name: String,
    netns: Netns,
    lab: Arc<Shared>,
}

impl Host {
    /// Its name in the lab.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its namespace, for `ip netns exec`.
    pub fn namespace(&self) -> &str {
        &self.netns.name
    }

    /// A port to be joined by [`Lab::link`] or [`Lab::switch`].
    pub fn port(&self, name: &str) -> Port {
        Port {
            host: self.clone(),
            name: name.to_owned(),
            mtu: 1500,
            addresses: Vec::new(),
            offloads: Vec::new(),
            loss: None,
            delay: None,
            rate: None,
        }
    }

    /// Runs `ip` with these words, e.g. `route add 10.0.0.0/8 via 192.0.2.1`.
    pub fn ip(&self, words: &str) -> anyhow::Result<String> {
        self.run(std::iter::once("ip").chain(words.split_whitespace()))
    }

    /// Gives an address with its length to a device that is up. One of IPv6 is added for sending at
    /// once and for receiving by a work queue of the kernel: what is answered before that has run
    /// would be lost.
    pub fn add_address(&self, address: &str, device: &str) -> anyhow::Result<()> {
        self.ip(&format!("address add {address} dev {device}"))?;
        let bare = address.split('/').next().unwrap_or(address);
        wait_until(ADDED, "the kernel to deliver to a new address", || {
            let way = self.ip(&format!("route get {bare}"));
            way.is_ok_and(|way| way.starts_with("local "))
        })
        .with_context(|| format!("{}: {address}", self.name))
    }

    /// Adds a route of either family; `to` may be `default`, then of the family of `via`.
    pub fn route(&self, to: &str, via: &str) -> anyhow::Result<()> {
        self.ip(&format!("route add {to} via {via}")).map(drop)
    }

    /// Sets a sysctl, named by its path below `/proc/sys`.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.enter(|| std::fs::write(&path, value))?
            .with_context(|| format!("{}: {} = {value}", self.name, path.display()))
    }

    /// A program to run in this host.
    pub fn command(&self, argv: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Cmd {
        Cmd::new(argv).netns(Arc::clone(&self.netns.file))
    }

    /// Runs a program to its end and yields what it printed; an exit status other than 0 is an error.
    pub fn run(&self, argv: impl IntoIterator<Item = impl AsRef<OsStr>>) -> anyhow::Result<String> {
        let command = self.command(argv);
        command.run().with_context(|| format!("in {}", self.name))
    }

    /// Starts a program in the background, with its log in `<host>-<what>.log`. Start it from a
    /// thread that lives as long as it should: the program dies with that thread.
    pub fn spawn(&self, what: &str, command: Cmd) -> anyhow::Result<Process> {
        let log = self.folder().join(format!("{}-{what}.log", self.name));
        command
            .outlive_us(self.lab.lasting)
            .spawn(&log)
            .with_context(|| format!("in {}", self.name))
    }

    /// Runs `work` inside the namespace, on a thread of its own.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let name = &self.netns.name;
        self.netns.enter(work).with_context(|| name.clone())
    }

    /// A TCP listener in this host.
    pub fn tcp_listener(&self, address: SocketAddr) -> anyhow::Result<TcpListener> {
        let listener = self.enter(|| crate::listen(address))?;
        listener.with_context(|| format!("{}: listen at {address}", self.name))
    }

    /// A TCP connection from this host.
    pub fn tcp_connect(&self, to: SocketAddr, timeout: Duration) -> anyhow::Result<TcpStream> {
        let stream = self.enter(|| TcpStream::connect_timeout(&to, timeout))?;
        let stream = stream.with_context(|| format!("{}: connect to {to}", self.name))?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(stream)
    }

    /// A UDP socket in this host.
    pub fn udp_socket(&self, address: SocketAddr) -> anyhow::Result<UdpSocket> {
        let socket = self.enter(|| UdpSocket::bind(address))?;
        socket.with_context(|| format!("{}: bind {address}", self.name))
    }

    /// Loses this percentage of the packets that arrive at a device from now on.
    pub fn lose(&self, device: &str, percent: f64) -> anyhow::Result<()> {
        // Not netem: many kernels come without it, and it drops only what leaves.
        let chance = match (percent * 1000.0).round() as u32 {
            100_000.. => String::new(),
            threshold => format!("numgen random mod 100000 < {threshold}"),
        };
        let rules = format!(
            "table netdev lab-{device} {{ chain loss {{ type filter hook ingress device {device} \
             priority 0; {chance} drop; }}; }}"
        );
        let nft = self.command(["nft", "-f", "-"]).stdin(rules);
        nft.run().map(drop)
    }

    /// Whether one of three echo requests is answered within a second. `extra` are options of
    /// ping(8), e.g. `["-I", "10.0.0.1"]`.
    pub fn pings(&self, to: &str, extra: &[&str]) -> anyhow::Result<bool> {
        let fixed = ["ping", "-n", "-q", "-c3", "-i0.1", "-W1"];
        let argv = fixed.iter().chain(extra).chain([&to]);
        Ok(self.command(argv).output()?.status.success())
    }

    /// The lab's folder.
    pub fn folder(&self) -> &Path {
        &self.lab.folder
    }

    /// The lab's own BPF file system; what is pinned in it goes with the lab.
    pub fn bpffs(&self) -> anyhow::Result<&Path> {
        let mount = || sweep::mount_bpffs(&self.lab.id).map_err(|error| format!("{error:#}"));
        match self.lab.bpffs.get_or_init(mount) {
            Ok(folder) => Ok(folder),
            Err(error) => anyhow::bail!("{error}"),
        }
    }

    /// A device name for a tunnel, unique on this machine.
    pub fn tunnel_name(&self) -> String {
        let n = self.lab.tunnels.fetch_add(1, Ordering::Relaxed);
        sweep::wireguard_device(&self.lab.id, n)
    }
}

/// One end of a link, before it exists.
#[derive(Clone, Debug)]
#[must_use]
pub struct Port {
    host: Host,
    name: String,
    mtu: u32,
    addresses: Vec<String>,
    offloads: Vec<(String, bool)>,
    loss: Option<f64>,
    delay: Option<Duration>,
    rate: Option<u32>,
}

impl Port {
    /// Adds an address with its prefix length, of either family.
    pub fn address(mut self, address: &str) -> Self {
        self.addresses.push(address.to_owned());
        self
    }

    /// Sets the MTU in bytes; 1500 unless set.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Switches an offload on or off, by the name that ethtool(8) gives it.
    pub fn offload(mut self, name: &str, on: bool) -> Self {
        self.offloads.push((name.to_owned(), on));
        self
    }

    /// Loses this percentage of the packets that arrive at the port.
    pub fn loss(mut self, percent: f64) -> Self {
        self.loss = Some(percent);
        self
    }

    /// Delays packets that leave by the port. Needs netem in the kernel (see [`has_netem`]).
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// Limits what leaves by the port, in Mbit/s.
    pub fn rate(mut self, mbit: u32) -> Self {
        self.rate = Some(mbit);
        self
    }

    fn configure(&self) -> anyhow::Result<()> {
        let (host, name) = (&self.host, &self.name);
        host.ip(&format!("link set {name} mtu {} up", self.mtu))?;
        for address in &self.addresses {
            host.ip(&format!("address add {address} dev {name}"))?;
        }
        for (offload, on) in &self.offloads {
            host.run([
                "ethtool",
                "-K",
                name,
                offload,
                if *on { "on" } else { "off" },
            ])?;
        }
        if let Some(percent) = self.loss {
            host.lose(name, percent)?;
        }
        let qdisc = match (self.delay, self.rate) {
            (None, None) => return Ok(()),
            (None, Some(mbit)) => format!("tbf rate {mbit}mbit burst 128kb latency 50ms"),
            (Some(delay), rate) => {
                let rate = rate.map_or(String::new(), |mbit| format!(" rate {mbit}mbit"));
                format!("netem limit 10000 delay {}us{rate}", delay.as_micros())
            }
        };
        let words = format!("tc qdisc replace dev {name} root {qdisc}");
        host.run(words.split_whitespace()).map(drop)
    }
}

/// Whether this kernel can delay packets.
pub fn has_netem(host: &Host) -> anyhow::Result<bool> {
    let words = "tc qdisc replace dev lo root netem delay 0ms".split_whitespace();
    let possible = host.command(words).output()?.status.success();
    if possible {
        host.run("tc qdisc delete dev lo root".split_whitespace())?;
    }
    Ok(possible)
}
