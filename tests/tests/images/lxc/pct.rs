//! `deploy/lxc/sluice-pct` on a host whose `pct` is a double, which takes what Proxmox's takes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use lab::{Cmd, Output};

const TREE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

struct Node {
    folder: tempfile::TempDir,
    template: PathBuf,
}

impl Node {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let template = folder.path().join("sluice-gateway_0.1.0-1_amd64.tar.zst");
        fs::write(&template, "")?;
        Ok(Self { folder, template })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `sluice-pct create` with these words besides the template.
    fn create(&self, words: &[&str]) -> Result<Output> {
        let doubles = Path::new(TREE).join("tests/fixtures/pct");
        Cmd::new([Path::new(TREE).join("deploy/lxc/sluice-pct")])
            .args(["create", "--template"])
            .arg(&self.template)
            .args(words)
            .env(
                "PATH",
                format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", doubles.display()),
            )
            .env("PCT_FOLDER", self.folder.path())
            .output()
    }

    /// What `pct` was called with.
    fn calls(&self) -> Result<Vec<Vec<String>>> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let calls = text.split("\n\n").filter(|call| !call.is_empty());
        Ok(calls
            .map(|call| call.lines().map(str::to_owned).collect())
            .collect())
    }

    fn made(&self) -> Result<Vec<String>> {
        let calls = self.calls()?;
        let create = calls.into_iter().find(|call| call[0] == "create");
        create.context("nothing was made")
    }
}

fn value<'a>(call: &'a [String], option: &str) -> &'a str {
    let at = call.iter().position(|word| word == option);
    at.and_then(|at| call.get(at + 1))
        .map_or("", String::as_str)
}

/// A test that a user without root may run, but for what the script itself asks for.
fn test(body: impl FnOnce(&Node) -> Result<()>) {
    lab::test(|_| body(&Node::new()?));
}

#[test]
fn a_container_is_made_by_commands_that_pct_takes() {
    test(|node| {
        let said = node.create(&[])?;
        ensure!(said.status.success(), "{}{}", said.stdout, said.stderr);
        let made = node.made()?;
        ensure!(
            made[1] == "101" && made[2] == node.template.display().to_string(),
            "{made:?}"
        );
        ensure!(value(&made, "--unprivileged") == "1", "{made:?}");
        ensure!(value(&made, "--features") == "nesting=1", "{made:?}");
        ensure!(
            value(&made, "--net0") == "name=eth0,bridge=vmbr0,ip=dhcp",
            "{made:?}"
        );
        let calls = node.calls()?;
        let words: Vec<&str> = calls.iter().map(|call| call[0].as_str()).collect();
        ensure!(
            words == ["create", "set", "start", "exec", "exec"],
            "{words:?}"
        );
        ensure!(
            calls[1] == ["set", "101", "-dev0", "/dev/net/tun"],
            "{:?}",
            calls[1]
        );
        // It says what it does.
        for call in &calls {
            ensure!(
                said.stdout.contains(&format!("+ pct {} 101", call[0])),
                "{}",
                said.stdout
            );
        }
        ensure!(
            said.stdout.contains("nothing else is missing"),
            "{}",
            said.stdout
        );
        Ok(())
    });
}

#[test]
fn every_option_reaches_pct() {
    test(|node| {
        let said = node.create(&[
            "--vmid",
            "250",
            "--hostname",
            "gw-1",
            "--privileged",
            "--storage",
            "tank",
            "--disk",
            "4",
            "--memory",
            "256",
            "--cores",
            "1",
            "--bridge",
            "vmbr1",
            "--vlan",
            "12",
            "--ip",
            "192.168.1.5/24",
            "--gw",
            "192.168.1.1",
            "--ip6",
            "2001:db8::5/64",
            "--gw6",
            "fe80::1",
            "--no-start",
        ])?;
        ensure!(said.status.success(), "{}{}", said.stdout, said.stderr);
        let made = node.made()?;
        let net = "name=eth0,bridge=vmbr1,ip=192.168.1.5/24,gw=192.168.1.1,ip6=2001:db8::5/64,gw6=fe80::1,tag=12";
        for (option, wanted) in [
            ("create", "250"),
            ("--hostname", "gw-1"),
            ("--unprivileged", "0"),
            ("--features", "nesting=1,mount=bpf"),
            ("--rootfs", "tank:4"),
            ("--memory", "256"),
            ("--cores", "1"),
            ("--net0", net),
        ] {
            ensure!(value(&made, option) == wanted, "{option}: {made:?}");
        }
        ensure!(node.calls()?.len() == 2, "{:?}", node.calls()?);
        ensure!(
            said.stdout
                .contains("root in the container is root of this host")
        );
        Ok(())
    });
}

