//! wg-quick(8) with Sluice in wireguard-go's place.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;

use anyhow::ensure;
use lab::{Cmd, Host, http};

use super::{FAR, FAR_OUTER, NEAR, PORT, SOON, Wire, socket};

/// Runs wg-quick with Sluice under the name of a link, as docs/wireguard.md says.
fn wg_quick(host: &Host, verb: &str, conf: &str) -> anyhow::Result<Cmd> {
    let link = host.folder().join("sluice-wireguard");
    if !link.exists() {
        symlink(lab::sluice::binary()?, &link)?;
    }
    let path = std::env::var("PATH")?;
    Ok(host
        .command(["wg-quick", verb, conf])
        .env("PATH", format!("{}:{path}", host.folder().display()))
        .env("WG_QUICK_USERSPACE_IMPLEMENTATION", "sluice-wireguard"))
}

/// A configuration file that only root can read.
fn conf(host: &Host, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = host.folder().join(format!("{name}.conf"));
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(path)
}

#[test]
fn wg_quick_brings_a_tunnel_up_and_down() {
    lab::test(|lab| {
        let wire = Wire::new(lab, 1500)?;
        let near = &wire.near;
        let _go = wire.far.wireguard_go(&wire.far_tunnel(1420, None)?)?;
        let _web = wire.far.http_server(80)?;
        let before = near.footprint()?;
        let name = near.tunnel_name();
        let own = format!(
            "[Interface]\nPrivateKey = {}\nAddress = {}/24, {}/64\nMTU = 1400\n\
             PostUp = ip link set %i alias sluice\n",
            wire.near_key.private, NEAR[0], NEAR[1]
        );
        let peer = |allowed: &str| {
            format!(
                "[Peer]\nPublicKey = {}\nEndpoint = {}:{PORT}\nAllowedIPs = {allowed}\n\
                 PersistentKeepalive = 25\n",
                wire.far_key.public, FAR_OUTER[0]
            )
        };
        // Networks behind the peer; then everything, which needs the firewall mark, rules and nft.
        for (allowed, all) in [
            ("192.168.241.0/24, fd41::/64, 10.77.0.0/16", false),
            ("0.0.0.0/0, ::/0", true),
        ] {
            let file = conf(near, &name, &format!("{own}{}", peer(allowed)))?;
            let file = file.to_string_lossy();
            let output = wg_quick(near, "up", &file)?.output()?;
            ensure!(output.status.success(), "{output:?}");
            ensure!(
                output.stderr.contains(&format!("sluice-wireguard {name}")),
                "{output:?}"
            );
            ensure!(near.ip(&format!("link show {name}"))?.contains("mtu 1400"));
            for (family, far) in FAR.iter().enumerate() {
                ensure!(near.pings(far, &[])?, "{allowed}: ping {far}");
                let far = if family == 0 {
                    (*far).to_owned()
                } else {
                    format!("[{far}]")
                };
                http::download(near, format!("{far}:80").parse()?, 1 << 20)?;
            }
            if !all {
                // It would take away the mark by which wg-quick finds its rules again.
                let conf = wg_quick(near, "strip", &file)?.run()?;
                near.command(["wg", "syncconf", &name, "/dev/stdin"])
                    .stdin(conf)
                    .run()?;
                ensure!(near.pings(FAR[0], &[])?, "after syncconf");
            }
            wg_quick(near, "down", &file)?.run()?;
            lab::wait_until(SOON, "the socket to go", || !socket(&name).exists())?;
            // wg-quick leaves this one.
            near.sysctl("net/ipv4/conf/all/src_valid_mark", "0")?;
            let left = before.difference(&near.footprint()?);
            ensure!(left.is_empty(), "{allowed}: left:\n{}", left.join("\n"));
        }
        Ok(())
    });
}

#[test]
fn wg_quick_tells_what_it_cannot_do_and_takes_the_device_back() {
    lab::test(|lab| {
        let host = lab.host("host")?;
        let name = host.tunnel_name();
        let _taken = host.udp_socket(format!("0.0.0.0:{PORT}").parse()?)?;
        let key = lab::Keypair::generate()?.private;
        let text = format!("[Interface]\nPrivateKey = {key}\nListenPort = {PORT}\n");
        let file = conf(&host, &name, &text)?;
        let output = wg_quick(&host, "up", &file.to_string_lossy())?.output()?;
        ensure!(!output.status.success(), "{output:?}");
        ensure!(
            output.stderr.contains("Address already in use"),
            "{output:?}"
        );
        ensure!(host.ip(&format!("link show {name}")).is_err());
        Ok(())
    });
}
