//! `sluice import`: a wg-quick file becomes a configuration of Sluice.

mod command;
mod conf;
#[cfg(feature = "internals")]
pub(super) mod fuzz;
mod values;
mod written;

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use zeroize::Zeroizing;

use self::conf::Imported;
use crate::config;
use crate::files::{Existing, write_atomic};

/// Options of `import`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file of wg-quick.
    #[arg(value_name = "FILE.conf")]
    file: PathBuf,
    /// Where to: the directory is made if it is not there.
    #[arg(long, value_name = "DIR", default_value = "/etc/sluice")]
    dir: PathBuf,
    /// Replace a sluice.toml that is there. A key is never replaced.
    #[arg(long)]
    force: bool,
}

/// Writes `sluice.toml` and key files, and tells what was done, what was left out, and what comes
/// next.
pub(super) fn import(args: &Args) -> anyhow::Result<String> {
    let shown = args.file.display();
    let text = Zeroizing::new(fs::read(&args.file).with_context(|| shown.to_string())?);
    let stem = args.file.file_stem().and_then(|stem| stem.to_str());
    let imported = conf::read(&text, stem).and_then(|imported| {
        let missing = missing(&imported);
        if missing.is_empty() {
            Ok(imported)
        } else {
            Err(missing)
        }
    });
    match imported {
        Ok(imported) => write(&imported, args),
        Err(problems) => {
            let lines = problems.iter().map(|note| note.place(&args.file));
            bail!("{}", lines.collect::<Vec<_>>().join("\n"));
        }
    }
}

/// The key files that the text names and that are not there.
fn missing(imported: &Imported) -> Vec<Note> {
    let fault = |path: &Path| match fs::metadata(path) {
        Ok(found) if !found.is_file() => Some("is no regular file".to_owned()),
        Ok(_) => fs::File::open(path).err().map(|error| error.to_string()),
        Err(error) => Some(error.to_string()),
    };
    let files = imported.files.iter();
    files
        .filter_map(|(line, path)| {
            let text = format!(
                "the key's file {}: {}; name the file that holds the key, or write the key into \
                 this one as PrivateKey or PresharedKey",
                path.display(),
                fault(path)?
            );
            Some(conf::note(*line, text))
        })
        .collect()
}

fn write(imported: &Imported, args: &Args) -> anyhow::Result<String> {
    let config = args.dir.join("sluice.toml");
    let shown = config.display();
    if !args.force && config.symlink_metadata().is_ok() {
        bail!(
            "{shown} is there already; name another directory with --dir, or replace it with --force"
        );
    }
    fs::create_dir_all(&args.dir).with_context(|| format!("make {}", args.dir.display()))?;
    let mut told = String::new();
    // Before anything is written: none of them may be another key.
    for (name, key) in &imported.keys {
        let path = args.dir.join(name);
        match fs::read_to_string(&path).map(Zeroizing::new) {
            Ok(there) if there.trim() == key.as_str() => {}
            Ok(_) => bail!(
                "{} holds another key; move it away, or name another directory with --dir",
                path.display()
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context(format!("read {}", path.display())),
        }
    }
    for (name, key) in &imported.keys {
        let path = args.dir.join(name);
        let line = Zeroizing::new(format!("{}\n", key.as_str()));
        let done = match write_atomic(&path, line.as_bytes(), 0o600, Existing::Keep) {
            Ok(()) => "wrote",
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => "kept",
            Err(error) => return Err(error).context(format!("write {}", path.display())),
        };
        let _ = writeln!(told, "{done} {} (secret, mode 600)", path.display());
    }
    let existing = if args.force {
        Existing::Replace
    } else {
        Existing::Keep
    };
    write_atomic(&config, imported.toml.as_bytes(), 0o644, existing)
        .with_context(|| format!("write {shown}"))?;
    let _ = writeln!(told, "wrote {shown}");
    if !imported.notes.is_empty() {
        told.push_str("\nNot carried over as it was:\n");
        for note in &imported.notes {
            let _ = writeln!(told, "{}", note.place(&args.file));
        }
    }
    let problems = config::load(&config).err();
    if let Some(problems) = &problems {
        let _ = write!(
            told,
            "\nTo be mended by hand in what was written:\n{problems}\n"
        );
    }
    let _ = write!(
        told,
        "\nNext:\n\
         1. name the networks behind this machine in {shown}, a [[route]] for each: a file of \
         wg-quick does not name them\n\
         2. sluice check-config {shown}\n\
         3. wg-quick down {}, then sluice run --config {shown}\n",
        args.file.display()
    );
    Ok(told)
}

/// A sentence about a line of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note {
    /// From 1.
    line: usize,
    text: String,
}

impl Note {
    fn place(&self, file: &Path) -> String {
        format!("{}:{}: {}", file.display(), self.line, self.text)
    }
}

#[cfg(test)]
mod tests;
