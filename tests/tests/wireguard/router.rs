//! What `wg` sees of a running router, and what it changes.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::site::{self, Arms, Client, Running, SERVER, Site, VPC};
use lab::sluice::{Rule, Sluice};
use lab::{Host, Keypair, Server, Wireguard, http, wait_until};
use serde_json::Value;

use super::{REKEY, SOON};

const HTTP: u16 = 80;
/// Long enough for an answer, short enough to wait for none.
const BRIEFLY: Duration = Duration::from_millis(500);

/// Runs `wg`, which must succeed.
fn wg(sluice: &Sluice, words: &[&str], stdin: &str) -> anyhow::Result<String> {
    let output = sluice.wg(words, stdin)?;
    ensure!(output.status.success(), "{words:?}: {output:?}");
    Ok(output.stdout)
}

/// Runs `wg set sluice0` with these words.
fn set(sluice: &Sluice, words: &str) -> anyhow::Result<()> {
    let words: Vec<&str> = words.split_whitespace().collect();
    wg(sluice, &[&["set", "sluice0"][..], &words].concat(), "").map(drop)
}

/// What `wg show sluice0 WHAT` prints for a peer.
fn shown(sluice: &Sluice, what: &str, peer: &str) -> anyhow::Result<Option<String>> {
    let table = wg(sluice, &["show", "sluice0", what], "")?;
    let line = table.lines().find_map(|line| line.strip_prefix(peer));
    Ok(line.map(|line| line.trim().to_owned()))
}

fn cidrs(client: &Client) -> String {
    client.peer().allowed_ips.join(",")
}

fn changed(sluice: &Sluice) -> anyhow::Result<bool> {
    let changed = sluice.status()?["changed_by_wg"].as_bool();
    changed.context("no word of it in the status")
}

fn reaches(host: &Host, from: &str) -> anyhow::Result<bool> {
    let server = SERVER[usize::from(from.contains(':'))];
    host.pings(&server.to_string(), &["-I", from])
}

/// A router with a laptop of the file that is connected, and a phone that it does not know.
struct Fixture {
    site: Site,
    config: lab::sluice::Config,
    sluice: Sluice,
    laptop: Client,
    phone: Client,
    tunnel: Wireguard,
    _server: Server,
}

impl Fixture {
    fn new(lab: &lab::Lab, datapath: &'static str, rules: Vec<Rule>) -> anyhow::Result<Self> {
        let site = Site::new(lab, Arms::Two)?;
        let (laptop, phone) = (Client::new("laptop", 2)?, Client::new("phone", 3)?);
        let mut config = site::config(&[&laptop], datapath, true)?;
        config.rules = rules;
        let sluice = site.router.sluice(&config)?;
        let tunnel = laptop.connect(&site.laptop, &config.key)?;
        let server = site.server.http_server(HTTP)?;
        for server in SERVER {
            ensure!(site.laptop.pings(&server.to_string(), &[])?, "{server}");
        }
        Ok(Self {
            site,
            config,
            sluice,
            laptop,
            phone,
            tunnel,
            _server: server,
        })
    }

    /// Has `wg` add the phone, and connects it.
    fn add_phone(&self) -> anyhow::Result<Wireguard> {
        let (key, cidrs) = (&self.phone.key.public, cidrs(&self.phone));
        set(&self.sluice, &format!("peer {key} allowed-ips {cidrs}"))?;
        self.phone.connect(&self.site.phone, &self.config.key)
    }

    /// A connection of each family into the VPC.
    fn connections(&self, host: &Host) -> anyhow::Result<Vec<TcpStream>> {
        let addresses = SERVER.map(|server| SocketAddr::new(server, HTTP));
        let streams = addresses.map(|address| host.tcp_connect(address, SOON));
        streams.into_iter().collect()
    }

    fn handshake(&self) -> anyhow::Result<Option<String>> {
        shown(&self.sluice, "latest-handshakes", &self.laptop.key.public)
    }
}

/// Whether connections still carry something.
fn carry(streams: Vec<TcpStream>, patience: Duration) -> anyhow::Result<bool> {
    let mut all = Vec::new();
    for mut stream in streams {
        stream.set_read_timeout(Some(patience))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        all.push(stream.read(&mut [0; 64]).is_ok_and(|count| count > 0));
    }
    ensure!(all.windows(2).all(|pair| pair[0] == pair[1]), "{all:?}");
    Ok(all[0])
}

