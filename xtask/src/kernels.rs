//! `cargo xtask kernels`: the tests that boot other kernels in QEMU, and those kernels: Debian's own
//! for virtual machines, from the archive that apt knows here, verified by apt.
//!
//! `target/kernels/<release>/` holds `version`, `vmlinuz` and `lib/modules/`, which is what the
//! lab's guests take (`tests/src/vm/`). The systems that some of them run are `system.rs`'s.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, anyhow, bail};

use crate::{build, machine, package, run, setup, system, test};

/// What the names of these tests begin with.
pub(crate) const TESTS: &str = "kernels::";

/// The kernels, by Debian's release and the suite whose package lists name its newest: 5.10, 6.1,
/// 6.12, and whatever the next release has by now. The lists of the security suites are short.
const SUITES: [(&str, &str); 4] = [
    ("bullseye", "bullseye-security"),
    ("bookworm", "bookworm-security"),
    ("trixie", "trixie-security"),
    ("forky", "forky"),
];

/// All releases.
pub(crate) const ALL: [&str; 4] = [SUITES[0].0, SUITES[1].0, SUITES[2].0, SUITES[3].0];

/// The keys of Debian's archives, on Debian.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The package that depends on the newest kernel.
const NEWEST: &str = "linux-image-cloud-amd64";

/// The modules that guests may need, by folder, and whether with the folders in it; the rest is
/// drivers of hardware that guests have not.
const MODULES: [(&str, bool); 7] = [
    ("kernel/net", true),
    ("kernel/lib", true),
    ("kernel/crypto", true),
    ("kernel/arch", true),
    ("kernel/drivers/virtio", true),
    ("kernel/drivers/net/wireguard", true),
    ("kernel/drivers/net", false),
];

/// Options of `kernels`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the kernel of this release of Debian.
    #[arg(value_parser = ALL)]
    release: Option<String>,
    /// Run these tests inside the guest, by a part of their names, instead of the usual ones.
    #[arg(
        long,
        value_name = "FILTER",
        requires = "release",
        allow_hyphen_values = true
    )]
    inside: Option<String>,
    /// Only bring the kernels.
    #[arg(long)]
    fetch: bool,
    /// Look for newer packages of kernels that are here already.
    #[arg(long)]
    update: bool,
}

/// Runs the task.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let one = args.release.as_deref();
    if !args.fetch {
        machine::need_root("kernels")?;
    }
    setup::ensure(setup::KERNELS)?;
    let wanted: Vec<&str> = one.map_or_else(|| ALL.to_vec(), |release| vec![release]);
    fetch(&wanted, args.update)?;
    if args.fetch {
        return Ok(ExitCode::SUCCESS);
    }
    run(one, args.inside.as_deref(), false)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the tests, two guests at a time, without set-up; `thorough` and what it yields as of [`test::all`].
pub(crate) fn run(
    release: Option<&str>,
    inside: Option<&str>,
    thorough: bool,
) -> Result<Vec<String>> {
    let programs = build::lab(&["sluice"])?;
    let packages = package::for_tests()?;
    let mut tests = run::cargo();
    tests
        .args(["test", "--workspace"])
        .env("SLUICE_BIN", programs.join("sluice"))
        .env("SLUICE_KERNELS", folder())
        .env("SLUICE_PACKAGES", packages);
    if let Some(inside) = inside {
        tests.env("SLUICE_INSIDE", inside);
    }
    let mut filters = vec![format!("{TESTS}{}", release.unwrap_or_default())];
    if let (Some(release), None) = (release, inside) {
        filters
            .extend(["beside", "package", "systemd"].map(|of| format!("{TESTS}{of}::{release}")));
    }
    test::by_twos(&tests, &filters, thorough)
}

