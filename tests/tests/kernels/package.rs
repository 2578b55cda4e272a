//! The Debian package on a fresh Debian with systemd: installed, started after three lines of
//! configuration, upgraded under a connection, removed, purged.

use lab::vm::System;

use super::systemd::{FOOTPRINT, LONGER, NETWORK, Server, TALK, WATCH, WATCHED, it_is_confined};
use super::*;

macro_rules! on_every_release {
    ($($release:ident),+) => {
        $(
            #[test]
            fn $release() {
                let release = stringify!($release);
                match System::find(release).and_then(|system| Ok((system, packages()?))) {
                    Ok((system, packages)) => on(release, |lab, kernel| {
                        let guest = Machine::new(kernel)
                            .system(&system)
                            .file(&packages.join("1.deb"), "/root/1.deb")
                            .file(&packages.join("2.deb"), "/root/2.deb")
                            .boot(&lab.host("guest")?)?;
                        it_comes_and_goes(Server { guest })
                    }),
                    Err(reason) => eprintln!("skipped: {reason}"),
                }
            }
        )+
    };
}
on_every_release!(bookworm, trixie);

/// Files that have Sluice in their path, but for logs and what apt and dpkg remember.
const FILES: &str = "find / -xdev \\( -path /proc -o -path /sys -o -path /root -o -path /var/log \
    -o -path /var/cache -o -path /tmp \\) -prune -o -path '*sluice*' -print";

/// For apt: emulated, beside two builds, an upgrade took 110 s, most of it the daemon's start.
const APT: Duration = Duration::from_secs(300);

/// What an operator types after the installation.
const CONFIGURE: &str = r#"set -e
umask 077
sluice init >/dev/null
sed -i 's/^mode = .*/uplink_guard = "auto"/' /etc/sluice/sluice.toml
printf '[[route]]\ncidr = "10.20.0.0/24"\n' >>/etc/sluice/sluice.toml
sluice add-peer laptop --endpoint 203.0.113.1:51820 >/root/wg0.conf
systemctl start sluice
ip netns exec laptop wg-quick up /root/wg0.conf"#;

fn it_comes_and_goes(mut server: Server) -> anyhow::Result<()> {
    if let Err(error) = steps(&mut server) {
        let log = server.run("systemctl status sluice; journalctl --no-pager -u sluice");
        let log = log.unwrap_or_else(|error| format!("{error:#}"));
        return Err(error.context(log));
    }
    server.guest.power_off()
}

fn steps(server: &mut Server) -> anyhow::Result<()> {
    server.run("systemctl is-system-running --wait; true")?;
    server.run(NETWORK)?;
    server.run(&FOOTPRINT.replace("/run/sluice /run/wireguard -mindepth 1", "-mindepth 1"))?;
    server.run("rmdir /run/sluice /run/wireguard")?;

    let said = apt(server, "install ./1.deb").context("installation")?;
    ensure!(said.contains("no configuration yet"), "{said}");
    ensure!(server.property("UnitFileState")? == "enabled");
    ensure!(server.property("ActiveState")? == "inactive");
    let advice = server.run("systemd-analyze verify sluice.service 2>&1")?;
    ensure!(!advice.contains("sluice"), "{advice}");
    server.run(CONFIGURE).context("configuration")?;
    it_is_confined(server).context("rights")?;

    server.run(TALK)?;
    server.guest.wait_for("[ -s /run/heard ]", LONGER)?;
    server.hears()?;
    let external = server.external()?;
    let first = server.property("MainPID")?;
    server.run(WATCH)?;
    apt(server, "install ./2.deb").context("upgrade")?;
    server.hears().context("after the upgrade")?;
    let gone = server.guest.output(WATCHED, QUICK)?;
    ensure!(gone.status == 1, "gone meanwhile: {}", gone.text);
    let second = server.property("MainPID")?;
    ensure!(second != first, "the new version does not run");
    ensure!(server.logged("leaving on SIGUSR1")? == 1, "one restart");
    ensure!(server.logged("flows go on")? == 1, "flows were lost");
    ensure!(server.external()? == external, "another port");
    let version = server.run("dpkg-query --show --showformat='${Version}' sluice")?;
    ensure!(version.ends_with("-2"), "{version}");

    // A version that does not take the configuration leaves the old one running, and says so.
    server.run(
        "cp -p /etc/sluice/sluice.toml /root/good && echo nonsense >>/etc/sluice/sluice.toml",
    )?;
    let said = apt(server, "install --reinstall ./2.deb")?;
    ensure!(said.contains("the old one goes on running"), "{said}");
    ensure!(
        server.property("MainPID")? == second,
        "it was restarted all the same"
    );
    server.hears().context("with a broken configuration")?;
    server.run("cp -p /root/good /etc/sluice/sluice.toml")?;

    apt(server, "remove sluice").context("removal")?;
    let left = "sh /run/footprint >/run/after; diff /run/before /run/after";
    server
        .run(left)
        .context("what a removal leaves in the network")?;
    server.run("test -s /etc/sluice/private.key && test -s /etc/sluice/sluice.toml")?;
    ensure!(
        server
            .run("systemctl list-unit-files | grep -c sluice; true")?
            .trim()
            == "0"
    );

    apt(server, "purge sluice").context("purge")?;
    let files = server.run(FILES)?;
    ensure!(files.trim().is_empty(), "a purge leaves {files}");
    Ok(())
}

fn apt(server: &mut Server, words: &str) -> anyhow::Result<String> {
    let script = format!("cd /root && DEBIAN_FRONTEND=noninteractive apt-get -qq -y {words} 2>&1");
    server.guest.run(&script, APT)
}
