//! The unit under a real systemd: a Debian in a guest, where Sluice is installed as docs/operations.md
//! says. Two namespaces in the guest are the laptop and the server.

use std::path::Path;

use lab::vm::System;

use super::*;

/// For what takes many steps, or a client that takes 15 s to notice that its session is gone.
pub(super) const LONGER: Duration = Duration::from_secs(120);

macro_rules! on_every_system {
    ($($release:ident),+) => {
        $(
            #[test]
            fn $release() {
                match System::find(stringify!($release)) {
                    Ok(system) => on(stringify!($release), |lab, kernel| {
                        the_unit_keeps_its_word(lab, kernel, &system)
                    }),
                    Err(reason) => eprintln!("skipped: {reason}"),
                }
            }
        )+
    };
}
on_every_system!(trixie);

/// The laptop at the uplink `up0`; the server behind `sub0`, which sends back every line.
pub(super) const NETWORK: &str = r#"set -e
for end in "laptop up0 203.0.113" "server sub0 10.20.0"; do
    set -- $end
    ip netns add $1
    ip link add $2 type veth peer name eth0 netns $1
    ip address add $3.1/24 dev $2
    ip link set $2 up
    ip -n $1 address add $3.10/24 dev eth0
    ip -n $1 link set eth0 up
done
ip route add default via 203.0.113.10
# What stands before is to stand afterwards.
ip rule add priority 7 to 192.0.2.0/24 table main
nft add table inet others
ip netns exec server perl -MIO::Socket::INET -e '
    my $listener = IO::Socket::INET->new(Listen => 9, LocalPort => 7) or die;
    while (my $client = $listener->accept) {
        next if fork;
        $client->autoflush(1);
        while (<$client>) { print $client $_ }
        exit;
    }' >/dev/null 2>&1 &
"#;

/// Writes down all that a router may change and must put back.
pub(super) const FOOTPRINT: &str = r#"cat >/run/footprint <<'END'
exec 2>&1
ip -o -c=never link; ip rule; ip -6 rule; nft list ruleset; tc qdisc
ip route show table all | grep -v -e multicast -e fe80:
sysctl -a -r '^net\.ipv[46]\.(conf|ip_forward)' | grep -v stable_secret
find /sys/fs/bpf /run/sluice /run/wireguard -mindepth 1
END
mkdir -p /run/sluice /run/wireguard
sh /run/footprint >/run/before"#;

/// As README.md and docs/operations.md say.
const INSTALL: &str = r#"set -e
umask 077
sluice init
sed -i 's/^mode = .*/uplink_guard = "auto"/' /etc/sluice/sluice.toml
printf '[[route]]\ncidr = "10.20.0.0/24"\n' >>/etc/sluice/sluice.toml
sluice add-peer laptop --endpoint 203.0.113.1:51820 >/root/wg0.conf
sluice check-config
systemctl daemon-reload
systemctl enable --now sluice
ip netns exec laptop wg-quick up /root/wg0.conf"#;

/// One connection that lasts: the laptop says a line whenever the one before has come back.
pub(super) const TALK: &str = r#"ip netns exec laptop bash -c '
    exec 3<>/dev/tcp/10.20.0.10/7 && n=0
    while echo $((++n)) >&3 && read line <&3; do echo $line >/run/heard; sleep 0.05; done
    echo over >/run/heard' >/dev/null 2>&1 &"#;

/// Notes whatever goes away of rules, forwarding and the ruleset.
pub(super) const WATCH: &str = r#"ip -4 monitor rule netconf >/run/changes 2>&1 & echo $! >/run/watch
(while nft list table inet sluice_sluice0 >/dev/null 2>&1; do sleep 0.05; done
 echo Deleted the table >>/run/changes) &
echo $! >>/run/watch"#;
pub(super) const WATCHED: &str =
    "kill $(cat /run/watch); grep -E 'Deleted .*(lookup|table)|sub0 forwarding off' /run/changes";

pub(super) struct Server {
    pub(super) guest: Guest,
}

impl Server {
    pub(super) fn run(&mut self, script: &str) -> anyhow::Result<String> {
        self.guest.run(script, LONGER)
    }

    /// What systemd says of the unit.
    pub(super) fn property(&mut self, name: &str) -> anyhow::Result<String> {
        let value = self.run(&format!("systemctl show sluice --value -p {name}"))?;
        Ok(value.trim().to_owned())
    }

    pub(super) fn status(&mut self) -> anyhow::Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.run("sluice status --json")?)?)
    }

    /// Waits until the status says this.
    pub(super) fn shows(&mut self, what: &str) -> anyhow::Result<()> {
        let script = format!("sluice status --json | tr -d ' \\n' | grep -F '{what}'");
        self.guest.wait_for(&script, LONGER).map(drop)
    }

    /// Waits until the connection goes on.
    pub(super) fn hears(&mut self) -> anyhow::Result<()> {
        let before = self.run("cat /run/heard")?;
        // The file is empty for a moment whenever it is written.
        let script = format!(
            "now=$(cat /run/heard); [ \"$now\" = over ] || [ \"${{now:-0}}\" -gt {} ]",
            before.trim().parse().unwrap_or(0)
        );
        let now = self
            .guest
            .wait_for(&format!("{script} && echo $now"), LONGER)?;
        ensure!(now.trim() != "over", "the connection is over");
        Ok(())
    }

    /// How often the unit has logged this since the machine came up.
    pub(super) fn logged(&mut self, text: &str) -> anyhow::Result<usize> {
        let log = self.run("journalctl --quiet --no-pager -o cat -u sluice")?;
        Ok(log.matches(text).count())
    }

    /// Where the one flow stands, as the server sees it.
    pub(super) fn external(&mut self) -> anyhow::Result<String> {
        let flows: serde_json::Value = serde_json::from_str(&self.run("sluice flows --json")?)?;
        let external = flows["flows"][0]["external"].as_str();
        Ok(external
            .with_context(|| format!("no flow: {flows}"))?
            .to_owned())
    }
}

