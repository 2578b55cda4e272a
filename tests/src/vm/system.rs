//! Guests with a system of their own: a Debian with systemd, where the busybox of the others ends
//! when it has unpacked it.

use std::fs;
use std::path::{Path, PathBuf};

use super::image::{self, Image};
use super::{ANSWER, MEND, Machine, kernels};

/// Unpacks the system and hands over to it.
const INIT: &[u8] = include_bytes!("init-system");
/// Has systemd run what answers the lab.
const SERVICE: &[u8] = include_bytes!("lab.service");

/// A system to boot, as `cargo xtask kernels` has made it.
#[derive(Clone, Debug)]
pub struct System {
    archive: PathBuf,
}

impl System {
    /// The system of a release of Debian in the folder that `SLUICE_KERNELS` names; else the reason
    /// why it cannot be booted here.
    pub fn find(release: &str) -> Result<Self, String> {
        let archive = kernels()?.join(format!("systems/{release}.tar"));
        if !archive.exists() {
            return Err(format!(
                "there is no system of {release}; {MEND}, if Debian has it"
            ));
        }
        Ok(Self { archive })
    }
}

impl Machine {
    /// Fills the image of a guest that runs `system`. The machine's own libraries stay out of it:
    /// the programs take the system's, which must not be older.
    pub(super) fn add_system(
        &self,
        system: &System,
        image: &mut Image,
        scratch: &Path,
    ) -> anyhow::Result<()> {
        for folder in ["/proc", "/system"] {
            image.folder(Path::new(folder))?;
        }
        image.file(Path::new("/init"), 0o755, INIT)?;
        image.copy(&system.archive, Path::new("/system.tar"))?;
        let modules = self.kernel.folder.join("lib/modules");
        image.tree(&modules, &added("/usr/lib/modules"))?;
        image.file(&added("/lab/answer"), 0o755, ANSWER)?;
        image.file(&added("/lab/functions"), 0o644, b"")?;
        let units = added("/etc/systemd/system");
        image.file(&units.join("lab.service"), 0o644, SERVICE)?;
        let wanted = units.join("multi-user.target.wants/lab.service");
        image.link(&wanted, "../lab.service")?;
        for (file, path) in &self.files {
            image.copy(file, &added(path))?;
        }
        for (program, name) in &self.programs {
            let stripped = scratch.join(format!("{name}.stripped"));
            image::strip(program, &stripped)?;
            image.copy(&stripped, &added("/usr/local/bin").join(name))?;
            fs::remove_file(&stripped)?;
        }
        Ok(())
    }
}

/// Where what comes to `path` of the system waits for it.
fn added(path: &str) -> PathBuf {
    Path::new("/added").join(path.trim_start_matches('/'))
}
