//! A disk that boots by UEFI: a GPT with the firmware's partition and a root file system. It is written by programs
//! that know files, so that nothing is mounted and no loop device is needed.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::package::{Arch, Build};
use crate::run;

/// The partition that the kernel takes for its root.
pub(super) const ROOT: &str = "8d3f6f52-1b1d-4a44-9f5e-6a3a0a5a7c01";
/// Others that are the same in every image, so that images are alike.
const DISK: &str = "8d3f6f52-1b1d-4a44-9f5e-6a3a0a5a7c00";
const FIRMWARE: &str = "8d3f6f52-1b1d-4a44-9f5e-6a3a0a5a7c02";
const FILE_SYSTEM: &str = "8d3f6f52-1b1d-4a44-9f5e-6a3a0a5a7c03";

/// In bytes.
const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;
/// The whole, the smallest volume that EC2 has. The root grows into a larger one.
const SIZE: u64 = 1024 * MIB;
const FIRMWARE_START: u64 = MIB;
const FIRMWARE_SIZE: u64 = 64 * MIB;
const ROOT_START: u64 = FIRMWARE_START + FIRMWARE_SIZE;
/// Less the second copy of the table at the end.
const ROOT_SIZE: u64 = SIZE - MIB - ROOT_START;

/// What the firmware starts if nobody says another program.
pub(super) fn loader(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "BOOTX64.EFI",
        Arch::Arm64 => "BOOTAA64.EFI",
    }
}

/// By this type systemd finds the root that is to grow.
fn root_type(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
        Arch::Arm64 => "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
    }
}

/// Writes the disk, with what is in the folder `firmware` for the firmware, and `root` as the system.
pub(super) fn write(
    build: &Build,
    arch: Arch,
    firmware: &Path,
    root: &Path,
    disk: &Path,
) -> Result<()> {
    let context = || disk.display().to_string();
    File::create(disk)
        .and_then(|file| file.set_len(SIZE))
        .with_context(context)?;
    let table = disk.with_extension("table");
    fs::write(&table, partitions(arch)).context("partition table")?;
    let mut sfdisk = run::command("sfdisk");
    sfdisk
        .arg("--quiet")
        .arg(disk)
        .stdin(File::open(&table).context("partition table")?);
    run::read(&mut sfdisk)?;
    fs::remove_file(&table).context("partition table")?;

    let partition = format!("{}@@{FIRMWARE_START}", disk.display());
    let dos = |program: &str| {
        let mut command = run::command(program);
        command.args(["-i", &partition]);
        at(build, command)
    };
    let sectors = (FIRMWARE_SIZE / SECTOR).to_string();
    let mut format = dos("mformat");
    // FAT32 with clusters of a sector; the geometry means nothing any more, but must be there.
    format.args(["-F", "-T", &sectors, "-h", "255", "-s", "63", "-c", "1"]);
    run::read(format.args(["-N", "5a3a0a5a", "-v", "SLUICE", "::"]))?;
    let mut copy = dos("mcopy");
    copy.args(["-s", "-m"]);
    for entry in fs::read_dir(firmware).with_context(|| firmware.display().to_string())? {
        copy.arg(
            entry
                .with_context(|| firmware.display().to_string())?
                .path(),
        );
    }
    run::read(copy.arg("::"))?;

    let mut format = at(build, run::command("mkfs.ext4"));
    format
        .args(["-q", "-F", "-m", "1", "-L", "root", "-U", FILE_SYSTEM])
        .args(["-b", &BLOCK.to_string(), "-E"])
        .arg(format!(
            "offset={ROOT_START},root_owner=0:0,hash_seed={FILE_SYSTEM}"
        ))
        .arg("-d")
        .args([root, disk])
        .arg((ROOT_SIZE / BLOCK).to_string());
    run::read(&mut format).map(drop)
}

/// Has a program take the build's time for now.
fn at(build: &Build, mut command: Command) -> Command {
    let time = build.time.to_string();
    command
        .env("SOURCE_DATE_EPOCH", &time)
        .env("E2FSPROGS_FAKE_TIME", time);
    command
}

/// The table, as sfdisk(8) reads it.
fn partitions(arch: Arch) -> String {
    let partition = |start: u64, size: u64, kind: &str, id: &str, name: &str| {
        let (start, size) = (start / SECTOR, size / SECTOR);
        format!("start={start}, size={size}, type={kind}, uuid={id}, name={name}\n")
    };
    let esp = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
    format!("label: gpt\nlabel-id: {DISK}\n")
        + &partition(FIRMWARE_START, FIRMWARE_SIZE, esp, FIRMWARE, "esp")
        + &partition(ROOT_START, ROOT_SIZE, root_type(arch), ROOT, "root")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_aligned_and_leave_room_for_both_tables() {
        for arch in Arch::ALL {
            let table = partitions(arch);
            let number = |line: &str, name: &str| -> u64 {
                let (_, rest) = line.split_once(name).unwrap();
                rest.split(',').next().unwrap().parse().unwrap()
            };
            // The first table takes 34 sectors, the second one 33.
            let mut end = 34;
            for line in table.lines().filter(|line| line.starts_with("start=")) {
                let (start, size) = (number(line, "start="), number(line, "size="));
                assert!(start >= end && start % (MIB / SECTOR) == 0, "{line}");
                end = start + size;
            }
            assert!(end > 34 && end <= SIZE / SECTOR - 33, "{table}");
            assert!(table.contains(&format!("uuid={ROOT}")), "{table}");
        }
    }
}
