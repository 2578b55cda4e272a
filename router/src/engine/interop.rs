//! An engine in a network namespace of its own against Debian's wireguard-go across a veth.
//! Needs root: fails without under `CI=true`, else is skipped.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::{Counter, Engine, Error, Failure, Options, PeerSpec};
use crate::wireguard::keys::{PresharedKey, PrivateKey};

/// How long a condition may take to come true on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// An anonymous network namespace: gone with the last process and descriptor in it.
struct Namespace(File);

impl Namespace {
    fn new() -> Self {
        std::thread::spawn(|| {
            // SAFETY: no pointers are passed; only this thread changes its namespace.
            let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(done, 0, "unshare: {}", std::io::Error::last_os_error());
            let this = Self(File::open("/proc/thread-self/ns/net").unwrap());
            run("ip", "link set lo up");
            this
        })
        .join()
        .unwrap()
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs `work` on a thread inside.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: no pointers are passed; only this thread changes its namespace.
                let done = unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(done, 0, "setns: {}", std::io::Error::last_os_error());
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn run(&self, program: &str, arguments: &str) {
        self.inside(|| run(program, arguments));
    }
}

fn run(program: &str, arguments: &str) {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {text}");
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A wireguard-go process, ended by its drop.
struct WireguardGo {
    child: Child,
    name: String,
}

impl WireguardGo {
    fn start(namespace: &Namespace, name: &str) -> Self {
        let child = namespace.inside(|| {
            Command::new("wireguard-go")
                .args(["-f", name])
                .env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        });
        let this = Self {
            child,
            name: name.to_owned(),
        };
        let socket = format!("/var/run/wireguard/{name}.sock");
        until("wireguard-go's socket", || {
            std::path::Path::new(&socket).exists()
        });
        this
    }
}

impl Drop for WireguardGo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(format!("/var/run/wireguard/{}.sock", self.name));
    }
}

fn unique(prefix: &str) -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}{:x}{serial:x}", std::process::id())
}

/// Whether tests that need root can run; prints why not.
fn rooted() -> bool {
    // SAFETY: no pointers are passed.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        assert!(std::env::var_os("CI").is_none(), "this test needs root");
        println!("skipped: needs root");
    }
    root
}

/// Router and laptop, joined by a veth, the tunnel between them up.
struct Pair {
    router: Namespace,
    laptop: Namespace,
    engine: Engine,
    _wireguard: WireguardGo,
}

impl Pair {
    fn new(offload: bool, workers: usize) -> Self {
        let (router, laptop) = (Namespace::new(), Namespace::new());
        router.run(
            "ip",
            &format!(
                "link add up0 type veth peer name up0 netns {}",
                laptop.path()
            ),
        );
        for (namespace, host) in [(&router, 1), (&laptop, 2)] {
            namespace.run("ip", &format!("addr add 192.0.2.{host}/24 dev up0"));
            namespace.run("ip", &format!("addr add 2001:db8::{host}/64 dev up0 nodad"));
            namespace.run("ip", "link set up0 up");
        }

        let (ours, theirs) = (
            PrivateKey::generate().unwrap(),
            PrivateKey::generate().unwrap(),
        );
        let preshared = PresharedKey::from_bytes([42; 32]);
        let options = Options {
            device: unique("sl"),
            mtu: 1420,
            listen_port: 0,
            fwmark: 0,
            workers: Some(workers),
            offload,
        };
        let engine = router.inside(|| Engine::start(options, &ours).unwrap());
        let (device, _) = engine.device();
        router.run("ip", &format!("addr add 10.9.0.1/24 dev {device}"));
        router.run("ip", &format!("addr add fd09::1/64 dev {device} nodad"));
        router.run("ip", &format!("link set {device} up"));

        let name = unique("wg");
        let wireguard = WireguardGo::start(&laptop, &name);
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let private = file("private", &theirs.expose_base64());
        let shared = {
            use base64::Engine as _;
            let text = base64::engine::general_purpose::STANDARD.encode(preshared.expose());
            file("preshared", &text)
        };
        laptop.run(
            "wg",
            &format!(
                "set {name} private-key {private} peer {} preshared-key {shared} \
                 allowed-ips 10.9.0.0/24,fd09::/64 endpoint 192.0.2.1:{}",
                ours.public(),
                engine.listen_port(),
            ),
        );
        laptop.run("ip", &format!("addr add 10.9.0.2/24 dev {name}"));
        laptop.run("ip", &format!("addr add fd09::2/64 dev {name} nodad"));
        laptop.run("ip", &format!("link set {name} up mtu 1420"));

        // Others come first, so that the laptop belongs to the last worker.
        let mut peers: Vec<_> = (1..workers as u8)
            .map(|seed| spec(seed, &format!("10.9.{seed}.0/24")))
            .collect();
        peers.push(PeerSpec {
            public_key: theirs.public(),
            preshared_key: Some(preshared),
            allowed_ips: vec![
                "10.9.0.2/32".parse().unwrap(),
                "fd09::2/128".parse().unwrap(),
            ],
            endpoint: None,
            keepalive: None,
        });
        engine.set_peers(&peers).unwrap();
        Self {
            router,
            laptop,
            engine,
            _wireguard: wireguard,
        }
    }

