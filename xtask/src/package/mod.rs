//! `cargo xtask package`: what people install. A Debian package and a container image, of static binaries
//! for both processors.
//!
//! The archives are made by dpkg-deb, GNU tar and gzip, which every machine has that builds Sluice: crates
//! that write them would be much to compile before any task starts. Two builds of one commit are equal byte
//! for byte: times are the commit's, owners are root, paths of this machine are left out of the binary.

mod binary;
pub(crate) mod deb;
mod notices;
mod oci;

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::{run, setup};

/// The version of all of Sluice.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Options of `package`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to make.
    #[arg(value_enum)]
    what: What,
    /// For this processor alone.
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Number of this packaging of the version.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    revision: u32,
    /// Not optimised: quick to build, for tests.
    #[arg(long)]
    debug: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// A Debian package for each processor.
    Deb,
    /// One container image for both, as a folder in OCI's layout and as one file.
    Oci,
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arch {
    /// x86-64.
    Amd64,
    /// AArch64.
    Arm64,
}

impl Arch {
    pub(crate) const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    /// This machine's.
    pub(crate) fn own() -> Self {
        match env::consts::ARCH {
            "aarch64" => Self::Arm64,
            _ => Self::Amd64,
        }
    }

    /// As Debian and OCI call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// As Rust and GNU call it.
    pub(crate) fn rust(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }
}

/// A package in the making.
pub(crate) struct Build {
    revision: u32,
    pub(crate) debug: bool,
    /// Seconds since 1970: the commit's.
    pub(crate) time: u64,
    /// Where it comes to.
    pub(crate) folder: PathBuf,
}

/// Runs the task.
pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    setup::ensure(setup::PACKAGES)?;
    let build = Build::new(args.revision, args.debug, folder())?;
    let arches = args.arch.map_or(Arch::ALL.to_vec(), |arch| vec![arch]);
    let made = match args.what {
        What::Deb => arches
            .into_iter()
            .map(|arch| deb::make(&build, arch))
            .collect::<Result<Vec<_>>>()?,
        What::Oci => oci::make(&build, &arches)?,
    };
    for path in made {
        println!("package: {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes what the tests install: two versions of this machine's package, and its image. Returns the
/// folder, in which they are `1.deb`, `2.deb` and `image.tar`.
pub(crate) fn for_tests() -> Result<PathBuf> {
    let folder = folder().join("tests");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut made = Vec::new();
    for revision in [1, 2] {
        let build = Build::new(revision, true, folder.clone())?;
        made.push((deb::make(&build, Arch::own())?, format!("{revision}.deb")));
        if revision == 1 {
            let image = oci::make(&build, &[Arch::own()])?
                .pop()
                .context("no image")?;
            made.push((image, "image.tar".to_owned()));
        }
    }
    for (from, name) in made {
        let to = folder.join(name);
        fs::rename(&from, &to).with_context(|| from.display().to_string())?;
    }
    Ok(folder)
}

/// What CI looks at: that both processors' packages can be made, that the image is the same when it is made
/// again, and what lintian says where it is installed.
pub(crate) fn check() -> Result<()> {
    let build = Build::new(1, true, folder().join("check"))?;
    for arch in Arch::ALL {
        let deb = deb::make(&build, arch)?;
        if run::which("lintian").is_some() {
            run::show(run::command("lintian").args(LINTIAN).arg(deb))?;
        }
    }
    let mut indices = Vec::new();
    for _ in 0..2 {
        let made = oci::make(&build, &Arch::ALL)?;
        let [layout, file] = &made[..] else {
            bail!("no image");
        };
        // As others read it: by name of nothing but the file, and for the other processor too.
        for arch in Arch::ALL {
            run::read(
                run::command("skopeo")
                    .args(["--override-arch", arch.name(), "inspect", "--config"])
                    .arg(format!("oci-archive:{}", file.display())),
            )?;
        }
        let index = layout.join("index.json");
        indices.push(fs::read_to_string(&index).with_context(|| index.display().to_string())?);
    }
    if indices.first() != indices.get(1) {
        bail!("two builds of the image differ: {}", indices.join("\n"));
    }
    Ok(())
}

/// Warnings count. Of what is quick to build the compression does not.
const LINTIAN: [&str; 3] = [
    "--fail-on=error,warning",
    "--tag-display-limit=0",
    "--allow-root",
];

pub(crate) fn folder() -> PathBuf {
    run::repository().join("target/packages")
}

impl Build {
    pub(crate) fn new(revision: u32, debug: bool, folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self {
            revision,
            debug,
            time: time()?,
            folder,
        })
    }

    /// The version of the package.
    pub(crate) fn version(&self) -> String {
        format!("{VERSION}-{}", self.revision)
    }

    /// The time as `date` writes it in this format.
    fn date(&self, format: &str) -> Result<String> {
        let mut date = run::command("date");
        date.args(["--utc", "-d", &format!("@{}", self.time)])
            .arg(format)
            .env("LC_ALL", "C");
        Ok(run::read(&mut date)?.trim().to_owned())
    }

    /// An empty folder to lay something out in.
    pub(crate) fn empty(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        crate::kernels::gone(fs::remove_dir_all(&folder))?;
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(folder)
    }
}

/// The time that everything in a package has: what `SOURCE_DATE_EPOCH` says, else the commit's.
fn time() -> Result<u64> {
    let text = match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => run::read(run::command("git").args(["log", "-1", "--format=%ct"])).context(
            "packages have the time of their commit; outside of a clone say one: \
             SOURCE_DATE_EPOCH=<seconds since 1970>",
        )?,
    };
    match text.trim().parse() {
        Ok(time) => Ok(time),
        Err(_) => bail!("SOURCE_DATE_EPOCH is {text:?}, not a number of seconds since 1970"),
    }
}

/// The text of a file of the repository.
pub(crate) fn text(path: &str) -> Result<String> {
    let file = run::repository().join(path);
    fs::read_to_string(&file).with_context(|| file.display().to_string())
}

/// Writes a file with its folders, world-readable and for root to write.
pub(crate) fn write(path: &Path, contents: impl AsRef<[u8]>, mode: u32) -> Result<()> {
    let context = || path.display().to_string();
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(context)?;
    }
    fs::write(path, contents).with_context(context)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(context)
}

/// Gives every folder below `root` its mode, whatever this user's umask.
pub(crate) fn open_folders(root: &Path) -> Result<()> {
    let context = || root.display().to_string();
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).with_context(context)?;
    for entry in fs::read_dir(root).with_context(context)? {
        let entry = entry.with_context(context)?;
        if entry.file_type().with_context(context)?.is_dir() {
            open_folders(&entry.path())?;
        }
    }
    Ok(())
}

/// Writes a tar archive of these members of `from`, in order, with one time and one owner.
fn tar(build: &Build, from: &Path, members: &[&str], to: &Path) -> Result<()> {
    let mut tar = run::command("tar");
    tar.args(["--create", "--format=ustar", "--sort=name"])
        .args(["--owner=0", "--group=0", "--numeric-owner"])
        .arg(format!("--mtime=@{}", build.time))
        .arg("--file")
        .arg(to)
        .arg("--directory")
        .arg(from)
        .args(members);
    run::read(&mut tar).map(drop)
}

/// Packs a file, without its name and time; the result has `.gz` behind its name.
fn gzip(file: &Path) -> Result<PathBuf> {
    run::read(run::command("gzip").args(["-9nf"]).arg(file))?;
    let mut name = file.as_os_str().to_owned();
    name.push(".gz");
    Ok(name.into())
}
