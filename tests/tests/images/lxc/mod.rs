//! The template of Proxmox containers, made and run as Proxmox does (`lab::lxc`).
//!
//! `cargo xtask image test lxc` makes the template and runs these. Without it they skip and say so.

mod pct;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::control_server::ControlServer;
use lab::lxc::{Container, Settings};
use lab::site::{self, Arms, Client, JUMBO, SERVER, Site};
use lab::sluice::Config;
use lab::{Flow, Host, Lab, Stream, http, poll, wait_until};
use serde_json::{Value, json};

const HTTP: u16 = 80;
const ECHO: u16 = 7;
/// For a system to come up, or a daemon that is not optimised to load its programs, beside two builds.
const SOON: Duration = Duration::from_secs(60);
/// For an installation.
const APT: Duration = Duration::from_secs(120);
/// What lets a node into the lab's tailnet.
const KEY: &str = "tskey-auth-good";
/// What Proxmox says of the NIC.
const ADDRESS: &str = "10.20.0.10/24";
const GATEWAY: &str = "10.20.0.1";

/// The folder of the template and of the packages; else the reason why there is none.
fn images() -> Result<PathBuf, String> {
    let folder = std::env::var_os("SLUICE_PACKAGES").map(PathBuf::from);
    let folder = folder.filter(|folder| folder.join("lxc.tar.zst").exists());
    let folder = folder.ok_or("there is no template; `cargo xtask image test lxc` makes it")?;
    lab::lxc::unable().map_or(Ok(folder), Err)
}

fn test(body: impl FnOnce(&Lab, &Images) -> Result<()>) {
    match images() {
        Ok(folder) => lab::test(|lab| body(lab, &Images { folder })),
        Err(reason) => eprintln!("skipped: {reason}"),
    }
}

struct Images {
    folder: PathBuf,
}

impl Images {
    /// A container at the router's place of a one-armed site, whose router is the Proxmox node.
    fn container(&self, site: &Site, change: impl FnOnce(&mut Settings)) -> Result<Container> {
        let node = &site.router;
        node.ip("address flush dev eth0")?;
        node.ip(&format!("link add vmbr0 mtu {JUMBO} type bridge"))?;
        node.ip("link set eth0 master vmbr0")?;
        node.ip("link set vmbr0 up")?;
        let mut settings = Settings {
            privileged: false,
            tun: true,
            ip: ADDRESS.to_owned(),
            gateway: Some(GATEWAY.to_owned()),
            ip6: Some("2001:db8:20::10/64".to_owned()),
            gateway6: Some("2001:db8:20::1".to_owned()),
            mtu: JUMBO,
            env: Vec::new(),
        };
        change(&mut settings);
        Container::create(node, &self.folder.join("lxc.tar.zst"), settings)
    }
}

/// Starts it, with nothing that has failed.
fn start(container: &mut Container) -> Result<()> {
    let state = container.start(SOON)?;
    let failed = container.run("systemctl --failed --no-legend --plain")?;
    ensure!(state == "running", "{state}: {failed}");
    Ok(())
}

/// What an operator writes.
fn configure(container: &Container, client: &Client, key_of: &mut Config) -> Result<()> {
    *key_of = site::config(&[client], "auto", true)?;
    let (key, socket) = ("/etc/sluice/private.key", "/run/sluice/sluice0.sock");
    let toml = key_of.to_toml("gateway", key.as_ref(), socket.as_ref())?;
    container.write(key, &key_of.key.private, 0o600)?;
    container.write("/etc/sluice/sluice.toml", &toml, 0o600)
}

fn status(container: &Container) -> Result<Value> {
    Ok(serde_json::from_str(
        &container.run("sluice status --json")?,
    )?)
}

/// Waits until the router has nothing to complain of.
fn settled(container: &Container) -> Result<Value> {
    let mut last = None;
    let found = poll(SOON, "the router to settle", || {
        let status = status(container).ok()?;
        let done = status["problems"] == json!([]) && status["unready"] == json!([]);
        last = Some(status.clone());
        done.then_some(status)
    });
    found.with_context(|| {
        let log = container.run("journalctl --no-pager -u sluice");
        format!(
            "{last:#?}\n{}",
            log.unwrap_or_else(|error| format!("{error:#}"))
        )
    })
}

