//! What a lab owns outside its own process, found by name, and its removal.
//!
//! A lab with the id `<pid>-<n>` owns the namespaces `sl<pid>-<n>-*`, the folder
//! `/tmp/sluice-lab-<pid>-<n>`, the BPF file system that may be mounted in it, and the sockets `/run/wireguard/wg<pid>-<n>*.sock`. The file `owner`
//! in its folder holds the start time of the process, so that a pid used again is not mistaken for
//! it; the file `kept` says that the lab outlives its process on purpose.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use crate::netns;

const TEMPORARY: &str = "/tmp";
const FOLDER_PREFIX: &str = "sluice-lab-";
const BPFFS: &str = "bpf";
const WIREGUARD_SOCKETS: &str = "/run/wireguard";

/// Makes the folder of a new lab and enters the owner there.
pub(crate) fn claim(id: &str) -> anyhow::Result<PathBuf> {
    let folder = folder(id);
    fs::DirBuilder::new()
        .mode(0o755)
        .create(&folder)
        .with_context(|| folder.display().to_string())?;
    let start = start_time(std::process::id()).context("/proc/self/stat")?;
    fs::write(folder.join("owner"), start)?;
    Ok(folder)
}

/// Marks a lab to outlive its process.
pub(crate) fn keep(id: &str) -> anyhow::Result<()> {
    Ok(fs::write(folder(id).join("kept"), "")?)
}

/// Removes what killed runs have left, and nothing of a run that is alive or of a lab kept on
/// purpose. Returns the ids of the labs removed.
pub fn sweep() -> anyhow::Result<Vec<String>> {
    let dead: Vec<String> = all()
        .into_iter()
        .filter(|id| !is_kept(id) && !is_alive(id))
        .collect();
    dead.iter().try_for_each(|id| remove(id))?;
    Ok(dead)
}

/// Removes every lab that was kept on purpose. Returns their ids.
pub fn remove_kept() -> anyhow::Result<Vec<String>> {
    let kept: Vec<String> = all()
        .into_iter()
        .filter(|id| is_kept(id) && !is_alive(id))
        .collect();
    kept.iter().try_for_each(|id| remove(id))?;
    Ok(kept)
}

/// Waits until a process has ended, however it did, and then does as [`sweep`]. For a guard that
/// outlives a run that may be killed.
pub fn sweep_after(pid: u32) -> anyhow::Result<Vec<String>> {
    if let Some(start) = start_time(pid) {
        while start_time(pid).as_ref() == Some(&start) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    sweep()
}

/// Removes a lab: its processes, namespaces (and with them every link), sockets and folder.
pub(crate) fn remove(id: &str) -> anyhow::Result<()> {
    let prefix = namespace(id, "");
    let names: Vec<String> = netns::list()
        .into_iter()
        .filter(|name| name.starts_with(&prefix))
        .collect();
    let namespaces = netns::remove(&names);
    for socket in wireguard_sockets(id) {
        gone(fs::remove_file(&socket)).with_context(|| socket.display().to_string())?;
    }
    let folder = folder(id);
    unmount(&folder.join(BPFFS))?;
    gone(fs::remove_dir_all(&folder)).with_context(|| folder.display().to_string())?;
    namespaces
}

/// Mounts a BPF file system in a lab's folder.
pub(crate) fn mount_bpffs(id: &str) -> anyhow::Result<PathBuf> {
    let path = folder(id).join(BPFFS);
    fs::create_dir(&path).with_context(|| path.display().to_string())?;
    let target = CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: all pointers are C strings that live as long as the call.
    let code = unsafe {
        libc::mount(
            c"bpf".as_ptr(),
            target.as_ptr(),
            c"bpf".as_ptr(),
            0,
            c"mode=0700".as_ptr().cast(),
        )
    };
    if code < 0 {
        let error = std::io::Error::last_os_error();
        return Err(error).with_context(|| format!("mount {}", path.display()));
    }
    Ok(path)
}

/// Unmounts what is mounted at `path`, if it is.
fn unmount(path: &Path) -> anyhow::Result<()> {
    let target = CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: the pointer is that of a C string.
    if unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) } == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        // It is not there, or nothing is mounted on it.
        Some(libc::ENOENT | libc::EINVAL) => Ok(()),
        _ => Err(error).with_context(|| format!("unmount {}", path.display())),
    }
}

/// The name of a lab's namespace for a host.
pub(crate) fn namespace(id: &str, host: &str) -> String {
    format!("sl{id}-{host}")
}

/// The name of a lab's n-th WireGuard device. wireguard-go's control socket is named after the
/// device in a folder that all namespaces share, so that the name must be unique on the machine.
pub(crate) fn wireguard_device(id: &str, n: usize) -> String {
    format!("wg{id}{}", char::from(b'a' + (n % 26) as u8))
}

/// Everything on this machine that bears the name of the lab `id`; for tests.
pub fn traces(id: &str) -> Vec<String> {
    let prefix = namespace(id, "");
    let namespaces = netns::list()
        .into_iter()
        .filter(|name| name.starts_with(&prefix));
    let folder = folder(id);
    let files = wireguard_sockets(id)
        .into_iter()
        .chain(folder.exists().then_some(folder))
        .map(|path| path.display().to_string());
    namespaces.chain(files).collect()
}

fn wireguard_sockets(id: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(WIREGUARD_SOCKETS) else {
        return Vec::new();
    };
    let ours = |name: &str| {
        let rest = name.strip_prefix(&format!("wg{id}"));
        rest.is_some_and(|rest| rest.strip_suffix(".sock").is_some_and(|n| n.len() == 1))
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(ours))
        .map(|entry| entry.path())
        .collect()
}

fn folder(id: &str) -> PathBuf {
    Path::new(TEMPORARY).join(format!("{FOLDER_PREFIX}{id}"))
}

/// The ids of all labs that have a folder or a namespace.
fn all() -> BTreeSet<String> {
    let folders = fs::read_dir(TEMPORARY)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            Some(name.to_str()?.strip_prefix(FOLDER_PREFIX)?.to_owned())
        });
    let namespaces = netns::list().into_iter().filter_map(|name| {
        let mut parts = name.strip_prefix("sl")?.splitn(3, '-');
        Some(format!("{}-{}", parts.next()?, parts.next()?))
    });
    folders
        .chain(namespaces)
        .filter(|id| parse(id).is_some())
        .collect()
}

fn parse(id: &str) -> Option<(u32, u32)> {
    let (pid, n) = id.split_once('-')?;
    Some((pid.parse().ok()?, n.parse().ok()?))
}

fn is_kept(id: &str) -> bool {
    folder(id).join("kept").exists()
}

fn is_alive(id: &str) -> bool {
    let Some(now) = parse(id).and_then(|(pid, _)| start_time(pid)) else {
        return false;
    };
    // Without the file, or before anything is in it, the lab is being made or unmade just now: it
    // belongs to the process.
    fs::read_to_string(folder(id).join("owner")).map_or(true, |then| then.is_empty() || then == now)
}

/// When a process started, in ticks since boot; `None` when there is no such process.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses, which may itself hold spaces; proc(5).
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18).map(str::to_owned)
}

fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
