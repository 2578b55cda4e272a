use std::os::unix::fs::PermissionsExt as _;

use super::*;

const OWN: &str = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";
const A: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
const B: &str = "TrMvSoP4jYQlY6RIzBgbssQqY3vxI2Pi+y71lOWWXX0=";
const PSK: &str = "FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=";

fn args(directory: &Path, text: impl AsRef<[u8]>) -> Args {
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
    let args = args(directory.path(), server());
    let told = import(&args).unwrap();
    let config = config::load(&args.dir.join("sluice.toml")).unwrap();
    let local = &config.local;
    assert_eq!(config.private_key().unwrap().expose_base64(), OWN);
    assert_eq!(
        (local.listen_port, local.mtu),
        (51821, config::Mtu::Fixed(1380))
    );
    assert_eq!(local.device, "wg0");
    let nets: Vec<String> = config.addresses().iter().map(ToString::to_string).collect();
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
    let mut args = args(directory.path(), server());
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
        (
            "[Interface]\nListenPort = domain\n",
            "wg0.conf:2: ListenPort: \"domain\" is no number",
        ),
        (
            "[Interface]\nListenPort = +5\n",
            "wg0.conf:2: ListenPort: \"+5\" is no number",
        ),
        (
            "[Interface]\nPost Up = true\n",
            "wg0.conf:2: Post Up: is no key",
        ),
        (
            "[Interface]\nMTU = 1420\n",
            "wg0.conf:1: [Interface] has no PrivateKey, and no PostUp",
        ),
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

#[test]
fn blanks_case_and_repetition_are_read_as_wg_reads_them() {
    let directory = tempfile::tempdir().unwrap();
    let (half, rest) = OWN.split_at(20);
    let text = format!(
        "\u{feff}[interface]\r\nprivate key={half} {rest}\r\n  LISTENPORT =  05 1821\r\n\
         Address = 10.0.0.1/24 fd00::1/64\nFwMark=off\nListenPort = 51822\n\n[ Peer ]\n\
         PublicKey = {A}\nAllowedIPs = 10.0.0.2 / 32,10.0.0.9/032\nAllowedIPs = fd00::2\n\
         Endpoint = 192.0.2.1 : 5\nPersistentKeepalive = 2 5\nPersistentKeepalive = OFF\n\
         PresharedKey = {PSK}\nPresharedKey = AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n\
         [Peer]\nPublicKey={B}\nAllowedIPs = +10.0.0.3/32,10.0.0.4/32,-10.0.0.4/32\n\
         PersistentKeepalive = 7"
    );
    let args = args(directory.path(), &text);
    let told = import(&args).unwrap();
    assert!(!told.contains("wg0.conf:"), "{told}");
    let config = config::load(&args.dir.join("sluice.toml")).unwrap();
    assert_eq!(config.private_key().unwrap().expose_base64(), OWN);
    assert_eq!(config.local.listen_port, 51822);
    assert_eq!(config.addresses().len(), 2);
    let [a, b] = config.snapshot.peers.try_into().unwrap();
    let nets: Vec<String> = a.allowed_ips.iter().map(ToString::to_string).collect();
    assert_eq!(nets, ["10.0.0.2/32", "10.0.0.9/32", "fd00::2/128"]);
    assert_eq!(a.endpoint, config::parse_endpoint("192.0.2.1:5").ok());
    assert_eq!((a.keepalive, a.preshared_key), (None, None));
    let nets: Vec<String> = b.allowed_ips.iter().map(ToString::to_string).collect();
    assert_eq!(
        (&*nets, b.keepalive),
        (&["10.0.0.3/32".to_owned()][..], Some(7))
    );
}

#[test]
fn other_encodings_refuse_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let mut text = format!(
        "# B?ro\n[Interface]\nPrivateKey = {OWN}\nAddress = 10.0.0.1/24\nListenPort = 5\n\
         PostUp = echo Gr?n\n[Peer] # J?rgen\nPublicKey = {A}\nAllowedIPs = 10.0.0.2/32\n"
    )
    .into_bytes();
    for byte in &mut text {
        if *byte == b'?' {
            *byte = 0xfc;
        }
    }
    text.insert(8, 0);
    let args = args(directory.path(), &text);
    let told = import(&args).unwrap();
    assert!(
        told.contains("wg0.conf:6: the command is left out"),
        "{told}"
    );
    let config = config::load(&args.dir.join("sluice.toml")).unwrap();
    let name = config.snapshot.peers[0].name.as_deref();
    assert_eq!(name, Some("J\u{fc}rgen"));
}

