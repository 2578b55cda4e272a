use std::os::unix::fs::PermissionsExt as _;

use super::*;

const OWN: &str = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";
const A: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
const B: &str = "TrMvSoP4jYQlY6RIzBgbssQqY3vxI2Pi+y71lOWWXX0=";
const PSK: &str = "FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=";

fn args(directory: &Path, text: &str) -> Args {
    let file = directory.join("wg0.conf");
    fs::write(&file, text).unwrap();
    Args {
        file,
        dir: directory.join("sluice"),
        force: false,
    }
}

/// A file as the usual guides and scripts have it.
fn server() -> String {
    format!(
        "# a server\n[Interface]\nPrivateKey = {OWN}\nAddress = 10.66.66.1/24,fd42:42:42::1/64\n\
         ListenPort = 51821 # open in the firewall\nMTU = 1380\nDNS = 1.1.1.1\nSaveConfig = true\n\
         PostUp = iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE\n\
         PostUp = iptables -A FORWARD -i %i -j ACCEPT\nPostDown = echo bye\nTable = 1234\n\
         FwMark = 0x1\n\n### Client laptop\n[Peer]\nPublicKey = {A}\nPresharedKey = {PSK}\n\
         AllowedIPs = 10.66.66.2/32,fd42:42:42::2/128\n\n[peer]\n# office\npublickey={B}\n\
         allowedips = 10.66.66.3, 192.168.20.7/24\nAllowedIPs = 0.0.0.0/0\n\
         Endpoint = office.example.com:51820\nPersistentKeepalive = 25\n"
    )
}

