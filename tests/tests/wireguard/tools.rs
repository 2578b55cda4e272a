//! wg(8) and the text of the socket, beside wireguard-go.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context, ensure};
use lab::{Host, Keypair, Lab, Tunnel, Wireguard};

use super::{ask, set, sluice, socket};

/// Sluice and wireguard-go, without addresses and down, configured by the same key.
struct Both {
    host: Host,
    sluice: Wireguard,
    go: Wireguard,
}

impl Both {
    fn new(lab: &Lab) -> anyhow::Result<Self> {
        let host = lab.host("host")?;
        let other = lab.host("other")?;
        let tunnel = Tunnel::new(&Keypair::generate()?);
        let (sluice, go) = (sluice(&host, &tunnel)?, other.wireguard_go(&tunnel)?);
        Ok(Self { host, sluice, go })
    }

    /// Runs `wg` with these words for each device in turn; `@` stands for its name.
    fn wg(&self, words: &[&str], stdin: &str) -> anyhow::Result<[String; 2]> {
        let run = |device: &str| {
            let argv = words.iter().map(|w| if *w == "@" { device } else { w });
            let command = self.host.command(["wg"].into_iter().chain(argv));
            command.stdin(stdin).run()
        };
        Ok([run(self.sluice.device())?, run(self.go.device())?])
    }

    /// `wg showconf` of both, peers sorted: wireguard-go has no order.
    fn same(&self, when: &str) -> anyhow::Result<String> {
        let [ours, theirs] = self.wg(&["showconf", "@"], "")?.map(|conf| {
            let mut parts: Vec<String> = conf.trim().split("\n\n").map(sorted_ips).collect();
            parts[1..].sort();
            parts.join("\n\n")
        });
        ensure!(
            ours == theirs,
            "after {when}, Sluice:\n{ours}\n\nwireguard-go:\n{theirs}"
        );
        Ok(ours)
    }
}

fn sorted_ips(part: &str) -> String {
    let lines = part
        .lines()
        .map(|line| match line.strip_prefix("AllowedIPs = ") {
            Some(list) => {
                let mut list: Vec<&str> = list.split(", ").collect();
                list.sort_unstable();
                format!("AllowedIPs = {}", list.join(", "))
            }
            None => line.to_owned(),
        });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn wg_does_the_same_with_sluice_as_with_wireguard_go() {
    lab::test(|lab| {
        let both = Both::new(lab)?;
        let key = || anyhow::Ok(Keypair::generate()?);
        let (own, a, b, c) = (key()?, key()?, key()?, key()?);
        let psk = &key()?.private;
        both.wg(
            &[
                "set",
                "@",
                "private-key",
                "/dev/stdin",
                "fwmark",
                "0x1234",
                "listen-port",
                "0",
            ],
            &own.private,
        )?;
        // Ports must differ: both hosts' devices live in namespaces of their own.
        both.wg(&["set", "@", "listen-port", "7777"], "")?;
        both.same("set of the device")?;
        both.wg(
            &[
                "set",
                "@",
                "peer",
                &a.public,
                "preshared-key",
                "/dev/stdin",
                "endpoint",
                "192.0.2.1:1",
                "persistent-keepalive",
                "25",
                "allowed-ips",
                "10.0.0.0/8,10.1.0.0/16,fd00::/8",
                "peer",
                &b.public,
                "allowed-ips",
                "10.2.0.0/16",
            ],
            psk,
        )?;
        let conf = both.same("set of peers")?;
        ensure!(
            conf.contains(psk) && conf.matches("[Peer]").count() == 2,
            "{conf}"
        );
        let [ours, _] = both.wg(&["show", "@"], "")?;
        for part in [
            &*own.public,
            "fwmark: 0x1234",
            "listening port: 7777",
            "every 25 seconds",
        ] {
            ensure!(ours.contains(part), "no {part} in\n{ours}");
        }
        ensure!(!ours.contains(&own.private));

        // An allowed IP moves; a peer without any is shown.
        both.wg(
            &["set", "@", "peer", &b.public, "allowed-ips", "10.1.0.0/16"],
            "",
        )?;
        both.same("a moved allowed IP")?;
        both.wg(&["set", "@", "peer", &b.public, "allowed-ips", ""], "")?;
        both.same("no allowed IPs")?;
        both.wg(
            &["set", "@", "peer", &a.public, "preshared-key", "/dev/null"],
            "",
        )?;
        both.wg(
            &["set", "@", "peer", &a.public, "persistent-keepalive", "off"],
            "",
        )?;
        both.same("keys and keepalives taken away")?;

        let peer = |key: &Keypair, n: u8| {
            format!(
                "[Peer]\nPublicKey = {}\nAllowedIPs = 10.{n}.0.0/16\n",
                key.public
            )
        };
        both.wg(&["addconf", "@", "/dev/stdin"], &peer(&c, 3))?;
        let conf = both.same("addconf")?;
        ensure!(conf.matches("[Peer]").count() == 3, "{conf}");
        // Without a key, port and peer of before.
        let interface = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = 7778\n",
            a.private
        );
        let text = format!("{interface}{}{}", peer(&b, 4), peer(&c, 5));
        both.wg(&["syncconf", "@", "/dev/stdin"], &text)?;
        let conf = both.same("syncconf")?;
        ensure!(!conf.contains(&a.public) && conf.contains("7778"), "{conf}");
        both.wg(
            &["setconf", "@", "/dev/stdin"],
            &format!("{interface}{}", peer(&b, 6)),
        )?;
        let conf = both.same("setconf")?;
        ensure!(conf.matches("[Peer]").count() == 1, "{conf}");
        both.wg(&["set", "@", "peer", &b.public, "remove"], "")?;
        both.same("remove")?;
        both.wg(&["set", "@", "private-key", "/dev/stdin"], &b.private)?;
        both.wg(&["set", "@", "private-key", "/dev/null"], "")?;
        let conf = both.same("no private key")?;
        ensure!(!conf.contains("PrivateKey"), "{conf}");
        Ok(())
    });
}