#[test]
fn wg_shows_a_router() {
    lab::test(|lab| {
        let run = Running::new(lab, Arms::Two, "kernel", true)?;
        assert!(run.site.laptop.pings(&SERVER[0].to_string(), &[])?);
        let shown = wg(&run.sluice, &["show", "sluice0"], "")?;
        for part in [
            "interface: sluice0",
            &*run.config.key.public,
            "listening port: 51820",
            &*run.client.key.public,
            "endpoint: 203.0.113.10:51820",
            "allowed ips: 100.64.0.2/32, fd64::2/128",
            "latest handshake",
        ] {
            ensure!(shown.contains(part), "no {part} in\n{shown}");
        }
        let conf = wg(&run.sluice, &["showconf", "sluice0"], "")?;
        ensure!(conf.contains(&run.config.key.private), "{conf}");
        run.sluice.stop()
    });
}

#[test]
fn a_peer_comes_and_goes_on_the_fast_path() {
    a_peer_comes_and_goes("ebpf");
}

#[test]
fn a_peer_comes_and_goes_on_the_kernel_path() {
    a_peer_comes_and_goes("kernel");
}

/// The laptop notices nothing of it.
fn a_peer_comes_and_goes(datapath: &'static str) {
    lab::test(|lab| {
        let it = Fixture::new(lab, datapath, Vec::new())?;
        let handshake = it.handshake()?;
        let of_laptop = it.connections(&it.site.laptop)?;
        ensure!(!changed(&it.sluice)?);
        let tunnel = it.add_phone()?;
        for server in SERVER {
            http::download(&it.site.phone, SocketAddr::new(server, HTTP), 1 << 20)?;
        }
        let status = it.sluice.status()?;
        let peers = status["peers"].as_array().context("no peers")?;
        ensure!(
            peers.len() == 2 && peers[0]["name"] == "laptop" && peers[1]["name"] == Value::Null,
            "{peers:?}"
        );
        ensure!(changed(&it.sluice)?);
        let said = "`wg` has changed the router; this holds until the configuration is read again";
        ensure!(it.sluice.log().matches(said).count() == 1);

        let of_phone = it.connections(&it.site.phone)?;
        let key = &it.phone.key.public;
        set(&it.sluice, &format!("peer {key} remove"))?;
        ensure!(!carry(of_phone, BRIEFLY)?, "the phone's connections go on");
        for address in &it.phone.addresses {
            ensure!(!reaches(&it.site.phone, &address.to_string())?);
        }
        ensure!(shown(&it.sluice, "allowed-ips", key)?.is_none());
        ensure!(!changed(&it.sluice)?, "as the file says again");
        ensure!(carry(of_laptop, SOON)?, "the laptop's connections ended");
        ensure!(it.handshake()? == handshake);
        drop(tunnel);
        it.sluice.stop()
    });
}

#[test]
fn allowed_ips_and_rules_move_with_their_peers_on_the_fast_path() {
    allowed_ips_and_rules_move_with_their_peers("ebpf");
}

#[test]
fn allowed_ips_and_rules_move_with_their_peers_on_the_kernel_path() {
    allowed_ips_and_rules_move_with_their_peers("kernel");
}

