//! Tailscale's own programs, which tests and demo run beside Sluice: tailscaled, tailscale, derper, and a program
//! around Tailscale's coordination server for tests.
//!
//! Built from the module proxy where there is a Go, and kept under `target/peers`; the system is left as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// The release. `tests/src/tailscaled.rs` looks for the same.
pub(crate) const VERSION: &str = "1.102.5";

/// Where `tests/src/tailscaled.rs` looks for what is built, below `target`.
const FOLDER: &str = "peers/tailscale";

/// The programs, by the package that each is built from.
const PROGRAMS: [(&str, &str); 4] = [
    ("tailscaled", "tailscale.com/cmd/tailscaled"),
    ("tailscale", "tailscale.com/cmd/tailscale"),
    ("derper", "tailscale.com/cmd/derper"),
    ("testcontrol", "."),
];

/// What is left out of tailscaled: clouds, desktops, file sharing, log upload, and what would change the name
/// resolution or the firewall of the machine that runs the tests. All of what moves packets is in.
const LEFT_OUT: &[&str] = &[
    "ace",
    "acme",
    "appconnectors",
    "aws",
    "bakedroots",
    "bird",
    "captiveportal",
    "capture",
    "clientupdate",
    "cloud",
    "colorable",
    "completion",
    "completion_scripts",
    "conn25",
    "dbus",
    "debugportmapper",
    "desktop_sessions",
    "dns",
    "doctor",
    "drive",
    "flashappliance",
    "hujsonconf",
    "identityfederation",
    "iptables",
    "kube",
    "linuxdnsfight",
    "logtail",
    "netlog",
    "networkmanager",
    "oauthkey",
    "portlist",
    "portmapper",
    "posture",
    "qrcodes",
    "remoteconfig",
    "resolved",
    "sdnotify",
    "serve",
    "serviceclientprefs",
    "ssh",
    "syslog",
    "synology",
    "syspolicy",
    "systray",
    "taildrop",
    "tap",
    "tpm",
    "wakeonlan",
    "webbrowser",
    "webclient",
];

/// Builds the programs, if they are not there; without Go it says so, and tests beside them skip themselves.
pub(crate) fn ensure() -> Result<()> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let folder = target.join(format!("{FOLDER}-{VERSION}"));
    if PROGRAMS.iter().all(|(name, _)| folder.join(name).exists()) {
        println!("tailscale {VERSION}: present");
        return Ok(());
    }
    let Some(go) = go() else {
        println!(
            "tailscale {VERSION}: skipped, there is no go; tests with real tailscaled will skip themselves"
        );
        return Ok(());
    };
    println!("tailscale {VERSION}: building tailscaled, tailscale and derper (takes some minutes)");
    let started = Instant::now();
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let folder = folder.canonicalize()?;
    let workshop = folder.join("build");
    build(&go, &folder, &workshop)?;
    // A gigabyte that only another build would need.
    fs::remove_dir_all(&workshop).with_context(|| format!("remove {}", workshop.display()))?;
    println!(
        "tailscale {VERSION}: built in {:.0} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

fn build(go: &Path, folder: &Path, workshop: &Path) -> Result<()> {
    let source = workshop.join("source");
    fs::create_dir_all(&source)?;
    let testcontrol = include_str!("../../tests/fixtures/tailnet/testcontrol/main.go");
    fs::write(source.join("main.go"), testcontrol)?;
    fs::write(source.join("go.mod"), "module peers\n\ngo 1.26\n")?;
    let run = |arguments: &[&str]| run_go(go, &source, workshop, arguments);
    run(&["get", &format!("tailscale.com@v{VERSION}")])?;
    let tags: Vec<String> = LEFT_OUT
        .iter()
        .map(|name| format!("ts_omit_{name}"))
        .collect();
    let tags = tags.join(",");
    for (name, package) in PROGRAMS {
        let unfinished = workshop.join(name);
        run(&[
            "build",
            "-trimpath",
            "-ldflags=-s -w",
            "-tags",
            &tags,
            "-o",
            &unfinished.to_string_lossy(),
            package,
        ])?;
        fs::rename(&unfinished, folder.join(name))?;
    }
    Ok(())
}

/// Runs `go` in `source`, with what it keeps for itself in `workshop`: nothing is left elsewhere, and nothing there that
/// `rm` cannot remove.
pub(crate) fn run_go(go: &Path, source: &Path, workshop: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new(go)
        .args(arguments)
        .current_dir(source)
        .env("CGO_ENABLED", "0")
        .env("GOPATH", workshop.join("path"))
        .env("GOCACHE", workshop.join("cache"))
        .env("GOFLAGS", "-mod=mod -modcacherw")
        .output()
        .with_context(|| format!("run {}", go.display()))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("go {}: {}", arguments.join(" "), words.trim());
    }
    Ok(())
}

/// Where Go is, if it is here.
pub(crate) fn go() -> Option<PathBuf> {
    let usual = PathBuf::from("/usr/local/go/bin/go");
    crate::run::which("go").or_else(|| usual.exists().then_some(usual))
}