fn the_unit_keeps_its_word(lab: &Lab, kernel: &Kernel, system: &System) -> anyhow::Result<()> {
    let started = Instant::now();
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd/sluice.service");
    let guest = Machine::new(kernel)
        .system(system)
        .program(sluice::binary()?, "sluice")
        .file(&unit, "/etc/systemd/system/sluice.service")
        .boot(&lab.host("guest")?)?;
    let booted = started.elapsed();
    let mut server = Server { guest };
    if let Err(error) = the_unit(&mut server) {
        let log = server.run("systemctl status sluice; journalctl --no-pager -u sluice");
        let log = log.unwrap_or_else(|error| format!("{error:#}"));
        return Err(error.context(log));
    }
    println!(
        "{}: up in {:.1} s, {:.1} s in all",
        server.run("systemctl --version | head -n 1")?.trim(),
        booted.as_secs_f64(),
        started.elapsed().as_secs_f64()
    );
    server.guest.power_off()
}

fn the_unit(server: &mut Server) -> anyhow::Result<()> {
    // Whatever else this system lacks is not our concern.
    server.run("systemctl is-system-running --wait; true")?;
    let advice = server.run("systemd-analyze verify sluice.service 2>&1")?;
    ensure!(!advice.contains("sluice"), "{advice}");
    server.run(NETWORK)?;
    server.run(FOOTPRINT)?;
    // `systemctl enable --now` returns when the daemon has said that it is ready.
    server.run(INSTALL).context("installation")?;
    it_is_confined(server).context("rights")?;

    server.run(TALK)?;
    server.guest.wait_for("[ -s /run/heard ]", LONGER)?;
    server.hears()?;
    let external = server.external()?;
    reload(server).context("reload")?;

    let first = server.property("MainPID")?;
    server.run(WATCH)?;
    server.run("systemctl restart sluice")?;
    server.hears().context("after the restart")?;
    let gone = server.guest.output(WATCHED, QUICK)?;
    ensure!(gone.status == 1, "gone meanwhile: {}", gone.text);
    let second = server.property("MainPID")?;
    ensure!(second != first && server.property("NRestarts")? == "0");
    ensure!(server.logged("leaving on SIGUSR1")? == 1);
    ensure!(server.logged("flows go on")? == 1);
    ensure!(server.external()? == external);

    server.run(&format!("kill -9 {second}"))?;
    let again = "set -- $(systemctl show sluice -p NRestarts -p SubState | sort)
                 [ \"$*\" = 'NRestarts=1 SubState=running' ]";
    server.guest.wait_for(again, LONGER)?;
    ensure!(server.property("MainPID")? != second);
    ensure!(server.logged("flows go on")? == 2);
    server.hears().context("after kill -9")?;
    ensure!(server.external()? == external);
    ensure!(server.status()?["problems"] == serde_json::json!([]));

    server.run("systemctl stop sluice")?;
    let state = server.property("ActiveState")?;
    ensure!(state == "inactive" && server.property("Result")? == "success");
    let left = "sh /run/footprint >/run/after; diff /run/before /run/after";
    server.run(left).context("what a stop leaves").map(drop)
}

/// The sandbox of the unit is in force, and lets the programs work, and outlive the daemon.
pub(super) fn it_is_confined(server: &mut Server) -> anyhow::Result<()> {
    for (name, value) in [
        ("ActiveState", "active"),
        ("Type", "notify"),
        ("DropInPaths", ""),
        ("NRestarts", "0"),
    ] {
        let is = server.property(name)?;
        ensure!(is == value, "{name}={is}");
    }
    let rights = server.run(
        "cd /proc/$(systemctl show sluice --value -p MainPID)
         grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' status | tr '\\t\\n' ' '
         grep ' / / ' mountinfo | grep -qE ' ro[, ]' && echo read-only",
    )?;
    // CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF of linux/capability.h.
    let caps = (1_u64 << 10) | (1 << 12) | (1 << 38) | (1 << 39);
    let wanted =
        format!("CapEff: {caps:016x} CapBnd: {caps:016x} NoNewPrivs: 1 Seccomp: 2 read-only");
    ensure!(rights.trim() == wanted, "{rights}, not {wanted}");
    let status = server.status()?;
    ensure!(
        status["datapath"]["active"] == "ebpf" && status["datapath"]["unkept"].is_null(),
        "{status:#}"
    );
    ensure!(status["uplink_guard"]["interface"] == "up0", "{status:#}");
    ensure!(status["problems"] == serde_json::json!([]), "{status:#}");
    Ok(())
}

/// `systemctl reload` has the file read, whether it has changed or not.
fn reload(server: &mut Server) -> anyhow::Result<()> {
    let main = server.property("MainPID")?;
    server.run("wg set sluice0 peer $(wg genkey | wg pubkey) allowed-ips 192.0.2.77/32")?;
    server.shows(r#""changed_by_wg":true"#)?;
    server.run("systemctl reload sluice")?;
    server.shows(r#""changed_by_wg":false"#)?;
    server.run(
        r#"printf '[[route]]\ncidr = "10.30.0.0/24"\n' >>/etc/sluice/sluice.toml
           systemctl reload sluice"#,
    )?;
    server.shows("10.30.0.0/24")?;
    ensure!(server.property("MainPID")? == main && server.property("SubState")? == "running");
    server.hears()
}