fn allowed_ips_and_rules_move_with_their_peers(datapath: &'static str) {
    lab::test(|lab| {
        let rule = |from: &str, to: &[&str]| Rule {
            from: vec![from.to_owned()],
            to: to.iter().map(|&cidr| cidr.to_owned()).collect(),
            protocols: Vec::new(),
        };
        let rules = vec![rule("laptop", &VPC), rule("100.64.0.3/32", &VPC[..1])];
        let it = Fixture::new(lab, datapath, rules)?;
        let tunnel = it.add_phone()?;
        let (laptop, phone) = (&it.site.laptop, &it.site.phone);
        ensure!(reaches(phone, "100.64.0.3")?, "a rule is for this address");
        ensure!(!reaches(phone, "fd64::3")?, "none is for this");
        let handshake = it.handshake()?;

        // The laptop's address goes to the phone, but what the laptop may does not.
        phone.ip(&format!(
            "address add 100.64.0.2/32 dev {}",
            tunnel.device()
        ))?;
        ensure!(!reaches(phone, "100.64.0.2")?);
        let of_laptop = &it.laptop.key.public;
        let of_phone = &it.phone.key.public;
        let cidrs = format!("{},100.64.0.2/32", cidrs(&it.phone));
        set(&it.sluice, &format!("peer {of_phone} allowed-ips {cidrs}"))?;
        ensure!(shown(&it.sluice, "allowed-ips", of_laptop)?.as_deref() == Some("fd64::2/128"));
        ensure!(!reaches(laptop, "100.64.0.2")?, "it is the phone's now");
        ensure!(reaches(laptop, "fd64::2")?);
        ensure!(!reaches(phone, "100.64.0.2")?, "no rule is for the phone");
        ensure!(reaches(phone, "100.64.0.3")?);

        // What the laptop may goes where the laptop goes.
        laptop.ip(&format!(
            "address add 100.64.0.9/32 dev {}",
            it.tunnel.device()
        ))?;
        ensure!(!reaches(laptop, "100.64.0.9")?);
        let cidrs = "100.64.0.9/32,fd64::2/128";
        set(&it.sluice, &format!("peer {of_laptop} allowed-ips {cidrs}"))?;
        ensure!(reaches(laptop, "100.64.0.9")? && reaches(laptop, "fd64::2")?);
        ensure!(it.handshake()? == handshake, "one session all along");

        // A rule for nobody does not open the door to all.
        set(&it.sluice, &format!("peer {of_laptop} remove"))?;
        ensure!(!reaches(laptop, "100.64.0.9")? && !reaches(phone, "100.64.0.2")?);
        ensure!(reaches(phone, "100.64.0.3")?);
        it.sluice.stop()
    });
}

#[test]
fn keys_change_while_it_runs() {
    lab::test(|lab| {
        let it = Fixture::new(lab, "ebpf", Vec::new())?;
        let tunnel = it.add_phone()?;
        ensure!(reaches(&it.site.phone, "100.64.0.3")?);
        let of_phone = shown(&it.sluice, "latest-handshakes", &it.phone.key.public)?;
        let peer = &it.laptop.key.public;

        let preshared = Keypair::generate()?.private;
        let words = [
            "set",
            "sluice0",
            "peer",
            peer,
            "preshared-key",
            "/dev/stdin",
        ];
        wg(&it.sluice, &words, &preshared)?;
        ensure!(!reaches(&it.site.laptop, "100.64.0.2")?, "without its half");
        let host = &it.site.laptop;
        let words = ["wg", "set", it.tunnel.device(), "peer"];
        let words = words.into_iter().chain([&*it.config.key.public]);
        let words = words.chain(["preshared-key", "/dev/stdin"]);
        host.command(words).stdin(&*preshared).run()?;
        wait_until(REKEY, "a session with the preshared key", || {
            reaches(host, "100.64.0.2").unwrap_or(false)
        })?;
        ensure!(reaches(&it.site.phone, "100.64.0.3")?);
        let now = shown(&it.sluice, "latest-handshakes", &it.phone.key.public)?;
        ensure!(now == of_phone, "the phone's session is another");

        // Everybody must know the new key. The peers and their counters stay.
        let key = Keypair::generate()?;
        let words = ["set", "sluice0", "private-key", "/dev/stdin"];
        wg(&it.sluice, &words, &key.private)?;
        ensure!(it.sluice.status()?["device"]["public_key"] == *key.public);
        ensure!(!reaches(&it.site.phone, "100.64.0.3")?);
        drop(tunnel);
        let _tunnel = it.phone.connect(&it.site.phone, &key)?;
        wait_until(REKEY, "a session with the new key", || {
            reaches(&it.site.phone, "100.64.0.3").unwrap_or(false)
        })?;
        ensure!(
            !it.sluice.log().contains(&key.private) && !it.sluice.log().contains(&preshared),
            "a secret is in the log"
        );
        it.sluice.stop()
    });
}

