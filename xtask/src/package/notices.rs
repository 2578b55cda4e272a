//! What the licences of the libraries in the binary ask to go along with it: their texts and authors.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::Arch;
use super::binary::files;
use crate::run;

/// Names of files that tell of rights, in lower case.
const NAMES: [&str; 6] = [
    "license",
    "licence",
    "copying",
    "copyright",
    "notice",
    "unlicense",
];

const HEAD: &str = "\
The sluice binary contains the following libraries. It contains besides Rust's
standard library (MIT or Apache-2.0, the Rust project's contributors) and musl
(MIT, Copyright 2005-2025 Rich Felker, et al.). The texts of the licences
follow, each once, below the names of the libraries that come with it.

";

/// All of it, as one text.
pub(super) fn text(arch: Arch) -> Result<String> {
    let target = format!("{}-unknown-linux-musl", arch.rust());
    let listed = run::read(
        run::cargo()
            .args([
                "tree",
                "--locked",
                "--package",
                "router",
                "--edges",
                "normal",
            ])
            .args(["--target", &target, "--prefix", "none", "--no-dedupe"])
            .args(["--format", "{p}|{l}"]),
    )?;
    let crates: BTreeSet<(&str, &str, &str)> = listed.lines().filter_map(parse).collect();
    let registries = files(&run::cargo_home().join("registry/src"))?;
    let mut out = HEAD.to_owned();
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, version, licence) in crates {
        let _ = writeln!(out, "{name} {version}: {licence}");
        let folder: PathBuf = registries
            .iter()
            .map(|registry| registry.join(format!("{name}-{version}")))
            .find(|folder| folder.is_dir())
            .with_context(|| format!("the sources of {name} {version} are not here"))?;
        for file in files(&folder)? {
            let name_of_file = file.file_name().unwrap_or_default().to_string_lossy();
            let lower = name_of_file.to_lowercase();
            if !file.is_file() || !NAMES.iter().any(|name| lower.starts_with(name)) {
                continue;
            }
            let bytes = fs::read(&file).with_context(|| file.display().to_string())?;
            let text = String::from_utf8_lossy(&bytes).replace('\r', "");
            let whose = texts.entry(text.trim().to_owned()).or_default();
            whose.push(format!("{name} {version}"));
        }
    }
    ensure!(!texts.is_empty(), "no library has a licence");
    for (text, whose) in texts {
        let _ = write!(
            out,
            "\n{}\n{}\n\n{text}\n",
            "-".repeat(78),
            whose.join(", ")
        );
    }
    Ok(out)
}

/// Name, version and licence of a crate of the registry, of a line of `cargo tree`. Our own have a path
/// behind the version.
fn parse(line: &str) -> Option<(&str, &str, &str)> {
    let (package, licence) = line.split_once('|')?;
    let mut words = package.split_whitespace();
    let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
    let is_registrys = words.all(|word| word == "(proc-macro)");
    is_registrys.then_some((name, version, licence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_cargo_tree_tells_a_crate() {
        let ring = ("ring", "0.17.14", "Apache-2.0 AND ISC");
        assert_eq!(parse("ring v0.17.14|Apache-2.0 AND ISC"), Some(ring));
        let derive = ("serde_derive", "1.0.1", "MIT");
        assert_eq!(parse("serde_derive v1.0.1 (proc-macro)|MIT"), Some(derive));
        assert_eq!(parse("router v0.1.0 (/some/where)|MIT"), None);
        assert_eq!(parse(""), None);
    }
}
