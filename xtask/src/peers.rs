//! `cargo xtask setup --peers`: brings the routers that the benchmark compares Sluice with.
//!
//! Everything lands under `target/peers`; the system is left as it is. wireguard-go comes from the
//! distribution's own mirror, of this release and the newest there is, each in a folder named by
//! its package version; boringtun-cli and gotatun come from crates.io.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

/// Crates that hold a router, with the binary each installs.
const CRATES: [(&str, &str); 2] = [
    ("boringtun-cli", "boringtun-cli"),
    ("gotatun-cli", "gotatun"),
];

/// Brings what is missing and says what it did; quick when nothing is. A peer that cannot be had
/// is an error at the end, after the others have been brought.
pub(crate) fn run() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../target/peers")
        .components()
        .collect::<PathBuf>();
    fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
    let root = root.canonicalize()?;

    let mut missing = Vec::new();
    if let Err(error) = wireguard_go(&root.join("wireguard-go")) {
        missing.push(format!("wireguard-go: {error:#}"));
    }
    for (name, binary) in CRATES {
        if let Err(error) = from_crates_io(&root, name, binary) {
            missing.push(format!("{name}: {error:#}"));
        }
    }
    if !missing.is_empty() {
        bail!(
            "the benchmark will skip what is missing:\n  {}",
            missing.join("\n  ")
        );
    }
    Ok(())
}

fn from_crates_io(root: &Path, name: &str, binary: &str) -> anyhow::Result<()> {
    let path = root.join("bin").join(binary);
    if path.exists() {
        println!("{name}: present ({})", path.display());
        return Ok(());
    }
    println!("{name}: installing from crates.io (takes a minute or two)");
    run_command(
        Command::new("cargo")
            .args(["install", name, "--locked", "--quiet", "--root"])
            .arg(root)
            // The workspace's toolchain pin holds; its flags and target folder must not leak in.
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("RUSTFLAGS"),
    )?;
    Ok(())
}

/// Unpacks wireguard-go of this release and the newest one into `root/<version>/`.
fn wireguard_go(root: &Path) -> anyhow::Result<()> {
    let present = versions_in(root);
    if present.len() >= 2 {
        println!(
            "wireguard-go: present ({}); remove {} to look for newer ones",
            present.join(", "),
            root.display()
        );
        return Ok(());
    }
    let mirror = Mirror::of_this_system()?;
    let scratch = root.join(".apt");
    let apt = PrivateApt::create(&scratch, &mirror)?;
    println!(
        "wireguard-go: reading the package lists of {}",
        mirror.suites.join(", ")
    );
    apt.run("apt-get", &["update", "-q"])?;
    for version in mirror.wanted(&apt.run("apt-cache", &["madison", "wireguard-go"])?)? {
        let folder = root.join(&version);
        if folder.join("usr/bin/wireguard-go").exists() {
            continue;
        }
        println!("wireguard-go: unpacking {version}");
        apt.run(
            "apt-get",
            &["download", "-q", &format!("wireguard-go={version}")],
        )?;
        apt.unpack(&folder)?;
    }
    fs::remove_dir_all(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
    Ok(())
}

fn versions_in(root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root) else {
        return Vec::new();
    };
    let mut found: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().join("usr/bin/wireguard-go").exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    found.sort();
    found
}

/// The archive this system installs from, and the suites of it that matter here.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    /// This release first, then where newer packages are.
    suites: Vec<String>,
    components: &'static str,
    keyring: &'static str,
}

impl Mirror {
    fn of_this_system() -> anyhow::Result<Self> {
        let targets = run_command(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)",
            "Created-By: Packages",
        ]))
        .context("this needs a Debian or Ubuntu system with apt-get")?;
        Self::from_targets(&targets)
    }

    fn from_targets(targets: &str) -> anyhow::Result<Self> {
        for line in targets.lines() {
            let mut fields = line.split('|');
            let (Some(origin), Some(codename), Some("main"), Some(uri)) =
                (fields.next(), fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            // `bookworm-updates`, `noble-security` and their like do not carry every package.
            if codename.contains('-') {
                continue;
            }
            let (newer, components, keyring): (&[&str], _, _) = match origin {
                "Debian" => (
                    &["testing", "unstable"],
                    "main",
                    "/usr/share/keyrings/debian-archive-keyring.gpg",
                ),
                "Ubuntu" => (
                    &["devel"],
                    "main universe",
                    "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
                ),
                _ => continue,
            };
            let suites = std::iter::once(codename)
                .chain(newer.iter().copied())
                .map(str::to_owned)
                .collect();
            return Ok(Self {
                uri: uri.to_owned(),
                suites,
                components,
                keyring,
            });
        }
        bail!("no Debian or Ubuntu release in apt's sources; run `apt-get update` and try again")
    }

    /// From `apt-cache madison`: this release's version and the newest, without repeats. A release
    /// that does not carry the package leaves the newest alone.
    fn wanted(&self, madison: &str) -> anyhow::Result<Vec<String>> {
        let lines: Vec<(&str, &str)> = madison
            .lines()
            .filter_map(|line| {
                let mut fields = line.split('|').map(str::trim);
                Some((fields.nth(1)?, fields.next()?))
            })
            .collect();
        let Some(&(newest, _)) = lines.first() else {
            bail!("no suite of {} carries wireguard-go", self.uri);
        };
        let mut wanted = vec![newest.to_owned()];
        let marker = format!(" {}/", self.suites[0]);
        let release = lines.iter().find(|(_, origin)| origin.contains(&marker));
        if let Some(&(version, _)) = release.filter(|(version, _)| *version != newest) {
            wanted.push(version.to_owned());
        }
        Ok(wanted)
    }
}