/// Brings the kernels of these releases. One that cannot be had is told and left out; it is an error
/// only if there is none.
pub(crate) fn fetch(releases: &[&str], update: bool) -> Result<()> {
    if env::consts::ARCH != "x86_64" {
        bail!("guests are x86-64 and run programs of this machine, which is not");
    }
    let here = |release: &str| fs::read_to_string(folder().join(release).join("version"));
    let wanted: Vec<_> = SUITES
        .iter()
        .filter(|(release, _)| releases.contains(release))
        .filter(|(release, _)| update || here(release).is_err())
        .collect();
    if !wanted.is_empty() {
        match Archive::open() {
            Ok(archive) => {
                for (release, suite) in wanted {
                    if let Err(error) = archive.bring(release, suite) {
                        println!("kernels: WITHOUT the kernel of {release}: {error:#}");
                    }
                }
            }
            Err(error) => println!("kernels: nothing can be fetched: {error:#}"),
        }
    }
    let mut found = 0;
    for release in releases {
        if let Ok(version) = here(release) {
            println!("kernels: {release} has {version}");
            found += 1;
        }
    }
    if found == 0 {
        bail!("no kernel of {} is here", releases.join(", "));
    }
    system::make(releases, update)
}

pub(crate) fn folder() -> PathBuf {
    run::repository().join("target/kernels")
}

/// Debian's archive, through an apt with lists and a cache of its own: the machine's stay as they
/// are.
struct Archive {
    apt: PathBuf,
}

impl Archive {
    /// Fetches the package lists of all suites.
    fn open() -> Result<Self> {
        let archive = Self {
            apt: folder().join("apt"),
        };
        for part in ["lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(archive.apt.join(part)).context("target/kernels/apt")?;
        }
        let write = |name: &str, text: &str| {
            fs::write(archive.apt.join(name), text).with_context(|| format!("apt's {name}"))
        };
        write("status", "")?;
        write("sources.list", &sources(&known_archives()?)?)?;
        write("apt.conf", &archive.configuration())?;
        // An index that cannot be had is a warning for apt, and a missing kernel here.
        run::long(
            "package lists of Debian's kernels",
            archive.command("apt-get").arg("update"),
        )?;
        Ok(archive)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = run::command(program);
        command.env("APT_CONFIG", self.apt.join("apt.conf"));
        command
    }

