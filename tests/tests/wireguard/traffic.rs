//! Packets between Sluice and wireguard-go: both families inside and outside, sizes, counters, keys,
//! and who may send what.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, ensure};
use lab::{Host, Keypair, Lab, http};

use super::{
    FAR, FAR_OUTER, NEAR, NEAR_OUTER, PORT, Pair, REKEY, SOON, Wire, set, shown, sluice, transfer,
    tunnel,
};

const ECHO: u16 = 7;
const HTTP: u16 = 80;
const MIB: usize = 1 << 20;

/// TCP both ways, and UDP of a few sizes, from one host to another.
fn exchange(from: &Host, to: &Host, addresses: [&str; 2]) -> anyhow::Result<()> {
    let _servers = (to.http_server(HTTP)?, to.udp_echo(ECHO)?);
    for address in addresses {
        let ip: IpAddr = address.parse()?;
        http::download(from, SocketAddr::new(ip, HTTP), 2 * MIB)?;
        http::upload(from, SocketAddr::new(ip, HTTP), 2 * MIB)?;
        for size in [0, 1, 1200, 1392, 8000] {
            echo(from, SocketAddr::new(ip, ECHO), size)?;
        }
    }
    Ok(())
}

fn echo(from: &Host, to: SocketAddr, size: usize) -> anyhow::Result<()> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.udp_socket(any.parse()?)?;
    socket.set_read_timeout(Some(SOON))?;
    let sent = http::pattern(size);
    socket.send_to(&sent, to)?;
    let mut buffer = vec![0; size + 1];
    let (length, _) = socket.recv_from(&mut buffer).context("no echo")?;
    ensure!(buffer[..length] == sent, "an echo of {size} bytes is wrong");
    Ok(())
}

fn everything_passes(wire_mtu: u32, mtu: u32, family: usize) {
    lab::test(|lab| {
        let pair = Wire::new(lab, wire_mtu)?.connect(mtu, family)?;
        pair.pings()?;
        let (near, far) = (&pair.wire.near, &pair.wire.far);
        exchange(near, far, FAR)?;
        exchange(far, near, NEAR)?;
        for (host, other) in [(near, FAR), (far, NEAR)] {
            // The largest packet that the tunnel carries, and it must not be cut inside.
            for (ip, headers) in other.iter().zip([28, 48]) {
                let size = (mtu - headers).to_string();
                ensure!(
                    host.pings(ip, &["-M", "do", "-s", &size])?,
                    "{size} bytes to {ip}"
                );
            }
        }
        Ok(())
    });
}

#[test]
fn everything_passes_over_ipv4() {
    everything_passes(1500, 1420, 0);
}

#[test]
fn everything_passes_over_ipv6() {
    everything_passes(1500, 1420, 1);
}

#[test]
fn everything_passes_with_a_large_mtu() {
    everything_passes(9001, 8921, 0);
}

#[test]
fn everything_passes_where_an_ipv4_underlay_fragments() {
    everything_passes(1500, 7000, 0);
}

#[test]
fn everything_passes_where_an_ipv6_underlay_fragments() {
    everything_passes(1500, 7000, 1);
}

#[test]
fn bytes_are_counted_exactly() {
    lab::test(|lab| {
        let pair = Pair::new(lab, 0)?;
        // An initiation, a response and an empty message that confirms the session; then packets of
        // 84 and 104 bytes, padded to a multiple of 16, with 32 bytes around each.
        let (initiation, response, confirmation, v4, v6) = (148, 92, 32, 96 + 32, 112 + 32);
        let mut expected = [initiation + confirmation, response];
        ensure!(pair.transfers()? == [[0, 0], [0, 0]], "before");
        for (ip, size) in FAR.iter().zip([v4, v6]) {
            pair.wire
                .near
                .run(["ping", "-c", "5", "-i", "0.01", "-W", "10", ip])?;
            expected = expected.map(|bytes| bytes + 5 * size);
            let [sent, received] = expected;
            let got = pair.transfers()?;
            ensure!(
                got == [[received, sent], [sent, received]],
                "{got:?} instead of received {received}, sent {sent}"
            );
        }
        Ok(())
    });
}

#[test]
fn padding_ends_at_the_mtu_that_was_set_last() {
    lab::test(|lab| {
        let pair = Pair::new(lab, 0)?;
        pair.pings()?;
        let near = &pair.wire.near;
        // Not a multiple of 16: a full packet would be padded to 1408 bytes.
        near.ip(&format!("link set {} mtu 1402", pair.sluice.device()))?;
        let sent = || anyhow::Ok(pair.transfers()?[0][1]);
        let one = || {
            let before = sent()?;
            near.run(["ping", "-c", "1", "-W", "10", "-s", "1374", FAR[0]])?;
            anyhow::Ok(sent()? - before)
        };
        ensure!([1402 + 32, 1408 + 32].contains(&one()?));
        lab::wait_until(SOON, "the new MTU", || {
            one().is_ok_and(|bytes| bytes == 1402 + 32)
        })
    });
}