/// What a `get` says, without what time and traffic change.
#[derive(Debug, Default, PartialEq, Eq)]
struct Configuration {
    device: Vec<String>,
    /// Lines by peer, sorted.
    peers: BTreeMap<String, Vec<String>>,
}

fn configuration(device: &str) -> anyhow::Result<Configuration> {
    let text = ask(device, "get=1\n\n")?;
    let Configuration {
        mut device,
        mut peers,
    } = Configuration::default();
    let mut current = None;
    let lines = text.strip_suffix("errno=0\n\n");
    for line in lines.context(text.clone())?.lines() {
        let key = line.split('=').next().unwrap_or_default();
        match (key, &current) {
            ("public_key", _) => {
                current = Some(line.to_owned());
                peers.insert(line.to_owned(), Vec::new());
            }
            (
                "tx_bytes" | "rx_bytes" | "last_handshake_time_sec" | "last_handshake_time_nsec",
                _,
            ) => {}
            (_, Some(peer)) => peers.entry(peer.clone()).or_default().push(line.to_owned()),
            (_, None) => device.push(line.to_owned()),
        }
    }
    for lines in peers.values_mut() {
        lines.sort();
    }
    Ok(Configuration { device, peers })
}

fn errno(device: &str, lines: &str) -> anyhow::Result<String> {
    let answer = ask(device, &format!("set=1\n{lines}\n\n"))?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

#[test]
fn sets_get_the_errno_of_wireguard_go_and_are_applied_whole_or_not_at_all() {
    lab::test(|lab| {
        let both = Both::new(lab)?;
        let [ours, theirs] = [both.sluice.device(), both.go.device()];
        let zero = "0".repeat(64);
        let key = "b8".repeat(32);
        let peer = format!("public_key={key}");
        ensure!(errno(ours, &format!("listen_port=7777\n{peer}"))? == "errno=0");
        let before = configuration(ours)?;
        let text = [
            "listen_port=70000",
            "listen_port=",
            "listen_port=x",
            "fwmark=-1",
            "fwmark=0x10",
            "fwmark=4294967296",
            "private_key=00",
            "private_key=",
            "replace_peers=false",
            "unknown=1",
            "rx_bytes=1",
            "endpoint=1.2.3.4:5",
            "public_key=00",
            "no pair",
            "=",
            " ",
        ]
        .map(str::to_owned);
        let of_peer = [
            "remove=1",
            "update_only=false",
            "preshared_key=0",
            "endpoint=1.2.3.4",
            "endpoint=host:5",
            "endpoint=1.2.3.4:70000",
            "persistent_keepalive_interval=70000",
            "persistent_keepalive_interval=off",
            "replace_allowed_ips=1",
            "allowed_ip=10.0.0.1",
            "allowed_ip=10.0.0.1/33",
            "allowed_ip=fd00::/129",
            "protocol_version=2",
            "listen_port=1",
            "unknown=1",
            "no pair",
        ]
        .map(|line| format!("{peer}\n{line}"));
        for bad in text.iter().chain(&of_peer) {
            // A good line before and after: nothing of it may stay.
            let lines = format!("fwmark=99\n{bad}\npublic_key={}", "c7".repeat(32));
            let (got, expected) = (errno(ours, &lines)?, errno(theirs, &lines)?);
            ensure!(
                got == expected && got != "errno=0",
                "{bad}: {got}, wireguard-go {expected}"
            );
            ensure!(configuration(ours)? == before, "{bad} changed something");
        }
        // The port of somebody else, and everything else of the same set.
        let _taken = both.host.udp_socket("0.0.0.0:7778".parse()?)?;
        let lines = format!("fwmark=99\nlisten_port=7778\n{peer}\nremove=true");
        ensure!(errno(ours, &lines)? == "errno=-98");
        ensure!(configuration(ours)? == before);
        // A key without strength: wireguard-go takes it, and never completes a handshake.
        ensure!(errno(ours, &format!("public_key={zero}"))? == "errno=-22");
        ensure!(configuration(ours)? == before);
        // Many requests on one connection, an error among them.
        let answer = ask(
            ours,
            "get=1\n\nset=1\nfwmark=x\n\nset=1\nfwmark=5\n\nget=1\n\n",
        )?;
        let errnos: Vec<&str> = answer.lines().filter(|l| l.starts_with("errno")).collect();
        ensure!(
            errnos == ["errno=0", "errno=-22", "errno=0", "errno=0"],
            "{answer}"
        );
        ensure!(answer.contains("fwmark=5\n"), "{answer}");
        Ok(())
    });
}

/// xorshift64, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A valid `set` out of few keys and addresses, so that sets meet.
    fn set(&mut self) -> String {
        let mut lines = Vec::new();
        if self.one_in(3) {
            lines.push(format!("fwmark={}", self.below(3)));
        }
        if self.one_in(8) {
            lines.push(format!("private_key={:02x}", self.below(4)) + &"11".repeat(31));
        }
        if self.one_in(12) {
            lines.push("replace_peers=true".to_owned());
        }
        for _ in 0..self.below(4) {
            lines.push(format!("public_key={:02x}", 0x10 + self.below(6)) + &"22".repeat(31));
            if self.one_in(6) {
                lines.push("update_only=true".to_owned());
            }
            if self.one_in(6) {
                lines.push("remove=true".to_owned());
            }
            if self.one_in(4) {
                let key = ["00", "33"][self.below(2) as usize].repeat(32);
                lines.push(format!("preshared_key={key}"));
            }
            if self.one_in(3) {
                lines.push(format!(
                    "endpoint=192.0.2.{}:{}",
                    self.below(4),
                    1 + self.below(9)
                ));
            }
            if self.one_in(3) {
                lines.push(format!(
                    "persistent_keepalive_interval={}",
                    self.below(3) * 1000
                ));
            }
            for _ in 0..self.below(4) {
                if self.one_in(5) {
                    lines.push("replace_allowed_ips=true".to_owned());
                }
                let (a, length) = (self.below(4), 8 + 8 * self.below(4));
                lines.push(match self.below(3) {
                    0 => format!("allowed_ip=fd00::{a:x}/{}", 4 * length),
                    _ => format!("allowed_ip=10.{a}.{a}.{a}/{length}"),
                });
            }
        }
        lines.join("\n")
    }
}