/// An apt of its own: own lists, cache and sources, the distribution's key, the system untouched.
struct PrivateApt {
    root: PathBuf,
}

impl PrivateApt {
    fn create(root: &Path, mirror: &Mirror) -> anyhow::Result<Self> {
        if root.exists() {
            fs::remove_dir_all(root).with_context(|| format!("remove {}", root.display()))?;
        }
        for folder in [
            "state/lists/partial",
            "cache/archives/partial",
            "parts",
            "debs",
        ] {
            let path = root.join(folder);
            fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        fs::write(root.join("state/status"), "")?;
        fs::write(
            root.join("peers.sources"),
            format!(
                "Types: deb\nURIs: {}\nSuites: {}\nComponents: {}\nTargets: Packages\nSigned-By: {}\n",
                mirror.uri,
                mirror.suites.join(" "),
                mirror.components,
                mirror.keyring
            ),
        )?;
        let shown = root.display();
        fs::write(
            root.join("apt.conf"),
            format!(
                "Dir::State \"{shown}/state\";\n\
                 Dir::State::status \"{shown}/state/status\";\n\
                 Dir::Cache \"{shown}/cache\";\n\
                 Dir::Etc::sourcelist \"{shown}/peers.sources\";\n\
                 Dir::Etc::sourceparts \"{shown}/parts\";\n\
                 Dir::Etc::preferencesparts \"{shown}/parts\";\n\
                 Acquire::Languages \"none\";\n\
                 APT::Sandbox::User \"root\";\n"
            ),
        )?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    fn run(&self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        run_command(
            Command::new(program)
                .args(args)
                .env("APT_CONFIG", self.root.join("apt.conf"))
                .current_dir(self.root.join("debs")),
        )
    }

    /// Unpacks the one downloaded package into `folder` and removes the archive.
    fn unpack(&self, folder: &Path) -> anyhow::Result<()> {
        let deb = fs::read_dir(self.root.join("debs"))?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt-get downloaded nothing")?;
        run_command(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(folder))?;
        fs::remove_file(&deb)?;
        Ok(())
    }
}

fn run_command(command: &mut Command) -> anyhow::Result<String> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("run {shown}"))?;
    if !output.status.success() {
        bail!(
            "{shown}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn debian() -> Mirror {
        Mirror::from_targets(
            "Debian|bookworm-updates|main|http://mirror.example/debian/\n\
             Debian|bookworm|contrib|http://mirror.example/debian/\n\
             Debian|bookworm|main|http://mirror.example/debian/\n",
        )
        .unwrap()
    }

    #[test]
    fn the_release_suite_is_found_among_others() {
        let mirror = debian();
        assert_eq!(mirror.uri, "http://mirror.example/debian/");
        assert_eq!(mirror.suites, ["bookworm", "testing", "unstable"]);
        assert!(Mirror::from_targets("Elsewhere|one|main|http://mirror.example/\n").is_err());
    }

    #[test]
    fn newest_and_release_versions_are_wanted_once_each() {
        let lines = "wireguard-go | 2-1 | http://mirror.example/debian testing/main amd64 Packages\n\
                     wireguard-go | 2-1 | http://mirror.example/debian unstable/main amd64 Packages\n\
                     wireguard-go | 1-1 | http://mirror.example/debian bookworm/main amd64 Packages\n";
        assert_eq!(debian().wanted(lines).unwrap(), ["2-1", "1-1"]);
        let newest_only = lines.lines().next().unwrap();
        assert_eq!(debian().wanted(newest_only).unwrap(), ["2-1"]);
        assert!(debian().wanted("").is_err());
    }
}
