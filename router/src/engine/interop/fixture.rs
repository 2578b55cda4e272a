//! Namespaces, wireguard-go, and an engine joined to it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::engine::control::Engine;
use crate::engine::error::Error;
use crate::engine::types::{Offloads, Options, PeerSpec};
use crate::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};

/// How long a condition may take to come true on a busy machine.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// An anonymous network namespace: gone with the last process and descriptor in it.
pub(super) struct Namespace(File);

impl Namespace {
    pub(super) fn new() -> Self {
        std::thread::spawn(|| {
            // SAFETY: no pointers are passed; only this thread changes its namespace.
            let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(done, 0, "unshare: {}", std::io::Error::last_os_error());
            let this = Self(File::open("/proc/thread-self/ns/net").unwrap());
            run("ip", "link set lo up").unwrap();
            this
        })
        .join()
        .unwrap()
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs `work` on a thread inside.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
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

    #[track_caller]
    pub(super) fn run(&self, program: &str, arguments: &str) {
        if let Err(error) = self.inside(|| run(program, arguments)) {
            panic!("{error}");
        }
    }
}

fn run(program: &str, arguments: &str) -> Result<(), String> {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{program} {arguments}: {text}")),
    }
}

pub(super) fn until(what: &str, mut condition: impl FnMut() -> bool) {
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
        // The file is there before anybody listens.
        until("wireguard-go's socket", || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
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

pub(super) fn unique(prefix: &str) -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}{:x}{serial:x}", std::process::id())
}

/// Whether tests that need root can run; prints why not.
pub(super) fn rooted() -> bool {
    // SAFETY: no pointers are passed.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        assert!(std::env::var_os("CI").is_none(), "this test needs root");
        println!("skipped: needs root");
    }
    root
}

/// Router and laptop, joined by a veth, the tunnel between them up.
pub(super) struct Pair {
    pub(super) router: Namespace,
    pub(super) laptop: Namespace,
    pub(super) engine: Engine,
    wireguard: WireguardGo,
    /// The router's public key.
    key: PublicKey,
}

impl Pair {
    pub(super) fn new(offload: bool, workers: usize) -> Self {
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
            offloads: if offload {
                Offloads::ALL
            } else {
                Offloads::NONE
            },
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
            others: Vec::new(),
            keepalive: None,
            masquerade: Vec::new(),
            roaming: true,
        });
        engine.set_peers(&peers).unwrap();
        Self {
            router,
            laptop,
            engine,
            wireguard,
            key: ours.public(),
        }
    }

    /// Tells the laptop another endpoint of the router.
    pub(super) fn aim(&self, endpoint: &str) {
        let (name, key) = (&self.wireguard.name, &self.key);
        let arguments = format!("set {name} peer {key} endpoint {endpoint}");
        self.laptop.run("wg", &arguments);
    }

    /// Where the laptop sends now.
    pub(super) fn aimed(&self) -> String {
        let output = Command::new("wg")
            .args(["show", &self.wireguard.name, "endpoints"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        text.split_whitespace()
            .last()
            .unwrap_or_default()
            .to_owned()
    }

    pub(super) fn counter(&self, label: &str) -> u64 {
        let counters = self.engine.counters();
        counters
            .into_iter()
            .find(|(name, _)| *name == label)
            .unwrap()
            .1
    }
}

/// Sends `data` from one namespace to an address in the other, and back; gives what came back.
pub(super) fn echo(
    server: &Namespace,
    client: &Namespace,
    address: IpAddr,
    data: &[u8],
) -> Vec<u8> {
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
pub(super) fn noise(length: usize) -> Vec<u8> {
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

pub(super) fn lone(name: &str, namespace: &Namespace) -> Result<Engine, Error> {
    let options = Options {
        device: name.to_owned(),
        mtu: 1420,
        listen_port: 0,
        fwmark: 0,
        workers: None,
        offloads: Offloads::ALL,
    };
    namespace.inside(|| Engine::start(options, &PrivateKey::from_bytes([1; 32])))
}

pub(super) fn spec(seed: u8, allowed: &str) -> PeerSpec {
    PeerSpec {
        public_key: PrivateKey::from_bytes([seed; 32]).public(),
        preshared_key: None,
        allowed_ips: vec![allowed.parse().unwrap()],
        endpoint: None,
        others: Vec::new(),
        keepalive: None,
        masquerade: Vec::new(),
        roaming: true,
    }
}
