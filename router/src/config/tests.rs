//! The fixtures of tests/fixtures/config, the example, and mutated files.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::control::{Denied, Endpoint, RouteMode};

pub(crate) const EXAMPLE: &str = include_str!("../../../docs/sluice.example.toml");
const MANUAL: &str = include_str!("../../../docs/configuration.md");
const AWS: &str = include_str!("../../../docs/aws.md");
const README: &str = include_str!("../../../README.md");

/// The private key of Alice in RFC 7748 section 6.1, in base64.
const ALICE: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=\n";
const PRESHARED: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n";

/// A directory with the key files that fixtures and examples name. Keys are not kept in the
/// repository, where modes such as 0600 are lost and secrets do not belong.
pub(crate) fn directory_with_keys() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text, mode) in [
        ("private.key", ALICE, 0o600),
        ("office.psk", PRESHARED, 0o600),
        ("public.psk", PRESHARED, 0o644),
        ("group.key", ALICE, 0o640),
        ("world.key", ALICE, 0o604),
        ("empty.key", "", 0o600),
        (
            "short.key",
            "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqwXf7pR25LC=\n",
            0o600,
        ),
        (
            "zero.psk",
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n",
            0o600,
        ),
    ] {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::create_dir(directory.path().join("keys")).unwrap();
    directory
}

pub(crate) fn parse_in_temporary_directory(text: &str) -> Result<Config, ConfigErrors> {
    let directory = directory_with_keys();
    parse(text, &directory.path().join("sluice.toml"))
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/config")
}

