//! The Debian package.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Arch, Build, binary, gzip, notices, open_folders, text, write};
use crate::run;

/// Where the repository's unit has the binary, and where the package has it.
const BINARY: [&str; 2] = ["/usr/local/bin/sluice", "/usr/bin/sluice"];

/// The operator's manual.
const MANUAL: &[&str] = &[
    "README.md",
    "docs/install.md",
    "docs/configuration.md",
    "docs/operations.md",
    "docs/drain.md",
    "docs/packet-flow.md",
    "docs/beside-others.md",
    "docs/wireguard.md",
    "docs/tailnet.md",
    "docs/lxc.md",
    "docs/aws.md",
    "docs/aws-image.md",
];

/// Makes the package for a processor, and returns its file.
pub(crate) fn make(build: &Build, arch: Arch) -> Result<PathBuf> {
    let program = binary::build(build, arch)?;
    let root = build.empty(&format!("deb-{}", arch.name()))?;
    let at = |path: &str| root.join(path);
    let bytes = fs::read(&program).with_context(|| program.display().to_string())?;
    write(&at("usr/bin/sluice"), bytes, 0o755)?;
    write(&at("usr/lib/systemd/system/sluice.service"), unit()?, 0o644)?;
    let readme = text("packaging/debian/sluice.d.README")?;
    write(&at("etc/sluice/sluice.d/README"), readme, 0o644)?;
    let overrides = text("packaging/debian/lintian-overrides")?;
    write(&at("usr/share/lintian/overrides/sluice"), overrides, 0o644)?;
    documents(build, arch, &at("usr/share/doc/sluice"))?;
    command_line(build, &at("usr/share"))?;
    control(build, arch, &root)?;
    open_folders(&root)?;

    let name = format!("sluice_{}_{}.deb", build.version(), arch.name());
    let file = build.folder.join(name);
    // What is for tests alone is not worth the time.
    let packing = if build.debug {
        ["-Zgzip", "-z1"]
    } else {
        ["-Zxz", "-z6"]
    };
    let mut dpkg = run::command("dpkg-deb");
    dpkg.args(["--root-owner-group"])
        .args(packing)
        .arg("--build")
        .args([&root, &file])
        .env("SOURCE_DATE_EPOCH", build.time.to_string());
    run::read(&mut dpkg)?;
    Ok(file)
}

/// The unit, with the binary where the package has it.
fn unit() -> Result<String> {
    let unit = text("systemd/sluice.service")?;
    let [own, packaged] = BINARY;
    ensure!(unit.contains(own), "systemd/sluice.service runs no {own}");
    Ok(unit.replace(own, packaged))
}

fn documents(build: &Build, arch: Arch, folder: &Path) -> Result<()> {
    let indented = |text: &str| {
        let line = |line: &str| match line.trim() {
            "" => " .\n".to_owned(),
            line => format!(" {line}\n"),
        };
        text.lines().map(line).collect::<String>()
    };
    // The format names the licence, so its title is left out.
    let mit = text("LICENSE-MIT")?;
    let (_, mit) = mit.split_once("\n\n").context("LICENSE-MIT has no title")?;
    let (_, mit) = mit
        .split_once("\n\n")
        .context("LICENSE-MIT has no holder")?;
    let copyright = text("packaging/debian/copyright")?;
    let copyright = copyright.replace("@MIT@\n", &indented(mit));
    write(&folder.join("copyright"), copyright, 0o644)?;
    let changelog = text("packaging/debian/changelog")?
        .replace("@VERSION@", &build.version())
        .replace("@DATE@", &build.date("+%a, %d %b %Y %H:%M:%S +0000")?);
    for (name, contents) in [
        ("changelog.Debian", changelog),
        ("THIRD-PARTY", notices::text(arch)?),
    ] {
        let file = folder.join(name);
        write(&file, contents, 0o644)?;
        gzip(&file)?;
    }
    for path in MANUAL {
        let name = Path::new(path).file_name().context("no name")?;
        write(&folder.join(name), text(path)?, 0o644)?;
    }
    let example = folder.join("examples/sluice.toml");
    write(&example, text("docs/sluice.example.toml")?, 0o644)
}