    fn counter(&self, label: &str) -> u64 {
        let counters = self.engine.counters();
        counters
            .into_iter()
            .find(|(name, _)| *name == label)
            .unwrap()
            .1
    }
}

/// Sends `data` from one namespace to an address in the other, and back; gives what came back.
fn echo(server: &Namespace, client: &Namespace, address: IpAddr, data: &[u8]) -> Vec<u8> {
    let listener = server.inside(|| TcpListener::bind((address, 0)).unwrap());
    let to: SocketAddr = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        client.inside(|| {
            let mut stream = TcpStream::connect_timeout(&to, DEADLINE).unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            stream.write_all(data).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).unwrap();
            back
        })
    })
}

/// Bytes without a short period.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    })
    .take(length)
    .collect()
}

fn ping(pair: &Pair) {
    pair.laptop.run("ping", "-c 3 -i 0.2 -W 10 10.9.0.1");
    pair.laptop.run("ping", "-c 3 -i 0.2 -W 10 fd09::1");
    pair.router.run("ping", "-c 3 -i 0.2 -W 10 10.9.0.2");
}

fn transfer(pair: &Pair) {
    let data = noise(1 << 20);
    for address in ["10.9.0.1", "fd09::1"] {
        let back = echo(&pair.router, &pair.laptop, address.parse().unwrap(), &data);
        assert!(back == data, "{address}: {} bytes came back", back.len());
    }
    for address in ["10.9.0.2", "fd09::2"] {
        let back = echo(&pair.laptop, &pair.router, address.parse().unwrap(), &data);
        assert!(back == data, "{address}: {} bytes came back", back.len());
    }
}

#[test]
fn speaks_with_wireguard_go() {
    if !rooted() {
        return;
    }
    let pair = Pair::new(true, 1);
    ping(&pair);
    transfer(&pair);

    let stats = pair.engine.peer_stats();
    assert_eq!(stats.len(), 1);
    assert!(stats[0].last_handshake.is_some());
    assert!(
        stats[0].rx_bytes > 4 << 20 && stats[0].tx_bytes > 4 << 20,
        "{stats:?}"
    );
    assert_eq!(
        stats[0].endpoint.unwrap().ip(),
        IpAddr::from([192, 0, 2, 2])
    );
    // Super-packets did the work: far fewer writes than packets.
    assert!(pair.counter("tun_writes") < pair.counter("rx_packets"));
    assert!(pair.counter("udp_sends") < pair.counter("tx_datagrams"));
    for (label, value) in pair.engine.counters() {
        // The kernel sends router solicitations into any interface.
        let strangers = label == Counter::DropNoPeer.label();
        assert!(
            strangers || !label.starts_with("drop_") || value == 0,
            "{label} {value}"
        );
    }
}

#[test]
fn several_workers_share_the_device_and_the_port() {
    if !rooted() {
        return;
    }
    // One peer, so one of the workers owns all; whatever the kernel brings to others is handed over.
    let pair = Pair::new(true, 3);
    let features = pair.engine.features();
    assert_eq!(features.workers, 3);
    assert!(
        features.udp_steering && features.tun_steering,
        "{features:?}"
    );
    ping(&pair);
    transfer(&pair);
    // Only the first initiation came to a worker by chance.
    assert!(
        pair.counter("handed_over") <= 2,
        "{}",
        pair.counter("handed_over")
    );
}

#[test]
fn works_without_offloads() {
    if !rooted() {
        return;
    }
    let pair = Pair::new(false, 1);
    assert!(!pair.engine.features().vnet_header);
    ping(&pair);
    transfer(&pair);
}

