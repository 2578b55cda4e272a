//! Handshake initiations that nobody meant, and junk: who has a session keeps it, who wants one gets it.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use anyhow::ensure;
use lab::site::{self, Arms, Client, ENDPOINT, SERVER, Site};
use lab::sluice::Sluice;
use lab::{Flood, Forgery, Host, http, wait_until};

use super::{ECHO, HTTP, SOON, serve};

/// Forged initiations per second.
const RATE: u32 = 100_000;
/// Echoes asked for, one each millisecond.
const ECHOES: u16 = 2000;
/// Retries come every five seconds, and one of them must get a cookie and one more use it.
const JOIN: Duration = Duration::from_secs(60);

/// How many of [`ECHOES`] come back.
fn echoes(host: &Host) -> anyhow::Result<usize> {
    let socket = host.udp_socket("0.0.0.0:0".parse()?)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.connect(SocketAddr::new(SERVER[0], ECHO))?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut seen = vec![false; ECHOES.into()];
            let mut buffer = [0; 64];
            while !seen.iter().all(|seen| *seen)
                && let Ok(length) = socket.recv(&mut buffer)
            {
                if let [high, low, ..] = buffer[..length] {
                    seen[usize::from(u16::from_be_bytes([high, low]))] = true;
                }
            }
            seen.iter().filter(|seen| **seen).count()
        });
        for serial in 0..ECHOES {
            let mut packet = [0; 64];
            packet[..2].copy_from_slice(&serial.to_be_bytes());
            // One that is lost here counts as lost.
            let _ = socket.send(&packet);
            std::thread::sleep(Duration::from_millis(1));
        }
        receiver.join().map_err(|_| anyhow::anyhow!("the receiver"))
    })
}

/// CPU time of the router so far.
fn cpu(sluice: &Sluice) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", sluice.id()))?;
    let fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace();
    // utime and stime, in ticks of 10 ms.
    let ticks: u64 = fields
        .skip(11)
        .take(2)
        .filter_map(|n| n.parse::<u64>().ok())
        .sum();
    Ok(Duration::from_millis(10 * ticks))
}

/// What the attacker sends.
enum Attack {
    /// Initiations, signed as one who knows the router's public key, or not.
    Initiations { key: bool },
    /// Anything but WireGuard messages.
    Junk,
}

/// `sources` is how many addresses the attacker sends from; `counter`, where its datagrams end.
fn survives(attack: &Attack, sources: u32, counter: &str) {
    lab::test(|lab| {
        let site = Site::new(lab, Arms::Two)?;
        let (laptop, phone) = (Client::new("laptop", 2)?, Client::new("phone", 3)?);
        let config = site::config(&[&laptop, &phone], "kernel", true)?;
        let sluice = site.router.sluice(&config)?;
        let _tunnel = laptop.connect(&site.laptop, &config.key)?;
        let _servers = serve(&site.server)?;
        let web = SocketAddr::new(SERVER[0], HTTP);
        http::download(&site.laptop, web, 1 << 20)?;
        let calm = echoes(&site.laptop)?;

        let attacker = lab.host("attacker")?;
        lab.link(
            attacker.port("eth0").address("198.18.0.1/30"),
            site.internet.port("attacker").address("198.18.0.2/30"),
        )?;
        attacker.route("default", "198.18.0.2")?;
        attacker.ip("route add local 198.19.0.0/16 dev lo")?;
        // Spoofed addresses: what is sent to them is gone.
        site.internet.ip("route add blackhole 198.19.0.0/16")?;
        let SocketAddr::V4(to) = ENDPOINT else {
            anyhow::bail!("the endpoint is IPv4");
        };
        let flooding = attacker.flood(&Flood {
            to: SocketAddrV4::new(*to.ip(), to.port()),
            forgery: match attack {
                Attack::Initiations { key } => Forgery::Initiations {
                    key: key.then(|| config.key.public.clone()),
                },
                Attack::Junk => Forgery::Junk,
            },
            sources: (Ipv4Addr::new(198, 19, 0, 1), sources),
            rate: RATE,
        })?;
        let refused = || sluice.engine_counter(counter);
        wait_until(SOON, "the flood to arrive", || {
            refused().is_ok_and(|count| count > 10_000)
        })?;

        let (sent, before, used) = (flooding.sent(), refused()?, cpu(&sluice)?);
        let flooded = echoes(&site.laptop)?;
        let (sent, arrived) = (flooding.sent() - sent, refused()? - before);
        let used = cpu(&sluice)? - used;
        let _joined = phone.connect(&site.phone, &config.key)?;
        let joining = std::time::Instant::now();
        wait_until(JOIN, "the phone to join", || {
            let server = SERVER[0].to_string();
            site.phone
                .pings(&server, &["-c", "1", "-W", "1"])
                .unwrap_or(false)
        })?;
        println!(
            "echoes: {calm} calm, {flooded} flooded of {ECHOES}; {sent} datagrams sent, \
             {arrived} refused, {} not looked at, {used:?} of CPU; joined after {:?}",
            sluice.engine_counter("drop_stranger_full")?,
            joining.elapsed()
        );
        http::download(&site.laptop, web, 1 << 20)?;
        ensure!(arrived > 10_000, "the flood was none: {arrived} of {sent}");
        // However slow this machine is: the flood has a queue of its own.
        let lost = sluice.engine_counter("drop_receive_full")?;
        ensure!(lost == 0, "{lost} datagrams of sessions");
        // On their way to the router and back others lose some: the machine's two cores make the
        // flood, too, and run other tests. On a calm one all come back.
        ensure!(flooded * 2 > calm, "{flooded} of {calm} echoes");
        Ok(())
    });
}

#[test]
fn by_strangers() {
    survives(&Attack::Initiations { key: false }, 4096, "drop_mac");
}

#[test]
fn by_one_who_knows_the_key() {
    survives(&Attack::Initiations { key: true }, 1, "drop_limited");
}

#[test]
fn by_many_who_know_the_key() {
    survives(&Attack::Initiations { key: true }, 4096, "drop_limited");
}

#[test]
fn by_junk_of_every_first_byte() {
    survives(&Attack::Junk, 4096, "drop_other");
}