/// What listens in the container.
fn listening(container: &Container) -> Result<Vec<String>> {
    let sockets = container.run("ss -Hlntu")?;
    let ends = sockets
        .lines()
        .filter_map(|line| line.split_whitespace().nth(4));
    Ok(ends.map(str::to_owned).collect())
}

/// One request over each protocol.
fn carries(laptop: &Host) -> Result<()> {
    for server in SERVER {
        let web = SocketAddr::new(server, HTTP);
        ensure!(http::get(laptop, web, "/")? == http::GREETING.as_bytes());
        let datagrams = Stream::start(laptop, SocketAddr::new(server, ECHO))?;
        datagrams.wait(10)?;
        datagrams.end()?;
    }
    Ok(())
}

#[test]
fn a_privileged_gateway_has_the_fast_path() {
    test(|lab, images| gateway(lab, images, true));
}

#[test]
fn an_unprivileged_gateway_has_the_kernels_and_lacks_nothing() {
    test(|lab, images| gateway(lab, images, false));
}

fn gateway(lab: &Lab, images: &Images, privileged: bool) -> Result<()> {
    let site = Site::new(lab, Arms::One)?;
    let mut container = images.container(&site, |settings| settings.privileged = privileged)?;
    start(&mut container)?;

    // Before anybody has configured anything.
    ensure!(
        listening(&container)?.is_empty(),
        "{:?}",
        listening(&container)?
    );
    let login = "bash -ic true 2>&1; bash -lic true 2>&1 | grep -c 'sluice init'";
    let told = container.run(login)?;
    let missing: Vec<&str> = told
        .lines()
        .filter(|line| line.starts_with("MISSING"))
        .collect();
    ensure!(
        missing.len() == 1 && missing[0].contains("sluice init"),
        "{told}"
    );
    ensure!(told.trim().ends_with("\n1"), "told more than once: {told}");
    ensure!(container.run("systemctl is-enabled sluice")?.trim() == "enabled");

    let client = Client::new("laptop", 2)?;
    let mut config = Config::new()?;
    configure(&container, &client, &mut config)?;
    container.run("systemctl start sluice")?;
    let shown = settled(&container)?;
    let datapath = &shown["datapath"];
    let page = container.run("sluice status && sluice doctor")?;
    if privileged {
        ensure!(
            datapath["active"] == "ebpf" && datapath["unkept"].is_null(),
            "{datapath:#}"
        );
    } else {
        ensure!(datapath["active"] == "kernel", "{datapath:#}");
        ensure!(page.matches("nothing has failed").count() == 2, "{page}");
        let warnings = container.run("journalctl --quiet --no-pager -p warning -u sluice")?;
        ensure!(
            !container
                .run("journalctl --no-pager -u sluice")?
                .contains(" WARN "),
            "{warnings}"
        );
    }
    ensure!(
        !page.contains("MISSING") && !page.contains("PROBLEM"),
        "{page}"
    );
    let ends = listening(&container)?;
    ensure!(ends.iter().all(|end| end.ends_with(":51820")), "{ends:?}");

    let _servers = (site.server.http_server(HTTP)?, site.server.udp_echo(ECHO)?);
    let _tunnel = client.connect(&site.laptop, &config.key)?;
    carries(&site.laptop).context("at first")?;

    let mut flow = Flow::open(&site.laptop, &site.server, SERVER[0])?;
    flow.works()?;
    container.run("systemctl restart sluice")?;
    settled(&container)?;
    flow.works().context("after a restart")?;

    upgrade(&container, images)?;
    ensure!(settled(&container)?["datapath"]["active"] == datapath["active"]);
    flow.works().context("after an upgrade")?;

    container.stop()?;
    start(&mut container)?;
    settled(&container).context("after a restart of the container")?;
    // The laptop goes on with its session until it notices that nobody answers.
    let web = SocketAddr::new(SERVER[0], HTTP);
    wait_until(SOON, "the laptop to shake hands anew", || {
        http::get(&site.laptop, web, "/").is_ok()
    })?;
    carries(&site.laptop).context("after a restart of the container")
}