fn lone(name: &str, namespace: &Namespace) -> Result<Engine, Error> {
    let options = Options {
        device: name.to_owned(),
        mtu: 1420,
        listen_port: 0,
        fwmark: 0,
        workers: None,
        offload: true,
    };
    namespace.inside(|| Engine::start(options, &PrivateKey::from_bytes([1; 32])))
}

fn spec(seed: u8, allowed: &str) -> PeerSpec {
    PeerSpec {
        public_key: PrivateKey::from_bytes([seed; 32]).public(),
        preshared_key: None,
        allowed_ips: vec![allowed.parse().unwrap()],
        endpoint: None,
        keepalive: None,
    }
}

#[test]
fn a_taken_name_or_port_is_refused_and_the_device_goes_with_the_engine() {
    if !rooted() {
        return;
    }
    let (namespace, name) = (Namespace::new(), unique("sl"));
    let engine = lone(&name, &namespace).unwrap();
    let port = engine.listen_port();
    let again = lone(&name, &namespace).unwrap_err();
    assert!(
        matches!(&again, Error::DeviceExists(taken) if *taken == name),
        "{again}"
    );
    let options = Options {
        device: unique("sl"),
        mtu: 1420,
        listen_port: port,
        fwmark: 0,
        workers: None,
        offload: true,
    };
    let same_port = namespace.inside(|| Engine::start(options, &PrivateKey::from_bytes([1; 32])));
    let same_port = same_port.unwrap_err();
    assert!(
        matches!(&same_port, Error::Bind { port: taken, .. } if *taken == port),
        "{same_port}"
    );
    engine.shutdown();
    drop(lone(&name, &namespace).unwrap());
}

#[test]
fn deleting_the_device_is_noticed() {
    if !rooted() {
        return;
    }
    let (namespace, name) = (Namespace::new(), unique("sl"));
    let engine = lone(&name, &namespace).unwrap();
    namespace.run("ip", &format!("link del {name}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let failure = runtime.block_on(async { tokio::time::timeout(DEADLINE, engine.failed()).await });
    assert!(matches!(*failure.unwrap(), Failure::DeviceGone));
    assert!(matches!(engine.set_peers(&[]), Err(Error::Worker)));
}

#[test]
fn peers_change_without_touching_others() {
    if !rooted() {
        return;
    }
    let namespace = Namespace::new();
    let engine = lone(&unique("sl"), &namespace).unwrap();
    let keys = |engine: &Engine| {
        let mut keys: Vec<_> = engine
            .peer_stats()
            .iter()
            .map(|stats| stats.public_key)
            .collect();
        keys.sort();
        keys
    };
    let (a, b, c) = (
        spec(2, "10.0.0.0/24"),
        spec(3, "10.0.1.0/24"),
        spec(4, "10.0.0.7/32"),
    );
    engine.set_peers(&[a.clone(), b.clone()]).unwrap();
    let refused = engine
        .set_peers(&[a.clone(), spec(4, "10.0.0.5/24")])
        .unwrap_err();
    assert!(matches!(refused, Error::DoubledCidr { .. }), "{refused}");
    let refused = engine
        .set_peers(&[a.clone(), spec(1, "10.0.3.0/24")])
        .unwrap_err();
    assert!(matches!(refused, Error::OwnKey(_)), "{refused}");
    let mut expected = vec![a.public_key, b.public_key];
    expected.sort();
    assert_eq!(keys(&engine), expected);

    let moved = PeerSpec {
        endpoint: Some(SocketAddr::from(([192, 0, 2, 9], 5))),
        ..a.clone()
    };
    engine.set_peers(&[moved.clone(), c.clone()]).unwrap();
    let mut expected = vec![a.public_key, c.public_key];
    expected.sort();
    assert_eq!(keys(&engine), expected);
    let stats = engine.peer_stats();
    let stats = stats
        .iter()
        .find(|stats| stats.public_key == a.public_key)
        .unwrap();
    assert_eq!(stats.endpoint, moved.endpoint);

    let refused = engine
        .set_private_key(&PrivateKey::from_bytes([4; 32]))
        .unwrap_err();
    assert!(matches!(refused, Error::OwnKey(_)), "{refused}");
    engine
        .set_private_key(&PrivateKey::from_bytes([5; 32]))
        .unwrap();
    engine.set_peers(&[]).unwrap();
    assert_eq!(keys(&engine), []);
}
