//! The disk for EC2, booted by UEFI in a subnet of a VPC with one arm, as on AWS: address, MTU, gateway and name
//! server by DHCP, and the metadata service's address behind the gateway.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, ensure};
use lab::site::{Arms, Client, SERVER, Site, config};
use lab::sluice::Config;
use lab::vm::{Arch, Disk, Guest};
use lab::{Host, Lab, Process, http, retry, tailscaled, wait_until};

use super::group;
use crate::router::{HTTP, echoes, serve};

/// For what takes a second or two on a calm machine.
pub(super) const QUICK: Duration = Duration::from_secs(120);
/// Emulated, beside other builds: 205 seconds were seen.
pub(super) const START: Duration = Duration::from_secs(600);
const GIB: u64 = 1 << 30;
/// Where a cloud's metadata service is.
const METADATA: &str = "169.254.169.254";

#[test]
fn amd64_is_a_router() {
    on(Arch::Amd64, "amd64", it_is_a_router);
}

#[test]
fn arm64_is_a_router() {
    on(Arch::Arm64, "arm64", it_is_a_router);
}

#[test]
fn amd64_life_cycle() {
    if tailscaled::are_here() {
        on(Arch::Amd64, "amd64", group::it_lives_in_a_group);
    }
}

fn on(arch: Arch, name: &str, body: fn(&Lab, Disk) -> anyhow::Result<()>) {
    let disk = std::env::var_os("SLUICE_PACKAGES")
        .map(PathBuf::from)
        .ok_or_else(|| {
            "SLUICE_PACKAGES names no folder; `cargo xtask image test` makes it".to_owned()
        })
        .and_then(|folder| Disk::find(&folder.join(format!("aws-{name}.raw")), arch));
    match disk {
        Ok(disk) => lab::test(|lab| body(lab, disk)),
        Err(reason) => eprintln!("skipped: {reason}"),
    }
}

fn it_is_a_router(lab: &Lab, disk: Disk) -> anyhow::Result<()> {
    let site = Site::new(lab, Arms::One)?;
    let _servers = serve(&site.server)?;
    // What would give away the role's credentials.
    site.internet
        .ip(&format!("address add {METADATA}/32 dev lo"))?;
    let _metadata = site.internet.http_server(80)?;
    let client = Client::new("laptop", 2)?;
    let mut config = config(&[&client], "auto", true)?;
    // A cloud gives IPv6 by DHCP, too; here is none.
    config.routes.truncate(1);
    let (key, socket) = ("/etc/sluice/private.key", "/run/sluice/sluice0.sock");
    let file = config.to_toml("router", key.as_ref(), socket.as_ref())?;

    let _dhcp = plug(&site.router)?;
    let mut guest = disk
        .grown(3 * GIB)
        .nic("tap0")
        .file(key, &config.key.private)
        .file("/etc/sluice/sluice.toml", &file)
        .boot(&site.router)?;
    let looked = look(&mut guest, &site, &client, &config);
    end(guest, looked)
}

/// Ends the guest, with its log if it has failed.
pub(super) fn end(mut guest: Guest, outcome: anyhow::Result<()>) -> anyhow::Result<()> {
    if let Err(error) = outcome {
        let log = guest.output("systemctl --failed; journalctl --no-pager -n 300", QUICK);
        let log = log.map_or_else(|error| format!("{error:#}"), |log| log.text);
        return Err(error.context(log));
    }
    guest.power_off()
}

/// Takes the router's place: its cable leads to the guest's NIC, which gets the router's address by DHCP.
pub(super) fn plug(hypervisor: &Host) -> anyhow::Result<Process> {
    for words in [
        "address flush dev eth0",
        "link add br0 type bridge",
        "tuntap add tap0 mode tap",
        "link set tap0 mtu 9001",
        "link set tap0 master br0 up",
        "link set eth0 master br0",
        "address add 10.20.0.2/24 dev br0",
        "link set br0 up",
    ] {
        hypervisor.ip(words)?;
    }
    let file = |end: &str| hypervisor.folder().join(format!("dhcp.{end}"));
    let leases = file("leases");
    fs::write(&leases, "")?;
    let settings = format!(
        "start 10.20.0.10\nend 10.20.0.10\ninterface br0\nlease_file {}\npidfile {}\n\
         option subnet 255.255.255.0\noption router 10.20.0.1\noption dns 10.20.0.2\n\
         option mtu 9001\noption lease 3600\n",
        leases.display(),
        file("pid").display()
    );
    fs::write(file("conf"), settings)?;
    let server = hypervisor.command(["busybox", "udhcpd", "-f"]);
    hypervisor.spawn("dhcp", server.arg(file("conf")))
}