#[test]
fn what_wg_shows_it_can_set() {
    lab::test(|lab| {
        let it = Fixture::new(lab, "ebpf", Vec::new())?;
        let key = &it.laptop.key.public;
        let handshake = it.handshake()?;
        let of_laptop = it.connections(&it.site.laptop)?;
        let conf = wg(&it.sluice, &["showconf", "sluice0"], "")?;
        ensure!(conf.contains("Endpoint = 203.0.113.10:51820"), "{conf}");
        let with = |how: &str, conf: &str| wg(&it.sluice, &[how, "sluice0", "/dev/stdin"], conf);
        with("syncconf", &conf)?;
        with("addconf", &conf)?;
        ensure!(!changed(&it.sluice)? && !it.sluice.log().contains("has changed the router"));
        ensure!(it.handshake()? == handshake);
        ensure!(carry(of_laptop, SOON)?);
        let transfer = shown(&it.sluice, "transfer", key)?.context("no peer")?;
        let bytes = |text: &str| text.split('\t').next()?.parse::<u64>().ok();
        ensure!(
            bytes(&transfer).is_some_and(|bytes| bytes > 1000),
            "{transfer}"
        );

        // A peer more, and in the next file it is missing.
        let more = format!(
            "[Peer]\nPublicKey = {}\nAllowedIPs = {}\n",
            it.phone.key.public,
            cidrs(&it.phone)
        );
        with("addconf", &more)?;
        let _tunnel = it.phone.connect(&it.site.phone, &it.config.key)?;
        ensure!(reaches(&it.site.phone, "100.64.0.3")?);
        ensure!(changed(&it.sluice)?);
        with("syncconf", &conf)?;
        ensure!(!reaches(&it.site.phone, "100.64.0.3")?);
        ensure!(!changed(&it.sluice)? && it.handshake()? == handshake);

        // As with every WireGuard, setconf makes all peers anew, where they are.
        with("setconf", &format!("{conf}\n{more}"))?;
        let table = wg(&it.sluice, &["show", "sluice0", "endpoints"], "")?;
        ensure!(table.lines().count() == 2, "{table}");
        it.tunnel.begin_anew(&it.laptop.tunnel(&it.config.key))?;
        wait_until(REKEY, "the laptop to be back", || {
            reaches(&it.site.laptop, "100.64.0.2").unwrap_or(false)
        })?;
        wait_until(REKEY, "the phone to be back", || {
            reaches(&it.site.phone, "100.64.0.3").unwrap_or(false)
        })?;
        it.sluice.stop()
    });
}

#[test]
fn a_set_that_does_not_fit_changes_nothing() {
    lab::test(|lab| {
        let it = Fixture::new(lab, "ebpf", Vec::new())?;
        let handshake = it.handshake()?;
        let conf = wg(&it.sluice, &["showconf", "sluice0"], "")?;
        let taken = it.site.router.udp_socket("0.0.0.0:7777".parse()?)?;
        let (laptop, phone) = (&it.laptop.key.public, &it.phone.key.public);
        let invalid = "Invalid argument";
        for (words, error, reason) in [
            (
                format!("peer {phone} allowed-ips 10.20.0.20/32"),
                invalid,
                "overlaps",
            ),
            (
                format!("peer {phone} allowed-ips 10.30.0.0/24"),
                invalid,
                "the network of lan",
            ),
            (
                format!("peer {laptop} remove peer {phone} allowed-ips 0.0.0.0/0"),
                invalid,
                "would take everything",
            ),
            (
                format!("private-key /dev/null peer {laptop} remove"),
                invalid,
                "its private key",
            ),
            (
                "fwmark 0x77".to_owned(),
                "Operation not permitted",
                "firewall mark 0x77",
            ),
            (
                format!("listen-port 7777 peer {laptop} remove"),
                "Address already in use",
                "port 7777",
            ),
        ] {
            let words: Vec<&str> = words.split_whitespace().collect();
            let output = it
                .sluice
                .wg(&[&["set", "sluice0"][..], &words].concat(), "")?;
            ensure!(!output.status.success(), "{words:?}");
            ensure!(output.stderr.contains(error), "{words:?}: {output:?}");
            let log = it.sluice.log();
            let mut told = log.lines().filter(|line| line.contains("is refused"));
            let last = told.next_back().unwrap_or_default();
            ensure!(last.contains(reason), "{words:?}: {last}");
        }
        drop(taken);
        // A file for `wg` without an [Interface] would take the key away.
        let peers = conf.split_once("[Peer]").context("no peer")?.1;
        let peers = format!("[Peer]{peers}");
        let output = it
            .sluice
            .wg(&["setconf", "sluice0", "/dev/stdin"], &peers)?;
        ensure!(!output.status.success(), "{output:?}");
        ensure!(wg(&it.sluice, &["showconf", "sluice0"], "")? == conf);
        ensure!(!changed(&it.sluice)? && it.handshake()? == handshake);
        ensure!(reaches(&it.site.laptop, "100.64.0.2")?);
        it.sluice.stop()
    });
}