#[test]
fn a_server_of_wg_quick_becomes_a_router() {
    let directory = tempfile::tempdir().unwrap();
    let args = args(directory.path(), &server());
    let told = import(&args).unwrap();
    let config = config::load(&args.dir.join("sluice.toml")).unwrap();
    let local = &config.local;
    assert_eq!(local.private_key.expose_base64(), OWN);
    assert_eq!((local.listen_port, local.mtu), (51821, 1380));
    assert_eq!(local.device, "wg0");
    let nets: Vec<String> = local.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(nets, ["10.66.66.1/24", "fd42:42:42::1/64"]);
    let [laptop, office] = config.snapshot.peers.try_into().unwrap();
    assert_eq!(laptop.name.as_deref(), Some("laptop"));
    assert_eq!(laptop.public_key.to_string(), A);
    assert_eq!(laptop.preshared_key.unwrap().expose_base64(), PSK);
    assert_eq!(laptop.allowed_ips.len(), 2);
    assert_eq!(office.name.as_deref(), Some("office"));
    let nets: Vec<String> = office.allowed_ips.iter().map(ToString::to_string).collect();
    assert_eq!(nets, ["10.66.66.3/32", "192.168.20.0/24"]);
    assert_eq!(office.keepalive, Some(25));
    assert!(office.endpoint.is_some());

    // Every line that was left out is told, and nothing secret.
    for (line, says) in [
        (7, "DNS is left out"),
        (8, "SaveConfig is left out"),
        (9, "snat = true"),
        (10, "lets packets through"),
        (11, "ExecStartPost="),
        (12, "Table is left out"),
        (13, "FwMark is left out"),
        (25, "0.0.0.0/0 is left out"),
    ] {
        let place = format!("wg0.conf:{line}: ");
        let found = told.lines().find(|l| l.contains(&place));
        let found = found.unwrap_or_else(|| panic!("no {place} in\n{told}"));
        assert!(found.contains(says), "{found}");
    }
    assert!(!told.contains(OWN) && !told.contains(PSK), "{told}");
    for name in ["private.key", "peer-1.psk"] {
        let mode = fs::metadata(args.dir.join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let toml = fs::read_to_string(args.dir.join("sluice.toml")).unwrap();
    assert!(!toml.contains(OWN) && !toml.contains(PSK));
}

#[test]
fn nothing_is_overwritten_unless_asked_and_keys_never() {
    let directory = tempfile::tempdir().unwrap();
    let mut args = args(directory.path(), &server());
    import(&args).unwrap();
    let error = import(&args).unwrap_err().to_string();
    assert!(error.contains("--force"), "{error}");
    args.force = true;
    let told = import(&args).unwrap();
    assert!(told.contains("kept "), "{told}");
    fs::write(&args.file, server().replace(OWN, PSK)).unwrap();
    let error = import(&args).unwrap_err().to_string();
    assert!(error.contains("private.key holds another key"), "{error}");
}

#[test]
fn what_is_no_file_of_wg_quick_is_refused_by_line() {
    let directory = tempfile::tempdir().unwrap();
    for (text, says) in [
        ("", "wg0.conf:1: there is no [Interface]"),
        ("hello\n", "wg0.conf:1: there is no `Key = value`"),
        ("Address = 10.0.0.1\n", "wg0.conf:1: Address: stands before"),
        (
            "[Interface]\nPrivateKey = abc\n",
            "wg0.conf:2: PrivateKey: a WireGuard key is",
        ),
        (
            "[Interface]\nAddress = 10.0.0.1/33\n",
            "wg0.conf:2: Address: \"10.0.0.1/33\"",
        ),
        (
            "[Interface]\nListenPort = 70000\n",
            "wg0.conf:2: ListenPort: \"70000\" is no number",
        ),
        (
            "[Interface]\nColour = red\n",
            "wg0.conf:2: Colour: is no key",
        ),
        ("[Interfaces]\n", "wg0.conf:1: [Interfaces] is no section"),
    ] {
        let args = args(directory.path(), text);
        let error = import(&args).unwrap_err().to_string();
        assert!(error.contains(says), "{text:?}: {error}");
        assert!(!args.dir.exists(), "{text:?}");
    }
}

#[test]
fn what_wireguard_takes_and_sluice_does_not_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let text = format!(
        "[Interface]\nPrivateKey = {OWN}\nAddress = 10.0.0.1/24\nAddress = 10.1.0.1/24\nMTU = 900\n\
         [Peer]\nPublicKey = {A}\nAllowedIPs = 10.0.0.2/32, 10.0.0.3/32\n[Peer]\n\
         PublicKey = {B}\nAllowedIPs = 10.0.0.3/32, 10.0.0.3/32\nEndpoint = nowhere\n[Peer]\n\
         PublicKey = {PSK}\nAllowedIPs = ::/0\n"
    );
    let args = args(directory.path(), &text);
    let told = import(&args).unwrap();
    for says in [
        "wg0.conf:1: there is no ListenPort",
        "wg0.conf:4: 10.1.0.1/24 is left out",
        "wg0.conf:5: an MTU of 900",
        "wg0.conf:8: 10.0.0.3/32 is given to a later peer",
        "wg0.conf:12: Endpoint is left out",
        "wg0.conf:13: this peer has no AllowedIPs",
        "wg0.conf:15: ::/0 is left out",
    ] {
        assert!(told.contains(says), "no {says} in\n{told}");
    }
    assert!(!told.contains("mended by hand"), "{told}");
    let config = config::load(&args.dir.join("sluice.toml")).unwrap();
    assert_eq!(config.snapshot.peers.len(), 2);
}

#[test]
fn what_only_the_configuration_can_tell_is_told_too() {
    let directory = tempfile::tempdir().unwrap();
    let text = format!(
        "[Interface]\nPrivateKey = {OWN}\nAddress = 10.0.0.1/24\nListenPort = 5\n[Peer]\n\
         PublicKey = {A}\nAllowedIPs = 224.0.0.0/4, 10.0.0.2/32\n"
    );
    let told = import(&args(directory.path(), &text)).unwrap();
    let (_, problems) = told.split_once("mended by hand").unwrap();
    assert!(problems.contains("multicast"), "{told}");
}
