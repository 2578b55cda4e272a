//! The configuration file as a control source.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

use super::{Source, Update};
use crate::config::{self, Config, ConfigErrors};

/// How often the file is looked at. Looking serves where inotify does not see a change: a
/// Kubernetes ConfigMap swaps a symbolic link, and network file systems tell nothing.
const LOOK: Duration = Duration::from_secs(1);

/// Watches a configuration file and reads it.
#[derive(Debug)]
pub struct FileSource {
    watch: Watch,
    ticks: Option<Interval>,
    loaded: Option<Config>,
}

impl FileSource {
    /// A source for the file at `path`. What the file holds now counts as read.
    pub fn new(path: &Path) -> Self {
        Self {
            watch: Watch::new(path),
            ticks: None,
            loaded: None,
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.watch.path
    }

    /// Waits until the file has changed since it was last read, and has then stayed as it is for a
    /// second, so that no half-written file is read. Cancel safe. Changes of key files are not
    /// seen; SIGHUP is there for them.
    async fn changed(&mut self) {
        let ticks = self.ticks.get_or_insert_with(|| {
            let mut ticks = interval(LOOK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        loop {
            ticks.tick().await;
            if self.watch.look() {
                return;
            }
        }
    }

    /// Reads and validates the file, changed or not.
    pub fn load(&mut self) -> Result<Update, ConfigErrors> {
        self.watch.reading();
        self.loaded = None;
        let config = config::load(&self.watch.path)?;
        let update = config.update();
        self.loaded = Some(config);
        Ok(update)
    }

    /// All that the file said when it was last read, with the settings of the machine; once, and only
    /// if it could be read.
    pub fn take_loaded(&mut self) -> Option<Config> {
        self.loaded.take()
    }
}

impl Source for FileSource {
    type Error = ConfigErrors;

    async fn next(&mut self) -> Result<Update, ConfigErrors> {
        self.changed().await;
        self.load()
    }
}

/// What tells one state of the files of a configuration from another: which there are, and of each what tells
/// its own; `None` when there is no file.
type Stamp = Vec<(PathBuf, Option<FileStamp>)>;
type FileStamp = (u64, u64, u64, (i64, i64), (i64, i64));

#[derive(Debug)]
struct Watch {
    path: PathBuf,
    /// The state that was read last.
    read: Stamp,
    /// The state at the last look.
    seen: Stamp,
}

impl Watch {
    fn new(path: &Path) -> Self {
        let now = stamp(path);
        Self {
            path: path.to_owned(),
            read: now.clone(),
            seen: now,
        }
    }

    /// Whether the file should be read: it is not what was read, but is what was seen before.
    fn look(&mut self) -> bool {
        let now = stamp(&self.path);
        let settled = now == self.seen;
        self.seen = now;
        settled && self.seen != self.read
    }

    /// Called before reading: what changes from now on is seen as a change.
    fn reading(&mut self) {
        self.read = stamp(&self.path);
    }
}

fn stamp(path: &Path) -> Stamp {
    let files = config::files(path).into_iter();
    files
        .map(|path| {
            let stamp = file_stamp(&path);
            (path, stamp)
        })
        .collect()
}

fn file_stamp(path: &Path) -> Option<FileStamp> {
    let file = fs::metadata(path).ok()?;
    let modified = (file.mtime(), file.mtime_nsec());
    let changed = (file.ctime(), file.ctime_nsec());
    Some((file.dev(), file.ino(), file.size(), modified, changed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen_once_it_has_settled() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sluice.toml");
        fs::write(&path, "a").unwrap();
        let mut watch = Watch::new(&path);
        assert!(!watch.look());

        fs::write(&path, "half").unwrap();
        assert!(!watch.look(), "just written");
        fs::write(&path, "half and half").unwrap();
        assert!(!watch.look(), "still being written");
        assert!(watch.look());
        assert!(watch.look(), "until it is read");
        watch.reading();
        assert!(!watch.look());

        // Replaced by rename with a file of the same size and time: another inode.
        let other = directory.path().join("other");
        fs::write(&other, "half and half").unwrap();
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        fs::File::options()
            .write(true)
            .open(&other)
            .unwrap()
            .set_modified(time)
            .unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(!watch.look());
        assert!(watch.look());
        watch.reading();

        // Another layer.
        let layer = directory.path().join("sluice.d/10.toml");
        fs::create_dir(directory.path().join("sluice.d")).unwrap();
        fs::write(&layer, "a").unwrap();
        assert!(!watch.look(), "just written");
        assert!(watch.look());
        watch.reading();
        fs::remove_file(&layer).unwrap();
        assert!(!watch.look());
        assert!(watch.look());
        watch.reading();

        fs::remove_file(&path).unwrap();
        assert!(!watch.look());
        assert!(watch.look());
        watch.reading();
        assert!(!watch.look(), "its absence is told once");
    }

    #[test]
    fn the_source_yields_what_the_file_says_anew() {
        let directory = crate::config::tests::directory_with_keys();
        let path = directory.path().join("sluice.toml");
        let base =
            "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = [\"100.64.0.1/24\"]\n";
        fs::write(&path, base).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut source = FileSource::new(&path);
            let routes = |update: Update| match update {
                Update::Whole { snapshot, .. } => snapshot.routes.len(),
                Update::Delta(_) => panic!("a file is said whole"),
            };
            assert_eq!(routes(source.load().unwrap()), 0);
            fs::write(&path, format!("{base}[[route]]\ncidr = \"10.0.0.0/16\"\n")).unwrap();
            assert_eq!(routes(source.next().await.unwrap()), 1);
            assert!(source.take_loaded().is_some() && source.take_loaded().is_none());
            fs::write(&path, format!("{base}[[route]]\ncidr = \"10.0.0.1/16\"\n")).unwrap();
            assert!(
                source
                    .next()
                    .await
                    .unwrap_err()
                    .to_string()
                    .contains("host bits")
            );
            assert!(source.take_loaded().is_none());
        });
    }
}
