//! `sluice import` beside wg(8) and wg-quick(8): what they take, it takes as they do, or refuses by
//! line.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, ensure};
use lab::{Host, Keypair, Tunnel};

use super::sluice;

/// Whether import takes what wg takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Import {
    /// Both take it, and alike.
    Same,
    /// wg takes it, import refuses it by line.
    Refuses,
    /// Neither takes it.
    Neither,
    /// Import alone takes it.
    Alone,
}

/// What a file sets, in the same words for both.
type Taken = BTreeSet<String>;

/// Feeds the file to wg-quick and wg, and asks the device what came of it.
fn by_wg(host: &Host, device: &str, file: &str) -> anyhow::Result<Option<Taken>> {
    let stripped = host.command(["wg-quick", "strip", file]).output()?;
    let set = host.command(["wg", "setconf", device, "/dev/stdin"]);
    if !stripped.status.success() || !set.stdin(stripped.stdout).output()?.status.success() {
        return Ok(None);
    }
    let dump = host.run(["wg", "show", device, "dump"])?;
    let mut lines = dump.lines();
    let head: Vec<&str> = lines.next().context("no device")?.split('\t').collect();
    let mut taken = Taken::from([format!("{} at {}", head[0], head[2])]);
    for line in lines {
        let [key, psk, endpoint, ips, _, _, _, keepalive] =
            line.split('\t').collect::<Vec<_>>()[..]
        else {
            anyhow::bail!("{line}");
        };
        let ips: BTreeSet<&str> = ips.split(',').collect();
        taken.insert(format!("{key} {psk} {endpoint} {ips:?} {keepalive}"));
    }
    Ok(Some(taken))
}

/// Imports the file, and reads what was written; the error is what import has told.
fn by_import(host: &Host, file: &str) -> anyhow::Result<Result<Taken, String>> {
    let directory = host.folder().join("imported");
    let binary = lab::sluice::binary()?;
    let command = host.command([binary.as_os_str(), "import".as_ref(), file.as_ref()]);
    let output = command.arg("--dir").arg(&directory).output()?;
    if !output.status.success() {
        return Ok(Err(output.stderr));
    }
    let config = router::config::load(&directory.join("sluice.toml"))?;
    fs::remove_dir_all(&directory)?;
    let local = &config.local;
    let key = config.private_key().context("no key")?.expose_base64();
    let mut taken = Taken::from([format!("{key} at {}", local.listen_port)]);
    for peer in &config.snapshot.peers {
        let none = || "(none)".to_owned();
        let psk = peer.preshared_key.as_ref();
        let psk = psk.map_or_else(none, |key| key.expose_base64());
        let endpoint = match &peer.endpoint {
            Some(router::control::Endpoint::Addr(address)) => address.to_string(),
            _ => none(),
        };
        let ips: BTreeSet<String> = peer.allowed_ips.iter().map(ToString::to_string).collect();
        let keepalive = peer.keepalive.filter(|seconds| *seconds > 0);
        let keepalive = keepalive.map_or_else(|| "off".to_owned(), |seconds| seconds.to_string());
        let key = peer.public_key;
        taken.insert(format!("{key} {psk} {endpoint} {ips:?} {keepalive}"));
    }
    Ok(Ok(taken))
}