/// Every broken file yields exactly the sentences beside it. `SLUICE_BLESS=1` writes them anew.
#[test]
fn broken_files_are_told_in_full() {
    let bless = std::env::var_os("SLUICE_BLESS").is_some();
    let directory = directory_with_keys();
    let prefix = format!("{}/", directory.path().display());
    let mut count = 0;
    let mut wrong = String::new();
    for entry in fs::read_dir(fixtures()).unwrap() {
        let fixture = entry.unwrap().path();
        if fixture
            .extension()
            .is_none_or(|extension| extension != "toml")
        {
            continue;
        }
        count += 1;
        let place = directory.path().join(fixture.file_name().unwrap());
        fs::copy(&fixture, &place).unwrap();
        let found = match load(&place) {
            Ok(_) => "no problem found\n".to_owned(),
            Err(errors) => format!("{errors}\n").replace(&prefix, ""),
        };
        let golden = fixture.with_extension("expected");
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        if bless {
            fs::write(&golden, &found).unwrap();
        }
        if found != expected {
            wrong += &format!("{}:\n{found}expected:\n{expected}\n", fixture.display());
        }
        assert!(
            !found.contains(ALICE.trim()) && !found.contains("dwdtCnMYpX08"),
            "{found}"
        );
    }
    assert!(count >= 20, "{count} fixtures in {}", fixtures().display());
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn the_example_is_valid_and_shows_every_key() {
    let config = parse_in_temporary_directory(EXAMPLE).unwrap();
    assert_eq!(config.snapshot.peers.len(), 2);
    assert_eq!(config.snapshot.peers[0].name.as_deref(), Some("laptop"));
    assert!(matches!(
        config.snapshot.peers[1].endpoint,
        Some(Endpoint::Name { port: 51820, .. })
    ));
    assert!(config.snapshot.peers[1].preshared_key.is_some());
    assert!(
        config
            .snapshot
            .routes
            .iter()
            .any(|r| r.mode == RouteMode::Stack)
    );
    assert!(config.snapshot.routes.iter().any(|r| !r.snat));
    for (section, keys) in section::SCHEMA {
        for key in keys.iter().filter(|_| !section.is_empty()) {
            let shown = EXAMPLE
                .lines()
                .any(|line| line.trim_start_matches("# ").starts_with(key));
            assert!(shown, "[{section}] {key} is not in the example");
            assert!(
                MANUAL.contains(&format!("`{key}`")),
                "[{section}] {key} is not in the manual"
            );
        }
    }
}

#[test]
fn the_denied_are_told_if_the_file_says_so() {
    let base = "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = [\"100.64.0.1/24\"]\n";
    let with = |denied: &str| parse_in_temporary_directory(&format!("{base}{denied}"));
    for (text, wanted) in [
        ("", Denied::Drop),
        ("[policy]\ndenied = \"drop\"\n", Denied::Drop),
        ("[policy]\ndenied = \"reject\"\n", Denied::Reject),
    ] {
        assert_eq!(with(text).unwrap().snapshot.policy.denied, wanted);
    }
    let error = with("[policy]\ndenied = \"refuse\"\n").unwrap_err();
    let says = "5:10: policy.denied: \"refuse\" is none of \"drop\", \"reject\"";
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn each_offload_can_be_switched_off() {
    let base = "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = [\"100.64.0.1/24\"]\n";
    let with = |line: &str| parse_in_temporary_directory(&format!("{base}[offloads]\n{line}\n"));
    for name in Offloads::NAMES {
        let mut wanted = Offloads::ALL;
        *wanted.named(name).unwrap() = false;
        let config = with(&format!("{name} = false")).unwrap();
        assert_eq!(config.local.offloads, wanted);
    }
    let error = with("tun_tso = \"no\"").unwrap_err().to_string();
    assert!(error.contains("5:11: offloads.tun_tso: "), "{error}");
}

#[test]
fn the_file_says_how_long_flows_may_take_to_end() {
    let base = "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = [\"100.64.0.1/24\"]\n";
    let with = |text: &str| parse_in_temporary_directory(&format!("{base}{text}"));
    for (text, drain, stop) in [
        ("", 300, 0),
        ("[drain]\ntimeout = 0\n", 0, 0),
        ("[drain]\ntimeout = 60\nstop_timeout = 20\n", 60, 20),
    ] {
        let wanted = Patience {
            drain: Duration::from_secs(drain),
            stop: Duration::from_secs(stop),
        };
        assert_eq!(with(text).unwrap().local.patience, wanted);
    }
    let error = with("[drain]\ntimeout = -1\nstop_timeout = 86401\n").unwrap_err();
    for says in [
        "5:11: drain.timeout: -1 is no time in seconds",
        "6:16: drain.stop_timeout: 86401 is no time",
    ] {
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn complete_examples_of_the_documents_are_valid() {
    let mut count = 0;
    let blocks = |text: &'static str| text.split("```toml complete\n").skip(1);
    let all = [MANUAL, README, AWS].into_iter().flat_map(blocks);
    for block in all {
        let text = block.split("```").next().unwrap();
        // The one absolute path of the examples, which is not on this machine.
        let text = &text.replace("/var/run/secrets/sluice/", "");
        parse_in_temporary_directory(text).unwrap_or_else(|errors| panic!("{errors}\n{text}"));
        count += 1;
    }
    assert!(count >= 6, "{count} complete examples");
}

#[test]
fn the_least_file_gets_the_defaults() {
    let config = parse_in_temporary_directory(
        "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = [\"100.64.0.1/24\"]\n",
    )
    .unwrap();
    let local = config.local;
    assert_eq!((local.listen_port, local.mtu), (51820, Mtu::Auto));
    assert_eq!(local.socket, Path::new("/run/sluice/sluice0.sock"));
    assert_eq!((local.uplink, local.subnet.len()), (Interface::Auto, 0));
    assert_eq!((local.workers, local.http), (None, None));
    assert!(!local.uplink_guard);
    assert!(!local.name.is_empty());
    assert_eq!(config.snapshot, Snapshot::default());
}

#[test]
fn rules_take_peers_by_name() {
    let config = parse_in_temporary_directory(&format!(
        "{EXAMPLE}\n[[rule]]\nfrom = [\"laptop\", \"100.64.9.0/24\"]\nto = [\"*:22\"]\nprotocols = \
         [\"icmp\", \"tcp\", 132]\n"
    ));
    // 132 (SCTP) cannot be with ports.
    assert!(
        config.unwrap_err().0[0]
            .message
            .contains("132 does not have")
    );
    let config = parse_in_temporary_directory(&format!(
        "{EXAMPLE}\n[[rule]]\nfrom = [\"laptop\", \"100.64.9.0/24\"]\nto = [\"*:22\"]\nprotocols = \
         [\"icmp\", \"tcp\"]\n"
    ))
    .unwrap();
    let rule = config.snapshot.policy.rules.last().unwrap();
    let mut sources = config.snapshot.peers[0].allowed_ips.clone();
    sources.push("100.64.9.0/24".parse().unwrap());
    assert_eq!(rule.sources, sources);
    assert_eq!(rule.protocols, [1, 58, 6]);
    assert_eq!(rule.destinations.len(), 2);
}

#[test]
fn only_changed_settings_need_a_restart() {
    let old = parse_in_temporary_directory(EXAMPLE).unwrap().local;
    assert_eq!(restart_needed(&old, &old), Vec::<String>::new());
    let new = Local {
        mtu: Mtu::Fixed(1300),
        listen_port: 5,
        workers: Some(3),
        ..old.clone()
    };
    let told = restart_needed(&old, &new);
    assert_eq!(told.len(), 1);
    assert!(told[0].starts_with("datapath.workers "), "{told:?}");
}

#[test]
fn a_file_that_cannot_be_read_is_told() {
    let directory = directory_with_keys();
    let at = |name: &str| load(&directory.path().join(name)).unwrap_err().to_string();
    assert!(at("none.toml").ends_with("none.toml: does not exist; `sluice init` makes one"));
    assert!(at("keys").contains("cannot be read: "));
    fs::write(
        directory.path().join("latin.toml"),
        b"name = \"x\"\n# caf\xe9\n",
    )
    .unwrap();
    assert!(at("latin.toml").contains("line 2 is not UTF-8"));
}

/// Ten thousand peers with ten allowed IPs each: the start budget is 2 s for everything, and what
/// is not linear here takes minutes.
#[test]
fn many_peers_are_read() {
    use std::fmt::Write as _;
    let mut text = "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = \
                    [\"100.64.0.1/10\"]\n"
        .to_owned();
    for peer in 0..10_000u32 {
        let mut key = [9u8; 32];
        key[..4].copy_from_slice(&peer.to_le_bytes());
        let key = crate::wireguard::keys::PublicKey(key);
        let nets = (0..10u32).map(|i| {
            let address = std::net::Ipv4Addr::from(0x6440_0002 + peer * 16 + i);
            format!("\"{address}/32\"")
        });
        let nets: Vec<String> = nets.collect();
        write!(
            text,
            "[[peer]]\nname = \"p{peer}\"\npublic_key = \"{key}\"\nallowed_ips = [{}]\nendpoint = \
             \"192.0.2.1:{}\"\n",
            nets.join(", "),
            1 + peer
        )
        .unwrap();
    }
    let config = parse_in_temporary_directory(&text).unwrap();
    let nets: usize = config
        .snapshot
        .peers
        .iter()
        .map(|peer| peer.allowed_ips.len())
        .sum();
    assert_eq!(nets, 100_000);
}

/// One way of spoiling a text.
#[derive(Clone, Debug)]
enum Mutation {
    Delete(prop::sample::Index, usize),
    Insert(prop::sample::Index, String),
    Swap(prop::sample::Index, prop::sample::Index),
    Repeat(prop::sample::Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let index = any::<prop::sample::Index>;
    let tokens = prop::sample::select(vec![
        "\"",
        "'",
        "\"\"\"",
        "[",
        "]",
        "[[",
        "{",
        "}",
        "=",
        "\n",
        ",",
        ".",
        "#",
        "\\",
        "-1",
        "0",
        "%",
        "true",
        "1e9",
        "1979-05-27",
        "99999999999999999999",
        "/",
        ":",
        "::",
        "*",
        "\0",
        "é",
        "\r",
        "peer",
        "[peer]",
        "wireguard.mtu = 1\n",
        "/0",
        "0.0.0.0/0",
    ]);
    prop_oneof![
        (index(), 1..40usize).prop_map(|(at, n)| Mutation::Delete(at, n)),
        (index(), tokens).prop_map(|(at, token)| Mutation::Insert(at, token.to_owned())),
        (index(), "\\PC{1,3}").prop_map(|(at, token)| Mutation::Insert(at, token)),
        (index(), index()).prop_map(|(a, b)| Mutation::Swap(a, b)),
        index().prop_map(Mutation::Repeat),
    ]
}

fn mutate(text: &str, mutation: &Mutation) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
    let cut = |at: &prop::sample::Index| at.index(chars.len() + 1);
    match mutation {
        Mutation::Delete(at, n) => {
            let at = cut(at);
            chars[..at]
                .iter()
                .chain(chars.iter().skip(at + n))
                .collect()
        }
        Mutation::Insert(at, token) => {
            let (before, after) = chars.split_at(cut(at));
            let token: Vec<char> = token.chars().collect();
            before.iter().chain(&token).chain(after).collect()
        }
        _ if lines.is_empty() => String::new(),
        Mutation::Swap(a, b) => {
            let (a, b) = (a.index(lines.len()), b.index(lines.len()));
            lines.swap(a, b);
            lines.concat()
        }
        Mutation::Repeat(at) => {
            let at = at.index(lines.len());
            lines.insert(at, lines[at]);
            lines.concat()
        }
    }
}

proptest! {
    /// A spoiled file is refused in sentences, each on one line, or is still valid; never a panic.
    #[test]
    fn mutated_files_never_panic(mutations in prop::collection::vec(mutation(), 1..6)) {
        let text = mutations.iter().fold(EXAMPLE.to_owned(), |text, m| mutate(&text, m));
        if let Err(ConfigErrors(problems)) = parse_in_temporary_directory(&text) {
            prop_assert!(!problems.is_empty());
            for problem in problems {
                let line = problem.to_string();
                prop_assert!(!line.contains(char::is_control), "{:?}", line);
                let position = problem.position.unwrap();
                prop_assert!(position.line as usize <= text.lines().count() + 1);
            }
        }
    }

    /// No text at all makes the reader panic.
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}", bits: Vec<u8>) {
        let _ = parse(&text, Path::new("sluice.toml"));
        let _ = parse(&String::from_utf8_lossy(&bits), Path::new("sluice.toml"));
    }
}

#[test]
fn the_examples_of_the_tailnets_manual_are_valid() {
    let manual = include_str!("../../../docs/tailnet.md");
    let mut blocks = manual.split("```toml\n").skip(1);
    let block = blocks.next().unwrap().split("```").next().unwrap();
    let text: Vec<&str> = block.lines().map(str::trim).collect();
    let config = parse(&text.join("\n"), Path::new("/nowhere/sluice.toml")).unwrap();
    let settings = config.tailnet.unwrap();
    assert_eq!(settings.advertise_routes.len(), 1);
    assert_eq!(settings.hostname.as_deref(), Some("vpc-router"));
    assert!(
        blocks.next().is_none(),
        "another example, which is not tried"
    );
}