fn look(guest: &mut Guest, site: &Site, client: &Client, config: &Config) -> anyhow::Result<()> {
    guest.wait_for("systemctl --quiet is-active sluice", START)?;
    guest.wait_for("systemctl is-system-running", START)?;
    println!("{}", times(guest)?);

    retry(QUICK, "the router to settle", || {
        let status = status(guest)?;
        ensure!(status["datapath"]["active"] == "ebpf", "{status:#}");
        ensure!(status["problems"] == serde_json::json!([]), "{status:#}");
        Ok(())
    })?;
    retry(QUICK, "nothing but WireGuard to listen", || listens(guest))?;
    // Grown into the volume.
    let size = guest.run("df -B1 --output=size / | tail -n 1", QUICK)?;
    ensure!(size.trim().parse::<u64>()? > 2 * GIB, "{size}");
    let mtu = guest.run("cat /sys/class/net/en*/mtu", QUICK)?;
    ensure!(mtu.trim() == "9001", "{mtu}");
    let id = guest.run("cat /etc/machine-id && ! test -e /etc/hostname", QUICK)?;
    ensure!(id.trim().len() == 32, "{id}");
    // Not one that came with the image.
    guest.run(
        "! journalctl -b -o cat _PID=1 | grep 'machine ID from D-Bus'",
        QUICK,
    )?;
    guest.run("grep -x 'nameserver 10.20.0.2' /etc/resolv.conf", QUICK)?;
    retry(QUICK, "the console", || {
        let console = guest.console();
        for said in ["ready after_ms=", "root@localhost"] {
            ensure!(console.contains(said), "no `{said}` in {console}");
        }
        Ok(())
    })?;

    let tunnel = client.tunnel_with(&config.key, &["169.254.169.254/32"]);
    let _tunnel = site.laptop.wireguard_go(&tunnel)?;
    let server = SERVER[0];
    wait_until(QUICK, "ping through the router", || {
        site.laptop.pings(&server.to_string(), &[]).unwrap_or(false)
    })?;
    http::download(&site.laptop, SocketAddr::new(server, HTTP), 1 << 20)?;
    echoes(&site.laptop, server, 1000, QUICK)?;

    // The guest reaches the metadata service, and peers do not.
    let connect = format!("bash -c 'exec 3<>/dev/tcp/{METADATA}/80'");
    guest.run(&connect, QUICK)?;
    let metadata: SocketAddr = format!("{METADATA}:80").parse()?;
    let reached = site.laptop.tcp_connect(metadata, Duration::from_secs(3));
    ensure!(reached.is_err(), "a peer reaches the metadata service");
    retry(QUICK, "the refused packets", || {
        let status = status(guest)?;
        let rows = status["packets"].as_array().into_iter().flatten();
        let refused = rows
            .filter(|row| row["verdict"] == "drop_link_local")
            .filter_map(|row| row["packets"].as_u64());
        ensure!(
            refused.sum::<u64>() > 0,
            "not refused, but lost: {status:#}"
        );
        Ok(())
    })
}

pub(super) fn status(guest: &mut Guest) -> anyhow::Result<serde_json::Value> {
    let status = guest.run("sluice status --json", QUICK)?;
    Ok(serde_json::from_str(&status)?)
}

/// How long it took, in the guest's own time.
pub(super) fn times(guest: &mut Guest) -> anyhow::Result<String> {
    let ready = guest.run(
        "systemctl show sluice --value -p ActiveEnterTimestampMonotonic",
        QUICK,
    )?;
    let analysis = guest.run("systemd-analyze; systemd-analyze blame | head -n 12", QUICK)?;
    let seconds = Duration::from_micros(ready.trim().parse()?).as_secs_f64();
    Ok(format!("kernel to ready: {seconds:.1} s\n{analysis}"))
}

/// Nothing but WireGuard, and the DHCP client for its server's answers.
fn listens(guest: &mut Guest) -> anyhow::Result<()> {
    let table = guest.run("ss -Hlntu", QUICK)?;
    let mut wireguard = 0;
    for line in table.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (words.first(), words.get(4)) {
            (Some(&"udp"), Some(address)) if address.ends_with(":51820") => wireguard += 1,
            (Some(&"udp"), Some(address))
                if address.starts_with("10.20.0.10%") && address.ends_with(":68") => {}
            _ => bail!("{line}\namong\n{table}"),
        }
    }
    ensure!(wireguard > 0, "no WireGuard: {table}");
    Ok(())
}