#[test]
fn a_peer_without_a_key_is_refused_and_one_that_stands_twice_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let head = format!("[Interface]\nPrivateKey = {OWN}\nAddress = 10.0.0.1/24\nListenPort = 5\n");
    let text = format!("{head}[Peer]\nAllowedIPs = 10.0.0.2/32\n[Peer]\nPublicKey = {A}\n");
    let args = args(directory.path(), &text);
    let error = import(&args).unwrap_err().to_string();
    assert!(
        error.starts_with(&args.file.display().to_string()),
        "{error}"
    );
    assert!(
        error
            .ends_with("wg0.conf:5: [Peer]: has no PublicKey; add that line, or remove this block"),
        "{error}"
    );
    let text = format!(
        "{head}[Peer]\nPublicKey = {A}\nAllowedIPs = 10.0.0.2/32\nEndpoint = 192.0.2.1:5\n\
         PersistentKeepalive = 5\n[Peer]\nPublicKey = {B}\nAllowedIPs = 10.0.0.3/32\n[Peer]\n\
         PublicKey = {A}\nAllowedIPs = 10.0.0.3/32, 10.0.0.4/32\n"
    );
    fs::write(&args.file, text).unwrap();
    let told = import(&args).unwrap();
    for says in [
        "wg0.conf:10: this peer has no AllowedIPs",
        "wg0.conf:12: 10.0.0.3/32 is given to a later peer",
        "wg0.conf:13: this [Peer] has the key of the one in line 5",
    ] {
        assert!(told.contains(says), "no {says} in\n{told}");
    }
    let config = config::load(&args.dir.join("sluice.toml")).unwrap();
    let [a] = config.snapshot.peers.try_into().unwrap();
    let nets: Vec<String> = a.allowed_ips.iter().map(ToString::to_string).collect();
    assert_eq!(nets, ["10.0.0.3/32", "10.0.0.4/32"]);
    assert!(a.endpoint.is_some() && a.keepalive == Some(5));
}

#[test]
fn what_postup_sets_with_wg_is_taken_without_running_it() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path().display();
    for (name, key) in [("wg0.key", OWN), ("a.psk", PSK)] {
        let file = directory.path().join(name);
        fs::write(&file, key).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    let made = directory.path().join("made");
    let text = format!(
        "[Interface]\nPostUp = wg set %i private-key {folder}/%i.key # not here\n\
         Address = 10.0.0.1/24\n\
         PostUp = sudo /usr/bin/wg set wg0 listen-port 7 peer {A} preshared-key '{folder}/a.psk' \
         allowed-ips 10.0.0.9/32,10.0.0.3/32; touch {}\n\
         PostUp = wg set wg0 peer {PSK} remove\nPostUp = wg set wg1 listen-port 3\n\
         PostUp = wg show\n\
         [Peer]\nPublicKey = {A}\nAllowedIPs = 10.0.0.2/32\n[Peer]\nPublicKey = {B}\n\
         AllowedIPs = 10.0.0.3/32, 10.0.0.4/32\n[Peer]\nPublicKey = {PSK}\nAllowedIPs = 10.0.0.5/32\n",
        made.display()
    );
    let args = args(directory.path(), &text);
    let told = import(&args).unwrap();
    for says in [
        "wg0.conf:2: the command is not run; what it sets stands in sluice.toml",
        "wg0.conf:4: what wg sets here stands in sluice.toml; of the rest, the command is left out",
        "wg0.conf:5: the command is not run",
        "wg0.conf:6: the command is left out",
        "wg0.conf:7: the command is left out",
        "wg0.conf:13: 10.0.0.3/32 is given to a later peer",
    ] {
        assert!(told.contains(says), "no {says} in\n{told}");
    }
    assert!(!made.exists(), "a command was run");
    assert!(!args.dir.join("private.key").exists());
    let config = config::load(&args.dir.join("sluice.toml")).unwrap();
    assert_eq!(config.private_key().unwrap().expose_base64(), OWN);
    assert_eq!(config.local.listen_port, 7);
    let [a, b] = config.snapshot.peers.try_into().unwrap();
    assert_eq!(a.preshared_key.unwrap().expose_base64(), PSK);
    let nets: Vec<String> = a.allowed_ips.iter().map(ToString::to_string).collect();
    assert_eq!(nets, ["10.0.0.9/32", "10.0.0.3/32"]);
    assert_eq!(b.allowed_ips.len(), 1);
}

#[test]
fn what_only_running_a_command_could_tell_is_refused_by_line() {
    let directory = tempfile::tempdir().unwrap();
    for (command, says) in [
        (
            "wg set %i private-key <(pass wg/%i)",
            "cannot tell the value of \"private-key\"",
        ),
        (
            "wg set %i private-key $KEY",
            "cannot tell the value of \"private-key\"",
        ),
        (
            "pass wg | wg set %i private-key /dev/stdin",
            "no regular file",
        ),
        ("wg set %i private-key /nonexistent/key", "No such file"),
        ("wg set %i private-key wg.key", "write its whole path"),
        ("wg set %i colour red", "\"colour\" is no word"),
        ("wg set $DEV private-key /a", "wg it cannot read"),
        ("wg addconf %i /etc/wireguard/more", "wg it cannot read"),
        ("bash -c 'wg set wg0 private-key /a'", "wg it cannot read"),
        ("true", "[Interface] has no PrivateKey, and no PostUp"),
    ] {
        let text = format!("[Interface]\n\nPostUp = {command}\n");
        let args = args(directory.path(), &text);
        let error = import(&args).unwrap_err().to_string();
        let line = if command == "true" { 1 } else { 3 };
        assert!(error.contains(&format!("wg0.conf:{line}: ")), "{error}");
        assert!(error.contains(says), "{command}: {error}");
        assert!(!args.dir.exists(), "{command}");
    }
}
