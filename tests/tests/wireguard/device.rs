//! The life of a plain device: start, descriptors passed in, another namespace, the end.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::Command;

use anyhow::{Context, ensure};
use lab::Host;

use super::{FAR, FAR_OUTER, NEAR, NEAR_OUTER, PORT, SOON, Wire, ask, set, socket};

/// Runs `sluice wireguard` with these words and variables to its end.
fn run(host: &Host, words: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<lab::Output> {
    let argv = [lab::sluice::binary()?.as_os_str(), "wireguard".as_ref()];
    let command = host.command(argv).args(words);
    let command = variables.iter().fold(command, |c, (k, v)| c.env(k, v));
    command.output()
}

fn gone(name: &str) -> anyhow::Result<()> {
    // The process takes the socket away as the last thing.
    lab::wait_until(SOON, "the socket to go", || !socket(name).exists())
}

#[test]
fn it_returns_when_device_and_socket_are_there_and_ends_with_the_device() {
    lab::test(|lab| {
        let host = lab.host("host")?;
        let name = host.tunnel_name();
        for _ in 0..5 {
            let output = run(&host, &[&name], &[])?;
            ensure!(output.status.success(), "{output:?}");
            ensure!(
                output.stdout.is_empty() && output.stderr.is_empty(),
                "{output:?}"
            );
            // At once, without waiting for anything.
            host.run(["wg", "set", &name, "fwmark", "5"])?;
            host.ip(&format!("link set {name} up"))?;
            let again = run(&host, &[&name], &[])?;
            ensure!(!again.status.success(), "a second one: {again:?}");
            ensure!(
                again.stderr.contains(&name) && again.stderr.lines().count() == 1,
                "{again:?}"
            );
            ensure!(host.run(["wg", "show", &name])?.contains("0x5"));
            host.ip(&format!("link del {name}"))?;
            gone(&name)?;
        }
        let output = run(&host, &["no/name"], &[])?;
        ensure!(
            !output.status.success() && output.stderr.contains("no/name"),
            "{output:?}"
        );
        Ok(())
    });
}

#[test]
fn it_ends_when_its_socket_is_removed() {
    lab::test(|lab| {
        let host = lab.host("host")?;
        let name = host.tunnel_name();
        run(&host, &[&name], &[])?;
        std::fs::remove_file(socket(&name))?;
        lab::wait_until(SOON, "the device to go", || {
            host.ip(&format!("link show {name}")).is_err()
        })
    });
}

#[test]
fn variables_of_wireguard_go_are_honoured() {
    lab::test(|lab| {
        let host = lab.host("host")?;
        let name = host.tunnel_name();
        let argv = [
            lab::sluice::binary()?.as_os_str(),
            "wireguard".as_ref(),
            name.as_ref(),
        ];
        let command = host.command(argv);
        let command = command
            .env("WG_PROCESS_FOREGROUND", "1")
            .env("LOG_LEVEL", "verbose");
        let mut process = host.spawn("foreground", command)?;
        let there = || host.run(["wg", "show", &name]).is_ok();
        process.ready(SOON, "the device", there)?;
        ensure!(
            process.log().contains("the device is there"),
            "{}",
            process.log()
        );
        process.signal(libc::SIGTERM)?;
        ensure!(process.wait(SOON)?.success(), "{}", process.log());
        ensure!(!socket(&name).exists() && host.ip(&format!("link show {name}")).is_err());

        for (variable, value) in [("WG_TUN_FD", "x"), ("WG_TUN_FD", "77"), ("WG_UAPI_FD", "0")] {
            let output = run(&host, &["-f", &name], &[(variable, value)])?;
            ensure!(!output.status.success(), "{output:?}");
            ensure!(
                output.stderr.contains(&format!("{variable}={value}")),
                "{output:?}"
            );
        }
        let silent = run(&host, &["-f", "no/name"], &[("LOG_LEVEL", "silent")])?;
        ensure!(!silent.stderr.is_empty(), "an error is told in any case");
        Ok(())
    });
}

/// Makes a TUN device in the namespace of the calling thread.
fn make_tun(name: &str, flags: libc::c_int) -> anyhow::Result<OwnedFd> {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives for the whole call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    ensure!(done == 0, std::io::Error::last_os_error());
    Ok(file.into())
}

#[test]
fn a_device_and_a_socket_passed_in_are_served() {
    passed_in(0);
}

#[test]
fn a_device_with_offloads_and_a_socket_passed_in_are_served() {
    passed_in(libc::IFF_VNET_HDR);
}

fn passed_in(vnet: libc::c_int) {
    lab::test(|lab| {
        let wire = Wire::new(lab, 1500)?;
        let name = wire.near.tunnel_name();
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | vnet;
        let tun = wire.near.enter(|| make_tun(&name, flags))??;
        wire.near.ip(&format!("link set {name} mtu 1400"))?;
        let listener = UnixListener::bind(socket(&name))?;
        let (tun_fd, socket_fd) = (tun.as_raw_fd(), listener.as_raw_fd());
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", wire.near.namespace()))
            .arg(lab::sluice::binary()?)
            .args(["wireguard", "--", &name])
            .env("WG_TUN_FD", tun_fd.to_string())
            .env("WG_UAPI_FD", socket_fd.to_string());
        inherit(&mut command, [tun_fd, socket_fd]);
        let output = command.output()?;
        ensure!(output.status.success(), "{output:?}");
        ensure!(wire.near.run(["wg", "show", &name])?.contains(&name));
        drop((tun, listener));
        let far = wire.far.wireguard_go(&wire.far_tunnel(1420, None)?)?;
        let peer = format!(
            "[Peer]\nPublicKey = {}\nEndpoint = {}:{PORT}\nAllowedIPs = 0.0.0.0/0\n",
            wire.far_key.public, FAR_OUTER[0]
        );
        let conf = format!(
            "[Interface]\nPrivateKey = {}\n{peer}",
            wire.near_key.private
        );
        wire.near
            .command(["wg", "setconf", &name, "/dev/stdin"])
            .stdin(conf)
            .run()?;
        wire.near
            .ip(&format!("address add {}/24 dev {name}", NEAR[0]))?;
        wire.near.ip(&format!("link set {name} up"))?;
        ensure!(wire.near.pings(FAR[0], &[])?, "vnet {vnet}: {}", far.log());
        let _web = wire.far.http_server(80)?;
        lab::http::download(&wire.near, format!("{}:80", FAR[0]).parse()?, 1 << 20)?;
        wire.near.ip(&format!("link del {name}"))?;
        gone(&name)?;
        Ok(())
    });
}

fn inherit(command: &mut Command, fds: [i32; 2]) {
    use std::os::unix::process::CommandExt as _;
    let keep = move || {
        for fd in fds {
            // SAFETY: no pointers are passed; the descriptors are open in the parent.
            if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only a system call is made.
    unsafe { command.pre_exec(keep) };
}

#[test]
fn a_device_moved_to_another_namespace_talks_through_the_one_it_was_born_in() {
    lab::test(|lab| {
        let wire = Wire::new(lab, 1500)?;
        let inside = lab.host("inside")?;
        let name = wire.near.tunnel_name();
        run(&wire.near, &[&name], &[])?;
        wire.near
            .ip(&format!("link set {name} netns {}", inside.namespace()))?;
        let conf = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n[Peer]\nPublicKey = {}\n\
             AllowedIPs = 0.0.0.0/0, ::/0\n",
            wire.near_key.private, wire.far_key.public
        );
        // `wg` finds it by the socket, whatever namespace it is in.
        inside
            .command(["wg", "setconf", &name, "/dev/stdin"])
            .stdin(conf)
            .run()?;
        inside.ip(&format!("address add {}/24 dev {name}", NEAR[0]))?;
        inside.ip(&format!("address add {}/64 dev {name}", NEAR[1]))?;
        inside.ip(&format!("link set {name} mtu 1400 up"))?;
        let go = wire
            .far
            .wireguard_go(&wire.far_tunnel(1400, Some(NEAR_OUTER[1]))?)?;
        for (near, far) in NEAR.iter().zip(FAR) {
            ensure!(wire.far.pings(near, &[])?, "ping {near}: {}", go.log());
            ensure!(inside.pings(far, &[])?, "ping {far}");
        }
        // A port chosen later is bound in the namespace of birth too.
        set(&inside, &name, "listen-port 7777")?;
        ensure!(wire.near.run(["ss", "-lun"])?.contains(":7777"));
        ensure!(inside.pings(FAR[0], &[])?, "ping after the port changed");
        let _web = wire.far.http_server(80)?;
        lab::http::download(&inside, format!("[{}]:80", FAR[1]).parse()?, 1 << 20)?;
        ensure!(ask(&name, "get=1\n\n")?.contains("listen_port=7777"));
        inside.ip(&format!("link del {name}"))?;
        gone(&name).context("deleted in another namespace")?;
        Ok(())
    });
}

#[test]
fn a_port_that_cannot_be_had_is_told_as_the_kernel_says() {
    lab::test(|lab| {
        let wire = Wire::new(lab, 1500)?;
        let near = &wire.near;
        // Root, but not for the ports below 1024.
        let argv = [
            "setpriv".as_ref(),
            "--bounding-set=-net_bind_service".as_ref(),
            lab::sluice::binary()?.as_os_str(),
            "wireguard".as_ref(),
            "-f".as_ref(),
        ];
        let device = near.wireguard_program(&argv, &wire.near_tunnel(1420, None)?)?;
        let _taken = near.udp_socket("0.0.0.0:7777".parse()?)?;
        for (port, error) in [
            ("7", "Permission denied"),
            ("7777", "Address already in use"),
        ] {
            let words = ["wg", "set", device.device(), "listen-port", port];
            let output = near.command(words).output()?;
            ensure!(output.stderr.contains(error), "{output:?}");
            let now = near.run(["wg", "show", device.device(), "listen-port"])?;
            ensure!(now.trim() == PORT.to_string(), "{now}");
        }
        Ok(())
    });
}