#[test]
fn keys_change_while_it_runs() {
    lab::test(|lab| {
        let pair = Pair::new(lab, 0)?;
        pair.pings()?;
        let (near, far) = (&pair.wire.near, &pair.wire.far);
        let file = near.folder().join("key");
        let path = file.display();
        let peer = |key: &str, ips: [&str; 2], outer: &str| {
            format!(
                "peer {key} allowed-ips {}/32,{}/128 endpoint {outer}:{PORT}",
                ips[0], ips[1]
            )
        };

        // Ours; then theirs. The peers stay as they are but for the key.
        let new = Keypair::generate()?;
        std::fs::write(&file, &new.private)?;
        pair.set(&format!("private-key {path}"))?;
        let old = &pair.wire.near_key.public;
        let by = peer(&new.public, NEAR, NEAR_OUTER[0]);
        set(far, pair.go.device(), &format!("peer {old} remove {by}"))?;
        pair.pings().context("our new key")?;
        ensure!(pair.go.has_handshake(&new.public)?);

        let theirs = Keypair::generate()?;
        std::fs::write(&file, &theirs.private)?;
        set(far, pair.go.device(), &format!("private-key {path}"))?;
        let old = &pair.wire.far_key.public;
        let by = peer(&theirs.public, FAR, FAR_OUTER[0]);
        pair.set(&format!("peer {old} remove {by}"))?;
        pair.pings().context("their new key")?;
        ensure!(
            shown(near, &pair.sluice, "endpoints", old).is_err(),
            "the old peer is gone"
        );

        // A preshared key on both sides.
        std::fs::write(&file, &Keypair::generate()?.private)?;
        pair.set(&format!("peer {} preshared-key {path}", theirs.public))?;
        let by = format!("peer {} preshared-key {path}", new.public);
        set(far, pair.go.device(), &by)?;
        lab::wait_until(REKEY, "packets with the preshared key", || {
            pair.pings().is_ok()
        })
    });
}

#[test]
fn allowed_ips_rule_who_gets_and_who_may_send_what() {
    lab::test(|lab| {
        let hosts = ["near", "one", "two"].map(|name| lab.host(name));
        let [near, one, two] = hosts.map(|host| host.expect("a host"));
        let outer = ["10.9.0.1", "10.9.0.2", "10.9.0.3"];
        let port = |(host, ip): (&Host, &str)| host.port("eth0").address(&format!("{ip}/24"));
        lab.switch("wire", [&near, &one, &two].into_iter().zip(outer).map(port))?;
        let keys = [
            Keypair::generate()?,
            Keypair::generate()?,
            Keypair::generate()?,
        ];
        let end = |n: usize, own, peer: (&str, _), outer| tunnel(&keys[n], own, 1420, peer, outer);
        let first = end(0, NEAR, (&*keys[1].public, FAR), Some(outer[1]))?;
        let device = sluice(&near, &first)?;
        let third = ["192.168.241.3", "fd41::3"];
        let allowed = format!("{}/32,{}/128", third[0], third[1]);
        let second = format!(
            "peer {} endpoint {}:{PORT} allowed-ips",
            keys[2].public, outer[2]
        );
        set(&near, device.device(), &format!("{second} {allowed}"))?;
        let back = (&*keys[0].public, NEAR);
        let go = [
            one.wireguard_go(&end(1, FAR, back, Some(outer[0]))?)?,
            two.wireguard_go(&end(2, third, back, Some(outer[0]))?)?,
        ];
        let pings = |from: &Host, to: &str| from.pings(to, &[]);
        for (host, ips) in [(&one, FAR), (&two, third)] {
            for (ip, own) in ips.iter().zip(NEAR) {
                ensure!(pings(&near, ip)? && pings(host, own)?, "{ip}");
            }
        }
        // Each has the other's address too: what it sends with that is dropped.
        for (host, go, [v4, v6]) in [(&one, &go[0], third), (&two, &go[1], FAR)] {
            host.ip(&format!("address add {v4}/32 dev {}", go.device()))?;
            host.ip(&format!("address add {v6}/128 dev {}", go.device()))?;
            for (spoofed, own) in [v4, v6].iter().zip(NEAR) {
                ensure!(
                    !host.pings(own, &["-I", spoofed])?,
                    "{spoofed} is not its own"
                );
            }
        }
        // The first one's address is given to the second.
        let counted = |go: &lab::Wireguard, host| transfer(host, go, &keys[0].public);
        set(
            &near,
            device.device(),
            &format!("{second} {allowed},{}/32", FAR[0]),
        )?;
        let before = [counted(&go[0], &one)?, counted(&go[1], &two)?];
        ensure!(pings(&near, FAR[0])?, "the second one answers for it");
        let after = [counted(&go[0], &one)?, counted(&go[1], &two)?];
        ensure!(
            after[0] == before[0] && after[1] != before[1],
            "{before:?} {after:?}"
        );
        ensure!(two.pings(NEAR[0], &["-I", FAR[0]])?, "it is its own now");
        ensure!(
            !one.pings(NEAR[0], &["-I", FAR[0]])?,
            "and not the first one's"
        );
        ensure!(
            one.pings(NEAR[1], &["-I", FAR[1]])?,
            "which keeps its other address"
        );
        // Without an owner nothing goes, and `near` says so at once.
        set(
            &near,
            device.device(),
            &format!("{second} {}/128", third[1]),
        )?;
        ensure!(!pings(&near, third[0])? && pings(&near, third[1])?);
        Ok(())
    });
}

