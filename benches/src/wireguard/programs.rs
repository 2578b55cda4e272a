//! What can carry a tunnel here: Sluice and its peers, each with its version or the reason why not.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::Lab;

use crate::case::{Context, Effort, Implementation};

/// Name of the implementation that all ratios refer to.
pub(crate) const REFERENCE: &str = "wireguard-go";

/// The peers that quick runs keep to.
const QUICK: [&str; 2] = [REFERENCE, "kernel WireGuard"];

/// How a router is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// Sluice.
    Sluice {
        /// `datapath.mode`.
        mode: &'static str,
        /// Whether it translates sources, as the plain programs do.
        snat: bool,
        /// Whether its uplink is guarded.
        guard: bool,
    },
    /// Sluice as a node of a tailnet, whose coordination server says who the peers are.
    Tailnet,
    /// A program that takes a device name as its last argument and answers `wg`.
    Daemon(Vec<OsString>),
    /// The kernel's WireGuard.
    Kernel,
}

/// An implementation, and how to start it or why it cannot be measured.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) implementation: Implementation,
    pub(crate) program: Result<Program, String>,
}

/// Every implementation that is compared.
pub(crate) fn candidates(context: &Context) -> Vec<Candidate> {
    let sluice = |variant, mode, snat| Candidate {
        implementation: Implementation::sluice(variant),
        program: Ok(Program::Sluice {
            mode,
            snat,
            guard: false,
        }),
    };
    let mut all = vec![sluice("", "ebpf", true)];
    if context.effort != Effort::Quick {
        all.push(sluice("no snat", "ebpf", false));
        all.push(sluice("kernel path", "kernel", true));
    }
    all.extend(wireguard_go());
    all.push(from_crates_io(
        "boringtun-cli",
        &["--foreground", "--disable-drop-privileges"],
    ));
    all.push(from_crates_io(
        "gotatun",
        &[
            "--foreground",
            "--disable-drop-privileges",
            "--verbosity",
            "error",
        ],
    ));
    all.push(kernel());
    all.push(tailscaled());
    if context.effort != Effort::Full {
        for candidate in &mut all {
            let Implementation { name, ours, .. } = &candidate.implementation;
            if candidate.program.is_ok() && !ours && !QUICK.contains(&name.as_str()) {
                candidate.program = Err("it is left out of quick runs".to_owned());
            }
        }
    }
    all
}

/// What Sluice is beside a router with a file: a node of a tailnet, and a WireGuard device alone.
pub(crate) fn other_roles(context: &Context) -> Vec<Candidate> {
    if context.effort == Effort::Quick {
        return Vec::new();
    }
    let role = |name, program| Candidate {
        implementation: Implementation::sluice(name),
        program,
    };
    let device = lab::sluice::binary().map(|binary| {
        let words = ["wireguard".into(), "--foreground".into()];
        Program::Daemon([binary.into()].into_iter().chain(words).collect())
    });
    vec![
        role("in a tailnet", Ok(Program::Tailnet)),
        role("wireguard", device.map_err(|error| error.to_string())),
    ]
}

/// The newest wireguard-go there is, for the clients.
pub(crate) fn client() -> Result<Vec<OsString>, String> {
    let newest = wireguard_go()
        .into_iter()
        .next()
        .map(|candidate| candidate.program);
    match newest {
        Some(Ok(Program::Daemon(argv))) => Ok(argv),
        Some(Err(why)) => Err(why),
        _ => Err("there is no wireguard-go".to_owned()),
    }
}

/// Where `cargo xtask setup --peers` puts what it brings.
fn brought() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers")
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

fn output(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

/// The newest first; an older one, that of the distribution's release, is told apart by name.
fn wireguard_go() -> Vec<Candidate> {
    let mut found: Vec<(String, PathBuf)> = std::fs::read_dir(brought().join("wireguard-go"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| {
            (
                entry.file_name().to_string_lossy().into_owned(),
                entry.path(),
            )
        })
        .map(|(version, folder)| (version, folder.join("usr/bin/wireguard-go")))
        .filter(|(_, binary)| binary.is_file())
        .collect();
    if let Some(binary) = on_path("wireguard-go")
        && let Some(version) = output("dpkg-query", &["-W", "-f", "${Version}", "wireguard-go"])
        && found.iter().all(|(known, _)| *known != version)
    {
        found.push((version, binary));
    }
    // Versions are dates.
    found.sort_by(|a, b| b.cmp(a));
    let candidate = |name: &str, (version, binary): &(String, PathBuf)| Candidate {
        implementation: Implementation::peer(name, version),
        program: Ok(Program::Daemon(vec![binary.into(), "--foreground".into()])),
    };
    match &found[..] {
        [] => vec![missing(
            REFERENCE,
            "it is not installed; `cargo xtask setup --peers` brings it",
        )],
        [only] => vec![candidate(REFERENCE, only)],
        [newest, .., oldest] => {
            vec![
                candidate(REFERENCE, newest),
                candidate("wireguard-go (release)", oldest),
            ]
        }
    }
}

fn from_crates_io(name: &str, args: &[&str]) -> Candidate {
    let brought = brought().join("bin").join(name);
    let binary = Some(brought)
        .filter(|file| file.is_file())
        .or_else(|| on_path(name));
    let Some(binary) = binary else {
        return missing(
            name,
            "it is not installed; `cargo xtask setup --peers` brings it",
        );
    };
    let version = output(&binary, &["--version"])
        .and_then(|text| Some(text.lines().next()?.split_whitespace().last()?.to_owned()))
        .unwrap_or_else(|| "unknown".to_owned());
    let argv = std::iter::once(binary.into())
        .chain(args.iter().map(Into::into))
        .collect();
    Candidate {
        implementation: Implementation::peer(name, version),
        program: Ok(Program::Daemon(argv)),
    }
}

fn kernel() -> Candidate {
    let name = "kernel WireGuard";
    let possible = Lab::new().and_then(|lab| lab.host("probe")?.ip("link add wg0 type wireguard"));
    match possible {
        Ok(_) => Candidate {
            implementation: Implementation::peer(
                name,
                output("uname", &["-r"]).unwrap_or_default(),
            ),
            program: Ok(Program::Kernel),
        },
        Err(_) => missing(
            name,
            "this kernel has no WireGuard, or this user may not make devices",
        ),
    }
}

fn tailscaled() -> Candidate {
    let name = "tailscaled";
    match on_path(name) {
        None => missing(name, "it is not installed"),
        Some(binary) => {
            let version = output(binary, &["--version"]).unwrap_or_default();
            let version = version.lines().next().unwrap_or("unknown").to_owned();
            Candidate {
                implementation: Implementation::peer(name, version),
                program: Err(
                    "it talks only to clients of its own coordination server, and this suite has \
                     the same plain WireGuard client in every case"
                        .to_owned(),
                ),
            }
        }
    }
}

fn missing(name: &str, why: &str) -> Candidate {
    Candidate {
        implementation: Implementation::peer(name, "none"),
        program: Err(why.to_owned()),
    }
}
