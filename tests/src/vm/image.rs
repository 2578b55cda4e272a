//! The root file system of a guest: an initramfs in the newc form of cpio(5), as the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst` has it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use crate::command::Cmd;

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

/// An image while it is written. Paths in it are absolute; folders come by themselves.
pub(super) struct Image {
    out: BufWriter<File>,
    written: usize,
    inodes: u32,
    names: BTreeSet<PathBuf>,
}

impl Image {
    pub(super) fn create(file: &Path) -> anyhow::Result<Self> {
        let out = File::create(file).with_context(|| file.display().to_string())?;
        Ok(Self {
            out: BufWriter::new(out),
            written: 0,
            inodes: 0,
            names: BTreeSet::from([PathBuf::from("/")]),
        })
    }

    /// Adds an empty folder.
    pub(super) fn folder(&mut self, path: &Path) -> io::Result<()> {
        self.entry(path, FOLDER, &[])
    }

    /// Adds a file with these permissions.
    pub(super) fn file(&mut self, path: &Path, permissions: u32, bytes: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | permissions, bytes)
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, path: &Path, target: &str) -> io::Result<()> {
        self.entry(path, LINK, target.as_bytes())
    }

    /// Adds a copy of a file, with its permissions.
    pub(super) fn copy(&mut self, from: &Path, path: &Path) -> anyhow::Result<()> {
        let name = || from.display().to_string();
        let bytes = fs::read(from).with_context(name)?;
        let permissions = fs::metadata(from).with_context(name)?.permissions().mode() & 0o777;
        Ok(self.file(path, permissions, &bytes)?)
    }

    /// Adds a copy of all that is in a folder.
    pub(super) fn tree(&mut self, from: &Path, path: &Path) -> anyhow::Result<()> {
        for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
            let entry = entry?;
            let target = path.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                self.tree(&entry.path(), &target)?;
            } else {
                self.copy(&entry.path(), &target)?;
            }
        }
        Ok(())
    }

    /// Adds a program, and the shared libraries that it takes where it takes them from.
    pub(super) fn program(&mut self, from: &Path, path: &Path) -> anyhow::Result<()> {
        // Its status is 1 for a static program, which has none.
        let libraries = Cmd::new(["ldd"]).arg(from).output()?.stdout;
        for library in libraries.split_whitespace() {
            if library.starts_with('/') && !library.ends_with(':') {
                self.copy(Path::new(library), Path::new(library))?;
            }
        }
        self.copy(from, path)
    }

    /// Ends the image.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.header("TRAILER!!!", 0, 0)?;
        self.out.flush()
    }

    fn entry(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
        if !self.names.insert(path.to_owned()) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        let name = path.to_string_lossy();
        let size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.header(name.trim_start_matches('/'), mode, size)?;
        self.write(bytes)?;
        self.align()
    }

    fn header(&mut self, name: &str, mode: u32, size: u32) -> io::Result<()> {
        self.inodes += 1;
        // Magic; inode, mode, user, group, links, time, size, four numbers of devices, length of the
        // name with its NUL, checksum.
        let name_size = name.len() as u32 + 1;
        let fields = [
            self.inodes,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        let mut header = "070701".to_owned();
        for field in fields {
            header += &format!("{field:08x}");
        }
        self.write(header.as_bytes())?;
        self.write(name.as_bytes())?;
        self.write(&[0])?;
        self.align()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn align(&mut self) -> io::Result<()> {
        let padding = self.written.next_multiple_of(4) - self.written;
        self.write(&[0; 3][..padding])
    }
}

/// A copy of a program without what a debugger needs, which is most of it.
pub(super) fn strip(program: &Path, to: &Path) -> anyhow::Result<()> {
    let strip = Cmd::new(["strip", "--strip-debug", "-o"]);
    strip.arg(to).arg(program).run()?;
    ensure!(to.exists(), "strip made no {}", to.display());
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_image_holds_what_was_put_in() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("image");
        let mut image = Image::create(&file).unwrap();
        image.file(Path::new("/a/b"), 0o640, b"hello").unwrap();
        image.link(Path::new("/a/c"), "b").unwrap();
        image.file(Path::new("/a/b"), 0o777, b"twice").unwrap();
        image.finish().unwrap();
        let bytes = fs::read(&file).unwrap();
        let entries = [
            (1, FOLDER, "", 2, "a\0"),
            (2, FILE | 0o640, "hello", 4, "a/b\0"),
            (3, LINK, "b", 4, "a/c\0"),
            (4, 0, "", 11, "TRAILER!!!\0"),
        ];
        let mut expected = Vec::new();
        for (inode, mode, data, name_size, name) in entries {
            let size = data.len();
            let zero = "00000000";
            let text = format!(
                "070701{inode:08x}{mode:08x}{zero}{zero}00000001{zero}{size:08x}\
                 {zero}{zero}{zero}{zero}{name_size:08x}{zero}{name}"
            );
            for part in [text.as_bytes(), data.as_bytes()] {
                expected.extend(part);
                expected.resize(expected.len().next_multiple_of(4), 0);
            }
        }
        assert_eq!(bytes, expected);
    }
}