    /// The rest of the configuration, such as proxies, is the machine's.
    fn configuration(&self) -> String {
        let at = |name: &str| self.apt.join(name).display().to_string();
        let none = || "/dev/null".to_owned();
        [
            ("Dir::State::Lists", at("lists")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache", at("cache")),
            ("Dir::Etc::SourceList", at("sources.list")),
            ("Dir::Etc::SourceParts", none()),
            ("Dir::Etc::Preferences", none()),
            ("Dir::Etc::PreferencesParts", none()),
            ("Acquire::Languages", "none".to_owned()),
            (
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
                "false".to_owned(),
            ),
            // apt's own user could not write to this folder.
            ("APT::Sandbox::User", String::new()),
        ]
        .map(|(key, value)| format!("{key} \"{value}\";\n"))
        .concat()
    }

    /// Downloads the newest kernel of a suite and lays it out for the lab.
    fn bring(&self, release: &str, suite: &str) -> Result<()> {
        let version = self.newest(suite)?;
        let packages = self.packages(&version)?;
        println!("kernels: {release}: {version}");
        let debs = self.apt.join("packages");
        let mut get = self.command("apt-get");
        get.arg("download").current_dir(&debs);
        get.args(packages.iter().map(|name| format!("{name}={version}")));
        run::long("kernel", &mut get)?;
        let unpacked = self.apt.join("unpacked");
        gone(fs::remove_dir_all(&unpacked))?;
        for package in &packages {
            let deb = deb(&debs, package)?;
            run::read(run::command("dpkg-deb").arg("-x").args([&deb, &unpacked]))?;
            fs::remove_file(&deb).with_context(|| deb.display().to_string())?;
        }
        // In one step at the end, so that a half-made folder is never taken for a kernel.
        let (draft, place) = (self.apt.join(release), folder().join(release));
        gone(fs::remove_dir_all(&draft))?;
        lay_out(&unpacked, &draft)?;
        gone(fs::remove_dir_all(&place))?;
        fs::rename(&draft, &place).with_context(|| place.display().to_string())?;
        gone(fs::remove_dir_all(&unpacked))
    }

    /// The version of the newest kernel of a suite.
    fn newest(&self, suite: &str) -> Result<String> {
        // Lines of `package | version | archive suite/component architecture Packages`.
        let table = run::read(self.command("apt-cache").args(["madison", NEWEST]))?;
        table
            .lines()
            .find(|line| line.contains(&format!(" {suite}/main ")))
            .and_then(|line| line.split('|').nth(1))
            .map(|version| version.trim().to_owned())
            .with_context(|| format!("the package lists of {suite} name no {NEWEST}"))
    }

    /// The packages that together are this kernel: one, or from Debian 14 on an empty one that
    /// depends on others.
    fn packages(&self, version: &str) -> Result<BTreeSet<String>> {
        let mut packages = BTreeSet::new();
        let mut open = vec![NEWEST.to_owned()];
        while let Some(package) = open.pop() {
            let words = ["show", &format!("{package}={version}")];
            let record = run::read(self.command("apt-cache").args(words))?;
            for name in parts(&record) {
                if packages.insert(name.to_owned()) {
                    open.push(name.to_owned());
                }
            }
        }
        if packages.is_empty() {
            bail!("{NEWEST} {version} depends on no kernel");
        }
        Ok(packages)
    }
}

/// The kernel packages that a package's record depends on.
fn parts(record: &str) -> impl Iterator<Item = &str> {
    record
        .lines()
        .filter_map(|line| line.strip_prefix("Depends: "))
        .flat_map(|list| list.split(','))
        .filter_map(|item| item.split_whitespace().next())
        .filter(|name| {
            ["linux-image-", "linux-binary-", "linux-modules-"]
                .iter()
                .any(|kind| name.starts_with(kind))
        })
}

/// Debian's archives in apt's configuration here: address and suite.
fn known_archives() -> Result<Vec<(String, String)>> {
    let format = "$(ORIGIN) $(REPO_URI) $(CODENAME)";
    let table = run::read(run::command("apt-get").args(["indextargets", "--format", format]))?;
    Ok(table
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (origin, address, suite) = (words.next()?, words.next()?, words.next()?);
            (origin == "Debian").then(|| (address.to_owned(), suite.to_owned()))
        })
        .collect())
}

/// apt's sources for all suites: the archives that are known here have the other releases too.
fn sources(known: &[(String, String)]) -> Result<String> {
    let mut text = String::new();
    for (release, suite) in SUITES {
        let is_security = release != suite;
        let address = known
            .iter()
            .find(|(_, suite)| suite.ends_with("-security") == is_security)
            .map(|(address, _)| address);
        if let Some(address) = address {
            text += &source(address, suite);
        }
    }
    if text.is_empty() {
        bail!("apt knows no archive of Debian here, or has never fetched its lists");
    }
    Ok(text)
}

fn source(address: &str, suite: &str) -> String {
    format!("deb [arch=amd64 signed-by={KEYS}] {address} {suite} main\n")
}

/// apt's source for the whole of a release.
pub(crate) fn whole(release: &str) -> Result<String> {
    let known = known_archives()?;
    let mut main = known.iter().filter(|(_, suite)| !suite.contains('-'));
    let (address, _) = main.next().context("apt knows no archive of Debian here")?;
    Ok(source(address, release))
}

/// apt's sources of a system that is kept up to date: the release with its updates, for any processor.
pub(crate) fn archives(release: &str) -> Result<String> {
    let known = known_archives()?;
    let address = |is_security: bool| {
        let mut found = known
            .iter()
            .filter(|(_, suite)| suite.ends_with("-security") == is_security);
        found.next().map(|(address, _)| address)
    };
    let main = address(false).context("apt knows no archive of Debian here")?;
    let mut text = String::new();
    for (address, suite) in [
        (Some(main), release.to_owned()),
        (Some(main), format!("{release}-updates")),
        (address(true), format!("{release}-security")),
    ] {
        if let Some(address) = address {
            text += &format!("deb [signed-by={KEYS}] {address} {suite} main\n");
        }
    }
    Ok(text)
}