#[test]
fn a_container_gets_its_configuration() {
    test(|node| {
        let key = node.path("key");
        fs::write(&key, "tskey-auth-secret\n")?;
        let said = node.create(&[
            "--auth-key-file",
            &key.display().to_string(),
            "--routes",
            "10.0.0.0/16,2001:db8::/56",
            "--login-server",
            "https://control.example.com",
        ])?;
        ensure!(said.status.success(), "{}{}", said.stdout, said.stderr);
        let file = |name: &str| fs::read_to_string(node.path("101.files").join(name));
        ensure!(file("auth.key")? == "tskey-auth-secret\n");
        let toml = file("sluice.toml")?;
        let wanted = "[tailnet]\ncontrol_url = \"https://control.example.com\"\n\
            auth_key = \"file:/etc/sluice/auth.key\"\n\
            advertise_routes = [\"10.0.0.0/16\", \"2001:db8::/56\"]\n";
        ensure!(toml == wanted, "{toml}");
        for name in ["auth.key.perms", "sluice.toml.perms"] {
            ensure!(file(name)?.trim() == "0600");
        }
        let calls = node.calls()?.concat().join(" ");
        ensure!(
            calls.contains("exec 101 -- systemctl restart sluice"),
            "{calls}"
        );
        for text in [&said.stdout, &said.stderr, &calls] {
            ensure!(
                !text.contains("tskey-auth-secret"),
                "the key is told: {text}"
            );
        }
        // The router takes what was written.
        let (taken, key) = (node.path("taken.toml"), node.path("auth.key"));
        fs::write(&key, "tskey-auth-secret\n")?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        fs::write(
            &taken,
            toml.replace("/etc/sluice/auth.key", &key.display().to_string()),
        )?;
        let sluice = lab::sluice::binary()?;
        let checked = Cmd::new([sluice])
            .arg("check-config")
            .arg(&taken)
            .output()?;
        ensure!(checked.status.success(), "{}", checked.stderr);
        Ok(())
    });
}

#[test]
fn a_dry_run_changes_nothing() {
    test(|node| {
        let said = node.create(&["--dry-run", "--privileged"])?;
        ensure!(said.status.success(), "{}", said.stderr);
        ensure!(node.calls()?.is_empty());
        for command in [
            "pct create 101",
            "pct set 101 -dev0 /dev/net/tun",
            "pct start 101",
        ] {
            ensure!(
                said.stdout.contains(&format!("+ {command}")),
                "{}",
                said.stdout
            );
        }
        Ok(())
    });
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_made() {
    test(|node| {
        let config = node.path("sluice.toml");
        fs::write(&config, "")?;
        let config = config.display().to_string();
        for (words, says) in [
            (&["--vmid", "7"][..], "--vmid 7"),
            (&["--ip", "192.168.1.5"], "--ip 192.168.1.5"),
            (&["--gw", "192.168.1.1"], "say --ip too"),
            (&["--hostname", "a,ip=dhcp"], "--hostname"),
            (&["--routes", "10.0.0.0/16"], "say --auth-key-file too"),
            (&["--config", &config, "--no-start"], "leave --no-start out"),
            (&["--config", "/no/such/file"], "cannot be read"),
            (&["--colour", "red"], "--colour is no option"),
            (&["--memory"], "needs a value"),
        ] {
            let said = node.create(words)?;
            ensure!(!said.status.success(), "{words:?} was taken");
            ensure!(said.stderr.contains(says), "{words:?}: {}", said.stderr);
            ensure!(node.calls()?.is_empty(), "{words:?}: {:?}", node.calls()?);
        }
        Ok(())
    });
}

#[test]
fn who_stops_half_way_is_told_what_is_there() {
    test(|node| {
        // Another container has started meanwhile under this number.
        fs::write(node.path("300.running"), "")?;
        let said = node.create(&["--vmid", "300"])?;
        ensure!(!said.status.success());
        ensure!(said.stderr.contains("pct destroy 300"), "{}", said.stderr);
        Ok(())
    });
}

#[test]
fn the_scripts_are_sound() {
    if lab::requirements::find("shellcheck").is_none() {
        eprintln!("skipped: shellcheck is not installed; `cargo xtask image test lxc` brings it");
        return;
    }
    let check = Cmd::new(["shellcheck", "--shell=sh"]);
    let files =
        ["deploy/lxc/sluice-pct", "packaging/lxc/login.sh"].map(|file| Path::new(TREE).join(file));
    let output = check.args(files).output().unwrap();
    assert!(output.status.success(), "{}", output.stdout);
}
