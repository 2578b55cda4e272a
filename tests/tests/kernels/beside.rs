//! Beside what only a kernel of its own can have: VRFs, and no IPv6 at all. Two namespaces in the guest are
//! the laptop and the server.

use lab::site::{self, Client};

use super::*;

#[test]
fn trixie() {
    on("trixie", without_ipv6_and_in_a_vrf);
}

/// The laptop at the uplink `wan`; the server behind `lan`.
const NETWORK: &str = "set -e
for end in 'laptop wan 203.0.113' 'server lan 10.20.0'; do
    set -- $end
    ip netns add $1
    ip link add $2 type veth peer name eth0 netns $1
    ip address add $3.1/24 dev $2
    ip link set $2 up
    ip -n $1 address add $3.10/24 dev eth0
    ip -n $1 link set lo up
    ip -n $1 link set eth0 up
done
ip route add default via 203.0.113.10
ip -n server route add default via 10.20.0.1";

/// As set-ups of VRFs do (Documentation/networking/vrf.rst).
const VRF: &str = "set -e
ip link add vrf-x type vrf table 10
ip link set vrf-x up
ip route add table 10 unreachable default metric 4278198272
ip rule add priority 32765 lookup local
ip rule delete priority 0
ip link set lan master vrf-x";

struct Router {
    guest: Guest,
}

impl Router {
    fn run(&mut self, script: &str) -> anyhow::Result<String> {
        self.guest.run(script, QUICK)
    }

    /// Starts it with this configuration, and waits until it is ready.
    fn start(&mut self, config: &Config) -> anyhow::Result<()> {
        let (key, socket) = ("/tmp/router.key", "/run/router.sock");
        self.guest.write(key, &config.key.private)?;
        let file = config.to_toml("router", key.as_ref(), socket.as_ref())?;
        self.guest.write("/tmp/router.toml", &file)?;
        self.run(
            "chmod 600 /tmp/router.key
             sluice run --config /tmp/router.toml >/tmp/router.log 2>&1 & echo $! >/tmp/router.pid",
        )?;
        // It is what the service manager is told, too.
        let ready = "grep -qE ' ready( |$)' /tmp/router.log || (tail /tmp/router.log; exit 1)";
        self.guest.wait_for(ready, START).map(drop)
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        self.run("kill $(cat /tmp/router.pid)")?;
        let gone = "! kill -0 $(cat /tmp/router.pid) 2>/dev/null";
        self.guest.wait_for(gone, QUICK)?;
        let log = self.run("cat /tmp/router.log")?;
        ensure!(!log.contains("panicked"), "{log}");
        Ok(())
    }

    /// Waits until the problems are these, each by a part of its words.
    fn has_problems(&mut self, wanted: &[&str]) -> anyhow::Result<String> {
        let mut script =
            "set -e; told=$(sluice status --socket /run/router.sock | grep PROBLEM || :)
            echo \"$told\"; "
                .to_owned();
        script += &format!(
            "[ $(echo \"$told\" | grep -c PROBLEM) = {} ]\n",
            wanted.len()
        );
        for words in wanted {
            script += &format!("echo \"$told\" | grep -qF '{words}'\n");
        }
        let told = self.guest.wait_for(&script, QUICK);
        told.with_context(|| {
            let script =
                "sluice status --socket /run/router.sock; ip rule; ip route show table all";
            self.run(script).unwrap_or_default()
        })
    }

    /// Waits until the laptop reaches the server and the router by the tunnel, and the router outside of it.
    fn carries(&mut self) -> anyhow::Result<()> {
        for to in ["10.20.0.10", "100.64.0.1", "203.0.113.1"] {
            let script = format!("ip netns exec laptop /lab/bin/ping -c 1 -W 1 {to}");
            self.guest.wait_for(&script, QUICK).with_context(|| {
                let script =
                    "sluice status --socket /run/router.sock; ip rule; ip route show table all";
                self.run(script).unwrap_or_default()
            })?;
        }
        Ok(())
    }
}

fn without_ipv6_and_in_a_vrf(lab: &Lab, kernel: &Kernel) -> anyhow::Result<()> {
    let guest = Machine::new(kernel)
        .parameter("ipv6.disable=1")
        .program(sluice::binary()?, "sluice")
        .boot(&lab.host("guest")?)?;
    let mut router = Router { guest };
    router.run(NETWORK)?;
    let client = Client::new("laptop", 2)?;
    for datapath in ["ebpf", "kernel"] {
        // The usual file, with addresses and networks of both families.
        let mut config = site::config(&[&client], datapath, true)?;
        router.start(&config).context(datapath)?;
        connect(&mut router, &client, &config)?;
        let told = router.has_problems(&["IPv6"])?;
        ensure!(told.contains("ipv6.disable=1"), "{told}");
        router.carries().with_context(|| datapath)?;
        router.stop()?;

        config.addresses.pop();
        config.peers[0].allowed_ips.pop();
        config.routes.pop();
        router.run(VRF)?;
        router.start(&config).context(datapath)?;
        const THERE: &str = "ip route add 10.20.0.0/16 dev lan";
        const BACK: &str = "ip route add 100.64.0.2/32 dev sluice0 vrf vrf-x";
        router.has_problems(&[THERE, BACK])?;
        router.run(THERE)?;
        router.has_problems(&[BACK])?;
        router.run(BACK)?;
        router.has_problems(&[])?;
        router.carries().with_context(|| datapath)?;
        router.stop()?;
        // The main table's route goes with it.
        router.run(
            "set -e
             ip route flush table 10
             ip link delete vrf-x
             ip rule add priority 0 lookup local
             ip rule delete priority 32765",
        )?;
    }
    router.guest.power_off()
}

/// Connects the laptop with the guest's own WireGuard.
fn connect(router: &mut Router, client: &Client, config: &Config) -> anyhow::Result<()> {
    router.guest.write("/tmp/laptop.key", &client.key.private)?;
    let key = &config.key.public;
    let script = format!(
        "set -e
         ip -n laptop link delete wg0 2>/dev/null || :
         ip -n laptop link add wg0 type wireguard
         ip netns exec laptop wg set wg0 listen-port 51820 private-key /tmp/laptop.key \
             peer {key} endpoint 203.0.113.1:51820 allowed-ips 100.64.0.0/24,10.20.0.0/16
         ip -n laptop address add 100.64.0.2/32 dev wg0
         ip -n laptop link set wg0 up
         ip -n laptop route add 100.64.0.0/24 dev wg0
         ip -n laptop route add 10.20.0.0/16 dev wg0"
    );
    router.run(&script).map(drop)
}