#[test]
fn the_same_sets_lead_to_the_same_get_as_in_wireguard_go() {
    lab::test(|lab| {
        let both = Both::new(lab)?;
        let [ours, theirs] = [both.sluice.device(), both.go.device()];
        let mut random = Random(0x5eed_cafe);
        let mut most = 0;
        for round in 0..400 {
            let lines = random.set();
            for device in [ours, theirs] {
                let errno = errno(device, &lines)?;
                ensure!(errno == "errno=0", "round {round}: {errno} for\n{lines}");
            }
            let (ours, theirs) = (configuration(ours)?, configuration(theirs)?);
            ensure!(
                ours == theirs,
                "round {round}, after\n{lines}\n\nSluice: {ours:#?}\nwireguard-go: {theirs:#?}"
            );
            most = most.max(ours.peers.len());
        }
        ensure!(most >= 4, "the sets met nothing");
        Ok(())
    });
}

#[test]
fn the_socket_is_for_its_owner_alone_and_a_stale_one_is_replaced() {
    lab::test(|lab| {
        let host = lab.host("host")?;
        let tunnel = Tunnel::new(&Keypair::generate()?);
        let device = sluice(&host, &tunnel)?;
        let name = device.device().to_owned();
        let mode = std::fs::metadata(socket(&name))?.permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        // In another namespace a device of that name could be made, but `wg` could not tell them
        // apart.
        let other = lab.host("other")?;
        let program = lab::sluice::binary()?;
        let second = other
            .command([program.as_os_str(), "wireguard".as_ref(), name.as_ref()])
            .output()?;
        ensure!(!second.status.success(), "{second:?}");
        ensure!(
            second.stderr.contains("another process"),
            "{}",
            second.stderr
        );
        set(&host, &name, "fwmark 7")?;

        // A crash leaves the socket behind.
        drop(device);
        ensure!(socket(&name).exists());
        other.run([program.as_os_str(), "wireguard".as_ref(), name.as_ref()])?;
        ensure!(other.run(["wg", "show", &name])?.contains("listening port"));
        other.ip(&format!("link del {name}"))?;
        lab::wait_until(super::SOON, "the socket to go", || !socket(&name).exists())
    });
}