#[test]
fn the_file_counts_when_it_is_read_again() {
    lab::test(|lab| {
        let mut it = Fixture::new(lab, "ebpf", Vec::new())?;
        let conf = wg(&it.sluice, &["showconf", "sluice0"], "")?;
        let as_the_file_says = |sluice: &Sluice| {
            let now = wg(sluice, &["showconf", "sluice0"], "");
            now.is_ok_and(|now| now == conf) && changed(sluice).is_ok_and(|changed| !changed)
        };
        let phone = &it.phone.key.public;
        for words in [
            format!("peer {phone} allowed-ips {}", cidrs(&it.phone)),
            format!("peer {} persistent-keepalive 9", it.laptop.key.public),
            "listen-port 51999".to_owned(),
        ] {
            let handshake = it.handshake()?;
            set(&it.sluice, &words)?;
            ensure!(changed(&it.sluice)? && !as_the_file_says(&it.sluice));
            it.sluice.reload(&it.config)?;
            wait_until(SOON, "the file to count", || as_the_file_says(&it.sluice))?;
            ensure!(it.handshake()? == handshake, "after {words}");
        }
        ensure!(reaches(&it.site.laptop, "100.64.0.2")?);

        // A file with a mistake is no file.
        set(&it.sluice, "listen-port 51999")?;
        let mut broken = it.config.clone();
        broken.routes[0].cidr = "10.20.0.0/99".to_owned();
        it.sluice.reload(&broken)?;
        wait_until(SOON, "the mistake to be told", || {
            let status = it.sluice.status().unwrap_or_default();
            status["problems"].to_string().contains("10.20.0.0/99")
        })?;
        ensure!(changed(&it.sluice)?);
        ensure!(it.sluice.status()?["device"]["listen_port"] == 51999);

        // And so does another start, also of a daemon that takes the flows over.
        it.sluice.stop_by(libc::SIGUSR1)?;
        let sluice = it.site.router.sluice(&it.config)?;
        let status = sluice.status()?;
        ensure!(status["device"]["listen_port"] == 51820 && status["changed_by_wg"] == false);
        sluice.stop()
    });
}

/// Tells the laptop where the router is now.
fn find_at(site: &Site, tunnel: &Wireguard, router: &Keypair, port: u16) -> anyhow::Result<()> {
    let endpoint = SocketAddr::new(site::ENDPOINT.ip(), port);
    let words = format!("peer {} endpoint {endpoint}", router.public);
    super::set(&site.laptop, tunnel.device(), &words)
}

#[test]
fn the_port_changes_while_it_runs() {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let client = Client::new("laptop", 2)?;
        let mut config = site::config(&[&client], "ebpf", true)?;
        config.guard = true;
        let mut sluice = site.router.sluice(&config)?;
        ensure!(sluice.status()?["uplink_guard"]["interface"] == "wan");
        let tunnel = client.connect(&site.laptop, &config.key)?;
        ensure!(reaches(&site.laptop, "100.64.0.2")?);
        let handshake = |sluice| shown(sluice, "latest-handshakes", &client.key.public);
        let before = handshake(&sluice)?;

        // The session outlives its port, once the laptop knows of it.
        set(&sluice, "listen-port 51999")?;
        let status = sluice.status()?;
        ensure!(status["device"]["listen_port"] == 51999, "{status:#}");
        find_at(&site, &tunnel, &config.key, 51999)?;
        for from in ["100.64.0.2", "fd64::2"] {
            ensure!(reaches(&site.laptop, from)?, "{from} by the new port");
        }
        ensure!(handshake(&sluice)? == before);

        // The file may do the same.
        config.listen_port = 51777;
        sluice.reload(&config)?;
        wait_until(SOON, "the port of the file", || {
            let status = sluice.status().unwrap_or_default();
            status["device"]["listen_port"] == 51777
        })?;
        ensure!(sluice.status()?["problems"] == Value::Array(Vec::new()));
        find_at(&site, &tunnel, &config.key, 51777)?;
        ensure!(reaches(&site.laptop, "100.64.0.2")?);

        // A port that is taken: the old file stays in force, whole.
        let _taken = site.router.udp_socket("0.0.0.0:7777".parse()?)?;
        let mut other = config.clone();
        other.listen_port = 7777;
        other.peers.clear();
        sluice.reload(&other)?;
        wait_until(SOON, "the problem to be told", || {
            let status = sluice.status().unwrap_or_default();
            status["problems"].to_string().contains("port 7777")
        })?;
        ensure!(reaches(&site.laptop, "100.64.0.2")?);
        sluice.stop()
    });
}