/// The downloaded file of a package.
fn deb(folder: &Path, package: &str) -> Result<PathBuf> {
    let prefix = format!("{package}_");
    entries(folder)?
        .into_iter()
        .find(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with(&prefix))
        })
        .with_context(|| format!("apt left no file of {package}"))
}

/// Makes a folder with the kernel, its modules with their index, and its version, of what the
/// packages hold.
fn lay_out(unpacked: &Path, target: &Path) -> Result<()> {
    // Debian 13 moved them.
    let modules = ["usr/lib/modules", "lib/modules"].map(|path| unpacked.join(path));
    let modules = modules
        .iter()
        .find(|path| path.exists())
        .context("no modules")?;
    let [modules]: [PathBuf; 1] = entries(modules)?
        .try_into()
        .map_err(|several| anyhow!("not one set of modules: {several:?}"))?;
    let version = name(&modules)?;
    let kernels = [
        unpacked.join(format!("boot/vmlinuz-{version}")),
        modules.join("vmlinuz"),
    ];
    let kernel = kernels
        .iter()
        .find(|file| file.exists())
        .context("no vmlinuz")?;

    let kept = target.join("lib/modules").join(version);
    for (folder, deep) in MODULES {
        let source = modules.join(folder);
        if source.exists() {
            copy(&source, &kept.join(folder), deep)?;
        }
    }
    // Modules are compressed from Debian 13 on, and not every kernel unpacks them itself.
    let packed: Vec<PathBuf> = files(&kept)?
        .into_iter()
        .filter(|file| file.extension().is_some_and(|end| end == "xz"))
        .collect();
    if !packed.is_empty() {
        run::read(run::command("busybox").arg("unxz").args(&packed))?;
    }
    let mut index = run::command("busybox");
    run::read(index.args(["depmod", "-b"]).arg(target).arg(version))?;
    fs::copy(kernel, target.join("vmlinuz")).context("vmlinuz")?;
    fs::write(target.join("version"), version).context("version")
}

/// Copies the files of a folder and, if `deep`, of those in it.
fn copy(from: &Path, to: &Path, deep: bool) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for entry in entries(from)? {
        let target = to.join(name(&entry)?);
        if !entry.is_dir() {
            fs::copy(&entry, &target).with_context(|| entry.display().to_string())?;
        } else if deep {
            copy(&entry, &target, true)?;
        }
    }
    Ok(())
}

/// All files below a folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in entries(folder)? {
        if entry.is_dir() {
            found.extend(files(&entry)?);
        } else {
            found.push(entry);
        }
    }
    Ok(found)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .with_context(|| folder.display().to_string())
}

fn name(path: &Path) -> Result<&str> {
    path.file_name()
        .and_then(|name| name.to_str())
        .with_context(|| format!("odd name {}", path.display()))
}

pub(crate) fn gone(result: std::io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_found_in_its_packages_records() {
        let record = "Package: linux-image-7.2.12+deb14-cloud-amd64\n\
                      Version: 7.2.12-1\n\
                      Depends: dracut | linux-initramfs-tool, linux-base-7.2 (= 7.2.12-1), \
                      linux-binary-7.2 (= 7.2.12-1), linux-modules-7.2 (= 7.2.12-1)\n";
        let found: Vec<&str> = parts(record).collect();
        assert_eq!(found, ["linux-binary-7.2", "linux-modules-7.2"]);
    }

    #[test]
    fn archives_that_are_known_have_the_other_releases_too() {
        let known = |address: &str, suite: &str| (address.to_owned(), suite.to_owned());
        let main = known("http://main.test/debian/", "bookworm");
        let security = known("http://sec.test/debian/", "bookworm-security");
        let both = sources(&[main.clone(), security]).unwrap();
        assert!(both.contains(" http://sec.test/debian/ trixie-security main\n"));
        assert!(both.contains(" http://main.test/debian/ forky main\n"));
        assert_eq!(both.lines().count(), 4);
        assert_eq!(sources(&[main]).unwrap().lines().count(), 1);
        assert!(sources(&[]).is_err());
    }
}