/// A tunnel with many allowed IPs of many other peers beside the one that answers.
fn crowded(lab: &Lab) -> anyhow::Result<Pair> {
    let pair = Pair::new(lab, 0)?;
    let mut conf = String::new();
    for peer in 0..500u32 {
        let mut key = [0x40; 32];
        key[..4].copy_from_slice(&(peer + 1000).to_le_bytes());
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(conf, "public_key={hex}")?;
        for n in 0..20 {
            // Around and within the network of the far end.
            let n = peer * 20 + n;
            writeln!(
                conf,
                "allowed_ip=192.{}.{}.{}/32",
                160 + n / 65536,
                n / 256 % 256,
                n % 256
            )?;
            writeln!(conf, "allowed_ip=fd41:0:0:{:x}::/64", n + 1)?;
        }
    }
    let answer = super::ask(pair.sluice.device(), &format!("set=1\n{conf}\n"))?;
    ensure!(answer == "errno=0\n\n", "{answer}");
    Ok(pair)
}

#[test]
fn many_allowed_ips_are_kept_apart() {
    lab::test(|lab| {
        let pair = crowded(lab)?;
        let near = &pair.wire.near;
        let dump = near.run(["wg", "show", pair.sluice.device(), "allowed-ips"])?;
        ensure!(
            dump.split_whitespace()
                .filter(|word| word.contains(['.', ':']))
                .count()
                == 20_002
        );
        pair.pings()?;
        // All of one peer's move to another, and the far end's come back from a wider one.
        let wide = "192.168.0.0/16,fd41::/32";
        let far = &pair.wire.far_key.public;
        pair.set(&format!("peer {far} allowed-ips {wide}"))?;
        pair.pings()
            .context("a wider network of the far end, with holes in it")?;
        ensure!(!near.pings("192.160.0.7", &[])?);
        Ok(())
    });
}

#[test]
fn a_port_and_a_mark_change_while_packets_go() {
    lab::test(|lab| {
        let pair = Pair::new(lab, 0)?;
        let near = &pair.wire.near;
        pair.pings()?;
        let _server = pair.wire.far.http_server(HTTP)?;
        let far = SocketAddr::new(FAR[0].parse()?, HTTP);
        let busy = std::thread::scope(|scope| {
            let download = scope.spawn(|| http::download(near, far, 64 * MIB));
            for port in [7001, 7002, PORT] {
                pair.set(&format!("listen-port {port}"))?;
                // The far end learns the port from what comes from it; one that only waits for the
                // next byte would be silent, and unheard, for 15 seconds.
                ensure!(near.pings(FAR[0], &[])?, "from port {port}");
            }
            anyhow::Ok(download.join().expect("no panic"))
        })?;
        busy.context("a download while the port changed")?;
        let endpoint = shown(
            &pair.wire.far,
            &pair.go,
            "endpoints",
            &pair.wire.near_key.public,
        )?;
        ensure!(
            endpoint == [format!("{}:{PORT}", NEAR_OUTER[0])],
            "{endpoint:?}"
        );
        for (mark, passes) in [("0x77", false), ("0", true)] {
            near.ip("rule add fwmark 0x77 prohibit")?;
            pair.set(&format!("fwmark {mark}"))?;
            ensure!(near.pings(FAR[0], &[])? == passes, "fwmark {mark}");
            near.ip("rule delete fwmark 0x77")?;
        }
        Ok(())
    });
}
