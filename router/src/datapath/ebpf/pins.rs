//! What outlives the daemon: maps and attachments, pinned in the BPF file system.
//!
//! `<bpffs>/sluice/<namespace>/<device>/abi-<version>/` holds the flow tables, the settings by which
//! the programs go, and the attachments to subnet-side NICs (those of tcx; clsact filters stay by
//! themselves). While no daemon is there, the programs of the last one go on and translate replies;
//! the TUN device to which they send them is gone, so the replies end there, instead of reaching the
//! kernel, which would tell their senders that there is no such connection. The next daemon takes
//! the tables over. What is left of a namespace that is gone (see [`owner`]) the next daemon of another
//! one removes.

mod owner;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData, MapInfo, MapType};
use router_ebpf::abi::{ABI_VERSION, FLOWS4, FLOWS6, Flow, Key4, Key6, SETTINGS, Settings};

use super::clsact;

/// Where the BPF file system is mounted on most machines.
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` of linux/magic.h.
const MAGIC: u32 = 0xcafe_4a11;
/// Our folder in it.
const FOLDER: &str = "sluice";
/// Names of pinned attachments begin so; the interface's index follows.
const LINK: &str = "from_subnet-";
/// The maps that go on.
const TABLES: [&str; 2] = [FLOWS4, FLOWS6];
/// `BPF_F_NO_PREALLOC` of linux/bpf.h, which all of them have.
const NO_PREALLOC: u32 = 1;

/// The folder of one device in the BPF file system.
#[derive(Debug)]
pub struct Pins {
    folder: PathBuf,
}

impl Pins {
    /// Makes the folder of `device` in this thread's network namespace, and mounts the file system
    /// if need be. What another version of the programs has pinned there is removed.
    pub fn open(device: &str) -> io::Result<Self> {
        mount()?;
        Self::open_in(Path::new(BPFFS), device)
    }

    /// As [`Pins::open`], in the BPF file system that is mounted at `root`.
    pub fn open_in(root: &Path, device: &str) -> io::Result<Self> {
        owner::sweep(root);
        let home = home(root, device)?;
        let own = format!("abi-{ABI_VERSION}");
        let folder = home.join(&own);
        if owner::is_gone(&folder) {
            // Its name, the number of an inode, is given again.
            remove(&home)?;
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        for entry in fs::read_dir(&home)? {
            let entry = entry?;
            if *entry.file_name() == *own {
                continue;
            }
            fs::remove_dir_all(entry.path())?;
            tracing::info!(
                found = %entry.file_name().display(),
                wanted = own,
                "another version of sluice has kept its flows in another form: they end"
            );
        }
        Ok(Self { folder })
    }

    /// Removes all that was pinned for `device` in this thread's network namespace, and its filters:
    /// for a daemon that runs without programs.
    pub fn discard(device: &str) -> io::Result<()> {
        clsact::remove_leftovers(clsact::handle(device), |_| false)?;
        if !is_bpffs(Path::new(BPFFS)) {
            return Ok(());
        }
        match remove(&home(Path::new(BPFFS), device)?) {
            // Whom it is closed to has pinned nothing.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            outcome => outcome,
        }
    }

    /// The generation of the settings that were in force with the tables which a daemon has left, if
    /// they can go on with room for `entries`. Else nothing is there any more.
    pub(super) fn inspect(&self, entries: u32) -> io::Result<Option<u32>> {
        if TABLES.iter().any(|name| self.path(name).exists()) {
            match self.left(entries) {
                Ok(generation) => return Ok(Some(generation)),
                Err(reason) => tracing::info!("the flows that were kept end: {reason}"),
            }
        }
        for entry in fs::read_dir(&self.folder)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(None)
    }

    fn left(&self, entries: u32) -> Result<u32, String> {
        for (name, key, value, entries) in [
            (FLOWS4, size_of::<Key4>(), size_of::<Flow>(), entries),
            (FLOWS6, size_of::<Key6>(), size_of::<Flow>(), entries),
        ] {
            let failed = |error| format!("{name} cannot be read: {error}");
            let info = MapInfo::from_pin(self.path(name)).map_err(failed)?;
            if info.max_entries() != entries {
                return Err(format!(
                    "{name} has {} entries, and is to have {entries}",
                    info.max_entries()
                ));
            }
            let form = (info.key_size() as usize, info.value_size() as usize);
            let kind = info.map_type().map_err(failed)?;
            if kind != MapType::Hash || form != (key, value) || info.map_flags() != NO_PREALLOC {
                return Err(format!("{name} has another form"));
            }
        }
        let settings = MapData::from_pin(self.path(SETTINGS))
            .and_then(Map::from_map_data)
            .and_then(Array::<_, Settings>::try_from)
            .and_then(|map| map.get(&0, 0));
        match settings {
            Ok(settings) if settings.abi_version == ABI_VERSION => Ok(settings.generation),
            Ok(_) => Err("they were never in use".to_owned()),
            Err(error) => Err(format!("{SETTINGS} cannot be read: {error}")),
        }
    }

    /// The maps that are taken over, with the paths of their pins.
    pub(super) fn tables(&self) -> impl Iterator<Item = (&'static str, PathBuf)> {
        TABLES.into_iter().map(|name| (name, self.path(name)))
    }

    /// Pins what is to go on: the tables unless they are pinned, and the settings in place of those
    /// before.
    pub(super) fn keep(&self, programs: &aya::Ebpf) -> io::Result<()> {
        let pin = |name: &str, path: &Path| {
            let map = programs.map(name).ok_or(io::ErrorKind::NotFound)?;
            map.pin(path).map_err(io::Error::other)
        };
        if let Err(error) = owner::mark(&self.folder) {
            tracing::debug!(%error, "what is pinned will outlive the network namespace");
        }
        for (name, path) in self.tables() {
            if !path.exists() {
                pin(name, &path)?;
            }
        }
        let draft = self.path("new");
        if draft.exists() {
            fs::remove_file(&draft)?;
        }
        pin(SETTINGS, &draft)?;
        // In one step: tables without settings would be of no use.
        fs::rename(draft, self.path(SETTINGS))
    }

    /// Where the attachment to the interface `index` is pinned.
    pub(super) fn link(&self, index: u32) -> PathBuf {
        self.path(&format!("{LINK}{index}"))
    }

    /// Takes off what is attached to interfaces that `wanted` does not name.
    pub(super) fn remove_links(&self, wanted: impl Fn(u32) -> bool) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let index = name.to_str().and_then(|name| name.strip_prefix(LINK));
            let Some(index) = index.and_then(|index| index.parse().ok()) else {
                continue;
            };
            if !wanted(index) {
                fs::remove_file(entry.path())?;
                tracing::info!(
                    interface = index,
                    "took off a program that an earlier run left"
                );
            }
        }
        Ok(())
    }

    /// Removes all that is pinned. What is in use goes on until it is let go.
    pub(super) fn remove(&self) -> io::Result<()> {
        match self.folder.parent() {
            Some(home) => remove(home),
            None => Ok(()),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// The folder of `device` in this thread's network namespace: device names are unique there only.
fn home(root: &Path, device: &str) -> io::Result<PathBuf> {
    // The file system knows no dots, and device names no colons.
    let device = device.replace('.', ":");
    Ok(root.join(FOLDER).join(namespace()?).join(device))
}

/// A name for this thread's network namespace. That of a file of /proc is given away again.
fn namespace() -> io::Result<String> {
    let socket = UnixDatagram::unbound()?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `cookie`.
    let code = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if code == 0 {
        return Ok(format!("netns-{cookie}"));
    }
    // Before Linux 5.14.
    let inode = fs::metadata("/proc/thread-self/ns/net")?.ino();
    Ok(format!("inode-{inode}"))
}

/// Removes the folder of a device, and those above it that are empty then.
fn remove(home: &Path) -> io::Result<()> {
    match fs::remove_dir_all(home) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for folder in home.ancestors().skip(1).take(2) {
        // Others are at work there.
        if fs::remove_dir(folder).is_err() {
            break;
        }
    }
    Ok(())
}

fn is_bpffs(path: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()) else {
        return false;
    };
    // SAFETY: `statfs` consists of integers, for which zero is valid.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string, and the kernel fills one `statfs`.
    let code = unsafe { libc::statfs(path.as_ptr(), &raw mut found) };
    code == 0 && found.f_type as u32 == MAGIC
}

/// Mounts the BPF file system where it belongs, unless it is there.
fn mount() -> io::Result<()> {
    if is_bpffs(Path::new(BPFFS)) {
        return Ok(());
    }
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_RELATIME;
    // SAFETY: all pointers are C strings that live as long as the call.
    let code = unsafe {
        libc::mount(
            c"bpf".as_ptr(),
            c"/sys/fs/bpf".as_ptr(),
            c"bpf".as_ptr(),
            flags,
            c"mode=0700".as_ptr().cast(),
        )
    };
    if code < 0 {
        let error = io::Error::last_os_error();
        let text = format!(
            "no BPF file system is mounted at {BPFFS}, and it cannot be: {error}{}",
            crate::container::bpffs_mend()
        );
        return Err(io::Error::new(error.kind(), text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_device_of_a_namespace_has_a_folder_of_its_own() {
        let root = Path::new("/bpf");
        let one = home(root, "wg.1").unwrap();
        assert_ne!(one, home(root, "wg1").unwrap());
        assert!(!one.to_str().unwrap().contains('.'));
        let other = std::thread::spawn(|| home(Path::new("/bpf"), "wg.1").unwrap());
        assert_eq!(one, other.join().unwrap());
    }

    #[test]
    fn what_is_removed_leaves_no_empty_folder() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(FOLDER);
        let (one, two) = (folder.join("n/one"), folder.join("n/two"));
        for home in [&one, &two] {
            fs::create_dir_all(home.join("abi-1")).unwrap();
        }
        remove(&one).unwrap();
        assert!(!one.exists() && two.exists());
        remove(&two).unwrap();
        assert!(!folder.exists() && root.path().exists());
        remove(&two).unwrap();
    }
}