#[test]
fn import_reads_files_as_wg_does() {
    use Import::{Alone, Neither, Refuses, Same};
    lab::test(|lab| {
        let host = lab.host("host")?;
        let device = sluice(&host, &Tunnel::new(&Keypair::generate()?))?;
        let (own, a, b) = (
            Keypair::generate()?,
            Keypair::generate()?,
            Keypair::generate()?,
        );
        let psk = &Keypair::generate()?.private;
        let (a, b) = (&a.public, &b.public);
        let own = &own.private;
        let (half, rest) = own.split_at(17);
        let zero = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        let address = "Address = 10.0.0.1/24, fd00::1/64\nListenPort = 7000\n";
        let head = format!("[Interface]\nPrivateKey = {own}\n{address}");
        let peer = format!("[Peer]\nPublicKey = {a}\nAllowedIPs = 10.0.0.2/32\n");
        let both = format!("{head}{peer}");
        let mut latin = format!("# Gr_n\n{both}PersistentKeepalive = 5 # f_r\n").into_bytes();
        for byte in &mut latin {
            if *byte == b'_' {
                *byte = 0xfc;
            }
        }
        let table: &[(&str, Import, Vec<u8>)] = &[
            ("plain", Same, both.clone().into()),
            ("no line end", Same, both.trim_end().into()),
            ("CRLF", Same, both.replace('\n', "\r\n").into()),
            ("Latin-1", Same, latin),
            ("a zero byte", Same, both.replace("Allowed", "Allo\0wed").into()),
            ("a byte order mark", Alone, format!("\u{feff}{both}").into()),
            ("case", Same, both.to_lowercase().replace(&own.to_lowercase(), own).replace(&a.to_lowercase(), a).into()),
            ("blanks in keys", Same, both.replace("ListenPort", "Listen\tPort ").replace("[Peer]", "[ Pe er ]").into()),
            ("blanks in values", Same, both.replace(own, &format!("{half} \t{rest}")).replace("7000", "7 000").into()),
            ("blanks in a network", Same, both.replace("10.0.0.2/32", "10. 0.0.2 / 32 , fd00::2").into()),
            ("addresses by blanks", Same, both.replace("/24, ", "/24 ").into()),
            ("blanks in wg-quick's keys", Neither, both.replace("Address", "Add ress").into()),
            ("a trailing comment", Same, both.replace("7000", "7000#8").into()),
            ("a comment by semicolon", Neither, format!("; hello\n{both}").into()),
            ("the last port", Same, both.replace("7000\n", "7000\nListenPort = 07001\n").into()),
            ("a port by name", Refuses, both.replace("7000", "domain").into()),
            ("a port too high", Refuses, both.replace("7000", "70000").into()),
            ("no port", Neither, both.replace("7000", "").into()),
            ("the last key", Same, both.replace("PrivateKey", &format!("PrivateKey={psk}\nPrivateKey")).into()),
            ("a key too short", Neither, both.replace(own, &own[1..]).into()),
            ("a key with loose bits", Neither, both.replace(own, &format!("{}B=", "A".repeat(42))).into()),
            ("no private key", Refuses, format!("[Interface]\n{address}{peer}").into()),
            ("a private key of zeros", Refuses, both.replace(own, zero).into()),
            ("marks", Same, both.replace("ListenPort", "FwMark = 0xFf\nFwMark = OFF\nListenPort").into()),
            ("a preshared key", Same, format!("{both}PresharedKey = {psk}\n").into()),
            ("one of zeros", Same, format!("{both}PresharedKey = {psk}\nPresharedKey = {zero}\n").into()),
            ("more networks", Same, format!("{both}AllowedIPs = 10.0.0.3/032,192.168.7.9/24\nAllowedIPs = FD00::2\n").into()),
            ("the same twice", Same, format!("{both}AllowedIPs = 10.0.0.2, 10.0.0.2/32\n").into()),
            ("a network too long", Neither, both.replace("/32", "/33").into()),
            ("an address in octal", Neither, both.replace("10.0.0.2/32", "010.0.0.2/32").into()),
            ("a mask", Neither, both.replace("10.0.0.2/32", "10.0.0.0/255.255.255.0").into()),
            ("an empty item", Alone, both.replace("10.0.0.2/32", "10.0.0.2/32,,").into()),
            ("an endpoint", Same, format!("{both}Endpoint = 192.0.2.1 :\t 51820\n").into()),
            ("an IPv6 endpoint", Same, format!("{both}Endpoint = [2001:db8::1]:1\n").into()),
            ("an endpoint without port", Alone, format!("{both}Endpoint = 192.0.2.1\n").into()),
            ("keepalive", Same, format!("{both}PersistentKeepalive = 25\n").into()),
            ("off", Same, format!("{both}PersistentKeepalive = 25\nPersistentKeepalive = oFF\n").into()),
            ("a signed keepalive", Neither, format!("{both}PersistentKeepalive = +25\n").into()),
            ("a keepalive too long", Neither, format!("{both}PersistentKeepalive = 65536\n").into()),
            ("a peer without key", Neither, format!("{both}[Peer]\nAllowedIPs = 10.0.0.3/32\n").into()),
            ("a network that moves", Same, format!("{both}AllowedIPs = 10.0.0.3\n[Peer]\nPublicKey = {b}\nAllowedIPs = 10.0.0.3\n").into()),
            ("a peer twice", Same, format!("{both}Endpoint = 192.0.2.1:1\n[Peer]\nPublicKey = {b}\nAllowedIPs = 10.0.0.3,10.0.0.4\n[Peer]\nPublicKey = {a}\nAllowedIPs = 10.0.0.3\n").into()),
            ("sections twice", Same, format!("{peer}[Interface]\nListenPort = 7000\n[Interface]\nPrivateKey = {own}\nAddress = 10.0.0.1/24\n").into()),
            ("another section", Neither, format!("{both}[Peers]\n").into()),
            ("a key before all", Neither, format!("ListenPort = 7000\n{both}").into()),
            ("a key of the other section", Neither, format!("{both}ListenPort = 7000\n").into()),
            ("an unknown key", Neither, format!("{both}Colour = red\n").into()),
            ("no value", Neither, format!("{both}Endpoint\n").into()),
            ("nothing", Refuses, Vec::new()),
        ];
        let path = host.folder().join("wg0.conf");
        let file = path.to_string_lossy();
        for (what, expected, text) in table {
            fs::write(&path, text)?;
            let theirs = by_wg(&host, device.device(), &file)?;
            let ours = by_import(&host, &file).with_context(|| (*what).to_owned())?;
            if let Err(told) = &ours {
                let place = told.split("wg0.conf:").nth(1).unwrap_or_default();
                let line = place.starts_with(|c: char| c.is_ascii_digit());
                ensure!(line, "{what}: no line in {told}");
            }
            let found = match (&theirs, &ours) {
                (Some(theirs), Ok(ours)) => {
                    ensure!(theirs == ours, "{what}: wg\n{theirs:#?}\nimport\n{ours:#?}");
                    Same
                }
                (Some(_), Err(_)) => Refuses,
                (None, Ok(_)) => Alone,
                (None, Err(_)) => Neither,
            };
            ensure!(
                found == *expected,
                "{what}: {found:?}, {theirs:?}\n{ours:?}"
            );
        }
        Ok(())
    });
}