/// Installs the next package, which the daemon is to be of from then on.
fn upgrade(container: &Container, images: &Images) -> Result<()> {
    let main = || container.run("systemctl show --property=MainPID --value sluice");
    let before = main()?;
    container.push(&images.folder.join("2.deb"), "/root/2.deb")?;
    let install = "DEBIAN_FRONTEND=noninteractive apt-get -qq -y install /root/2.deb 2>&1";
    let told = container.command(install)?.timeout(APT).run()?;
    let version = container.run("dpkg-query --show --showformat='${Version}' sluice")?;
    ensure!(version.ends_with("-2"), "{version}");
    ensure!(main()? != before, "the old daemon goes on: {told}");
    Ok(())
}

#[test]
fn a_gateway_without_tun_tells_what_mends_it() {
    test(|lab, images| {
        let site = Site::new(lab, Arms::One)?;
        let mut container = images.container(&site, |settings| settings.tun = false)?;
        let client = Client::new("laptop", 2)?;
        let mut config = Config::new()?;
        configure(&container, &client, &mut config)?;
        container.start(SOON)?;
        let mend = "pct set <vmid> -dev0 /dev/net/tun";
        let told = container.output("sluice doctor")?;
        ensure!(!told.status.success());
        let lack = told
            .stdout
            .lines()
            .find(|line| line.starts_with("MISSING  TUN device"));
        ensure!(
            lack.is_some_and(|line| line.contains(mend)),
            "{}",
            told.stdout
        );
        wait_until(SOON, "the log to name the mend", || {
            let log = container.run("journalctl --no-pager -u sluice");
            log.is_ok_and(|log| log.contains(mend))
        })?;

        container.set(|settings| settings.tun = true);
        container.stop()?;
        start(&mut container)?;
        settled(&container)?;
        let _server = site.server.http_server(HTTP)?;
        let _tunnel = client.connect(&site.laptop, &config.key)?;
        ensure!(http::get(&site.laptop, SocketAddr::new(SERVER[0], HTTP), "/").is_ok());
        container.run("sluice doctor").map(drop)
    });
}

#[test]
fn the_containers_environment_is_enough_and_dhcp_too() {
    test(|lab, images| {
        let site = Site::new(lab, Arms::One)?;
        let control = ControlServer::on(site.server.tcp_listener((SERVER[0], 8080).into())?)?;
        let dhcp =
            site.server
                .command(["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"]);
        let dhcp = dhcp
            .args([
                "--port=0",
                "--interface=eth0",
                "--user=root",
                "--dhcp-authoritative",
            ])
            .args([
                "--dhcp-range=10.20.0.10,10.20.0.10,255.255.255.0,1h",
                "--log-facility=-",
            ])
            .arg(format!("--dhcp-option=option:router,{GATEWAY}"))
            .arg("--pid-file=")
            .arg(format!(
                "--dhcp-leasefile={}",
                lab.folder().join("leases").display()
            ));
        let _dhcp = site.server.spawn("dhcp", dhcp)?;
        let mut container = images.container(&site, |settings| {
            settings.ip = "dhcp".to_owned();
            (settings.gateway, settings.ip6, settings.gateway6) = (None, None, None);
            let login = format!("--login-server={}", control.url());
            settings.env = [
                ("TS_AUTHKEY", KEY),
                ("TS_ROUTES", "10.20.0.0/24"),
                ("TS_EXTRA_ARGS", login.as_str()),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
        })?;
        start(&mut container)?;
        let addresses = container.run("ip -4 -o address show dev eth0")?;
        ensure!(addresses.contains(ADDRESS), "{addresses}");
        wait_until(SOON, "the router to be in the tailnet", || {
            status(&container).is_ok_and(|status| status["BackendState"] == "Running")
        })
        .with_context(|| {
            container
                .run("journalctl --no-pager -u sluice")
                .unwrap_or_default()
        })?;
        let node = control.nodes().pop().context("no node")?;
        // As Proxmox has named the container.
        ensure!(node.hostinfo["Hostname"] == "gateway", "{node:?}");
        let log = container.run("journalctl --no-pager -u sluice")?;
        ensure!(!log.contains(KEY), "the key is in the log");
        upgrade(&container, images).context("without a file")?;
        Ok(())
    });
}