/// Manual pages and completions.
fn command_line(build: &Build, share: &Path) -> Result<()> {
    let drafts = build.empty("manual")?;
    binary::manual(&drafts)?;
    for page in binary::files(&drafts.join("man"))? {
        let name = page.file_name().context("no name")?;
        let place = share.join("man/man1").join(name);
        let contents = fs::read(&page).with_context(|| page.display().to_string())?;
        write(&place, contents, 0o644)?;
        gzip(&place)?;
    }
    for (draft, place) in [
        ("sluice.bash", "bash-completion/completions/sluice"),
        ("_sluice", "zsh/vendor-completions/_sluice"),
        ("sluice.fish", "fish/vendor_completions.d/sluice.fish"),
    ] {
        let draft = drafts.join("completions").join(draft);
        let contents = fs::read(&draft).with_context(|| draft.display().to_string())?;
        write(&share.join(place), contents, 0o644)?;
    }
    Ok(())
}

/// What dpkg reads of the package: control file, conffiles, sums, maintainer scripts.
fn control(build: &Build, arch: Arch, root: &Path) -> Result<()> {
    let files = all(root)?;
    let mut size = 0;
    let (mut conffiles, mut names) = (String::new(), Vec::new());
    for file in &files {
        let name = file.strip_prefix(root).context("outside")?;
        size += file
            .metadata()
            .with_context(|| file.display().to_string())?
            .len();
        if name.starts_with("etc") {
            conffiles += &format!("/{}\n", name.display());
        }
        names.push(name);
    }
    let mut sums = run::command("md5sum");
    let sums = run::read(sums.current_dir(root).arg("--").args(&names))?;
    let control = text("packaging/debian/control")?
        .replace("@VERSION@", &build.version())
        .replace("@ARCHITECTURE@", arch.name())
        .replace("@SIZE@", &size.div_ceil(1024).to_string());
    let at = |name: &str| root.join("DEBIAN").join(name);
    write(&at("control"), control, 0o644)?;
    write(&at("conffiles"), conffiles, 0o644)?;
    write(&at("md5sums"), sums, 0o644)?;
    for name in ["postinst", "prerm", "postrm"] {
        write(&at(name), text(&format!("packaging/debian/{name}"))?, 0o755)?;
    }
    Ok(())
}

/// All files below a folder, in order.
fn all(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in binary::files(folder)? {
        if path.is_dir() {
            found.extend(all(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;

    use super::*;

    /// Upgrades a package whose daemon runs, in a folder instead of a system, where `file` has a configuration; whether
    /// the daemon is restarted.
    fn restarts(root: &Path, file: Option<(&str, &str)>) -> Result<bool> {
        let _ = fs::remove_dir_all(root);
        for folder in ["run/systemd/system", "etc/sluice", "bin"] {
            fs::create_dir_all(root.join(folder))?;
        }
        let says = root.join("restarted");
        for (name, script) in [
            ("systemctl", String::new()),
            ("deb-systemd-helper", String::new()),
            (
                "deb-systemd-invoke",
                format!("[ \"$1\" = restart ] && touch {}", says.display()),
            ),
            // `sluice check-config` of the default file, which must be there.
            (
                "sluice",
                format!("grep -q good {}/etc/sluice/sluice.toml", root.display()),
            ),
        ] {
            let at = root.join("bin").join(name);
            fs::write(&at, format!("#!/bin/sh\n{script}\n"))?;
            fs::set_permissions(&at, fs::Permissions::from_mode(0o755))?;
        }
        if let Some((name, text)) = file {
            let at = root.join(name);
            fs::create_dir_all(at.parent().context("a folder")?)?;
            fs::write(at, text)?;
        }
        let mut script = text("packaging/debian/postinst")?;
        for folder in ["/run/systemd", "/etc/sluice", "/usr/lib/sluice"] {
            // The sentences name them, too, which does no harm.
            script = script.replace(folder, &format!("{}{folder}", root.display()));
        }
        let path = format!("{}:/usr/bin:/bin", root.join("bin").display());
        let status = Command::new("sh")
            .args(["-c", &script, "postinst", "configure", "1"])
            .env("PATH", path)
            .status()?;
        ensure!(status.success(), "{status}");
        Ok(says.exists())
    }

    #[test]
    fn an_upgrade_restarts_a_daemon_that_takes_its_configuration() -> Result<()> {
        let root = std::env::temp_dir().join(format!("sluice-postinst-{}", std::process::id()));
        let file = "etc/sluice/sluice.toml";
        let restarts = |file| restarts(&root, file);
        ensure!(restarts(Some((file, "good")))?, "a file that is well");
        ensure!(!restarts(Some((file, "bad")))?, "a file that is not");
        let layer = "usr/lib/sluice/sluice.d/10.toml";
        ensure!(!restarts(Some((layer, "bad")))?, "a layer that is not");
        ensure!(restarts(None)?, "a container's environment");
        Ok(fs::remove_dir_all(&root)?)
    }
}
