//! Whether the network namespace that something was pinned for is still there.
//!
//! Nothing finds a namespace by its cookie, and no list of namespaces is whole: a socket somewhere
//! keeps one alive. But a map of devices lets go of a device when the kernel does
//! (`dev_map_notification` in kernel/bpf/devmap.c), and a namespace's loopback device is there from its
//! first moment to its last, for it can be neither removed nor moved. So a map that holds it is pinned
//! beside the others. No packet ever asks it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{DevMap, Map, MapData, MapError, MapType};

use super::{FOLDER, remove};

/// The name of its pin.
const LOOPBACK: &str = "LOOPBACK";
/// `LOOPBACK_IFINDEX` of include/net/flow.h, in every namespace.
const INDEX: u32 = 1;
/// Bytes of an index, and of a `struct bpf_devmap_val` (linux/bpf.h; Linux 5.8).
const SIZES: [u32; 2] = [4, 8];

/// Pins in `folder` what tells of this thread's namespace.
pub(super) fn mark(folder: &Path) -> io::Result<()> {
    let pin = folder.join(LOOPBACK);
    if pin.exists() {
        return Ok(());
    }
    let [key, value] = SIZES;
    let form = aya_obj::Map::new_from_params(MapType::DevMap as u32, key, value, 1, 0);
    let map = MapData::create(form, LOOPBACK, None).map_err(io::Error::other)?;
    let mut map = DevMap::try_from(Map::DevMap(map)).map_err(io::Error::other)?;
    map.set(0, INDEX, None, 0).map_err(io::Error::other)?;
    // Filled already: an empty one says that the namespace is gone.
    map.pin(pin).map_err(io::Error::other)
}

/// Whether the namespace is gone for which `folder` was made. If in doubt, it is not.
pub(super) fn is_gone(folder: &Path) -> bool {
    let map = MapData::from_pin(folder.join(LOOPBACK))
        .and_then(Map::from_map_data)
        .and_then(DevMap::try_from);
    map.is_ok_and(|map| matches!(map.get(0, 0), Err(MapError::KeyNotFound)))
}

/// Removes what is pinned for namespaces that are gone, in the file system that is mounted at `root`.
pub(super) fn sweep(root: &Path) {
    for namespace in entries(&root.join(FOLDER)) {
        // A cookie is never given again, so nobody comes there any more. An inode's number is.
        let name = namespace.file_name().and_then(|name| name.to_str());
        if !name.is_some_and(|name| name.starts_with("netns-")) {
            continue;
        }
        for home in entries(&namespace) {
            if !entries(&home).iter().any(|folder| is_gone(folder)) {
                continue;
            }
            let path = home.display();
            match remove(&home) {
                Ok(()) => tracing::info!(
                    %path,
                    "removed the flows that were kept for a network namespace that is gone"
                ),
                // Another daemon may do the same at this moment.
                Err(error) => tracing::debug!(%error, %path, "what nobody needs is left"),
            }
        }
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}
