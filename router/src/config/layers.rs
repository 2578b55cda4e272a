//! The layers that a configuration is made of: files and a variable of the environment, the weaker first.
//!
//! All of them are one text here, one behind the other, and the place of a value is its byte offset in that. So
//! only whoever tells a place to people needs to know of layers ([`super::problem::Lines`]).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::de::{DeArray, DeTable, DeValue};

use super::problem::{ConfigErrors, Problem};
use super::section::REPEATED;
use crate::cloud::user_data;

/// Where the configuration is looked for if nobody says a file.
pub const DEFAULT_FILE: &str = "/etc/sluice/sluice.toml";
/// What comes with the machine's image: weaker than [`DEFAULT_FILE`], and beside no other file.
const VENDOR: &str = "/usr/lib/sluice/sluice.d";
/// The variable of the environment that holds a configuration, stronger than any file.
const VARIABLE: &str = "SLUICE_CONFIG";
/// How the layer of the user data is called.
const USER_DATA_NAME: &str = "user data";
/// No configuration file is longer, in bytes; whatever is, is another file.
const LONGEST_FILE: u64 = 64 << 20;

/// The files that the configuration `file` is made of, the weaker first: those of the image, the file itself,
/// those in the folder of its name with `.d`, each in the order of their names, and the instance's user data.
pub(crate) fn files(file: &Path) -> Vec<PathBuf> {
    let vendor = (file == Path::new(DEFAULT_FILE)).then(|| drop_ins(Path::new(VENDOR)));
    let mut files: Vec<PathBuf> = vendor.into_iter().flatten().collect();
    files.push(file.to_owned());
    files.extend(drop_ins(&file.with_extension("d")));
    let user_data = (file == Path::new(DEFAULT_FILE)).then(|| PathBuf::from(user_data::FILE));
    files.extend(user_data.filter(|path| path.exists()));
    files
}

/// Whether anything says the configuration `file`: one of its layers.
pub fn is_there(file: &Path) -> bool {
    std::env::var_os(VARIABLE).is_some() || files(file).iter().any(|file| file.exists())
}

/// The files of a folder that end in `.toml`. Hidden ones are editors'.
fn drop_ins(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension() == Some(OsStr::new("toml")))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default();
            !name.as_encoded_bytes().starts_with(b".")
        })
        .collect();
    files.sort();
    files
}

/// The texts of all layers, and where each begins.
#[derive(Debug)]
pub(super) struct Layers {
    text: String,
    /// Offset of its first byte, and how it is called.
    starts: Vec<(usize, Arc<Path>)>,
    /// Which of them is the file that was asked for.
    main: usize,
}

impl Layers {
    /// A single text.
    pub(super) fn one(text: &str, file: &Path) -> Self {
        let mut layers = Self::none();
        layers.push(file, text);
        layers
    }

    fn none() -> Self {
        Self {
            text: String::new(),
            starts: Vec::new(),
            main: 0,
        }
    }

    fn push(&mut self, name: &Path, text: &str) {
        if !self.text.is_empty() && !self.text.ends_with('\n') {
            self.text.push('\n');
        }
        self.starts.push((self.text.len(), name.into()));
        self.text += text;
    }

    /// The same over a weaker layer.
    pub(super) fn over(self, name: &str, text: &str) -> Self {
        let mut layers = Self::one(text, Path::new(name));
        layers.main = self.main + 1;
        for (name, text) in self.each() {
            layers.push(name, text);
        }
        layers
    }

    /// Whether the instance's user data has rules, as far as that can be told of a text that may be no TOML.
    pub(super) fn has_user_rules(&self) -> bool {
        let mut texts = self.each().filter(|(name, _)| is_user_data(name));
        texts.any(|(_, text)| text.lines().any(is_rule))
    }

    /// The same without the instance's user data; `None` if that is not there.
    pub(super) fn without_user_data(&self) -> Option<Self> {
        let at = self
            .starts
            .iter()
            .position(|(_, name)| is_user_data(name))?;
        let mut layers = Self::none();
        for (name, text) in self.each().filter(|(name, _)| !is_user_data(name)) {
            layers.push(name, text);
        }
        layers.main = self.main - usize::from(self.main > at);
        Some(layers)
    }

    /// Each layer with its name.
    fn each(&self) -> impl Iterator<Item = (&Path, &str)> {
        let ends = self.starts.iter().skip(1).map(|(start, _)| *start);
        let ends = ends.chain([self.text.len()]);
        let layers = self.starts.iter().zip(ends);
        layers.map(|((start, name), end)| {
            let text = self.text.get(*start..end).unwrap_or_default();
            (name.as_ref(), text)
        })
    }

    /// All layers of the configuration `file`; with `text` in the place of what that file holds now, if it is
    /// given. A file that is not there is no fault if something else says a configuration.
    pub(super) fn read(file: &Path, text: Option<&str>) -> Result<Self, ConfigErrors> {
        let variable = match std::env::var(VARIABLE) {
            Ok(text) => Some(text),
            Err(std::env::VarError::NotPresent) => None,
            Err(std::env::VarError::NotUnicode(_)) => {
                return Err(fault(Path::new(VARIABLE), "is not UTF-8".into()));
            }
        };
        let files = files(file);
        let others = files.len() > 1 || variable.is_some();
        let mut layers = Self::none();
        for path in files {
            let is_main = path == file;
            if is_main {
                layers.main = layers.starts.len();
            }
            let name: &Path = match path == Path::new(user_data::FILE) {
                true => Path::new(USER_DATA_NAME),
                false => &path,
            };
            match text.filter(|_| is_main) {
                Some(text) => layers.push(&path, text),
                None => match read(&path)? {
                    Some(text) => layers.push(name, &text),
                    // A drop-in may have gone meanwhile.
                    None if !is_main || others => {}
                    None => {
                        let message = "does not exist; `sluice init` makes one";
                        return Err(fault(file, message.into()));
                    }
                },
            }
        }
        if let Some(text) = variable {
            layers.push(Path::new(VARIABLE), &text);
        }
        layers.main = layers.main.min(layers.starts.len().saturating_sub(1));
        Ok(layers)
    }

    /// All of it, one behind the other.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Where each begins, and how it is called.
    pub(super) fn starts(&self) -> &[(usize, Arc<Path>)] {
        &self.starts
    }

    /// Where the file begins that was asked for.
    pub(super) fn main(&self) -> usize {
        self.starts.get(self.main).map_or(0, |(start, _)| *start)
    }

    /// Each by itself, behind as many blanks as there are bytes before it: so the parser counts as we do.
    pub(super) fn sources(&self) -> Vec<String> {
        let ends = self.starts.iter().skip(1).map(|(start, _)| *start);
        let ends = ends.chain([self.text.len()]);
        let parts = self.starts.iter().zip(ends);
        parts
            .map(|((start, _), end)| {
                let text = self.text.get(*start..end).unwrap_or_default();
                // Where an editor has left one, it is no part of the text.
                match text.strip_prefix('\u{feff}') {
                    Some(text) => " ".repeat(start + 3) + text,
                    None => " ".repeat(*start) + text,
                }
            })
            .collect()
    }
}

/// Whether a layer is the instance's user data.
pub(super) fn is_user_data(name: &Path) -> bool {
    name == Path::new(USER_DATA_NAME)
}

/// Whether a line begins a rule.
fn is_rule(line: &str) -> bool {
    let key = line.trim_start_matches(|c: char| c.is_whitespace() || "[\"'".contains(c));
    let behind = key.strip_prefix("rule");
    behind.is_some_and(|rest| {
        !rest.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '-'))
    })
}

/// Why user data that is wrong is not left out.
pub(super) fn only_rules() -> Problem {
    Problem {
        file: Path::new(USER_DATA_NAME).into(),
        position: None,
        key: "rule".into(),
        message: "the rest has no rule, so without the user data every peer might reach every route; mend the user \
                  data, or put its rules into a file"
            .into(),
    }
}

/// The text of a file; `None` if it is not there.
fn read(path: &Path) -> Result<Option<String>, ConfigErrors> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| {
        file.take(LONGEST_FILE + 1)
            .read_to_end(&mut bytes)
            .map(drop)
    });
    match read {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault(path, format!("cannot be read: {error}"))),
    }
    if bytes.len() as u64 > LONGEST_FILE {
        let message = "is longer than 64 MiB; is it the right file?";
        return Err(fault(path, message.into()));
    }
    String::from_utf8(bytes).map(Some).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let before = &error.as_bytes()[..at];
        let line = before.iter().filter(|b| **b == b'\n').count() + 1;
        let message = format!("line {line} is not UTF-8; save the file as UTF-8");
        fault(path, message)
    })
}

fn fault(file: &Path, message: String) -> ConfigErrors {
    ConfigErrors(vec![Problem {
        file: file.into(),
        position: None,
        key: "".into(),
        message,
    }])
}

/// Puts a stronger layer over `table`: what it says of a setting takes the place of what was said before,
/// sections are put together key by key, and peers, routes and rules are all kept.
pub(super) fn overlay<'i>(table: &mut DeTable<'i>, stronger: DeTable<'i>) {
    for (key, mut value) in stronger {
        let name = key.get_ref().to_string();
        if let Some(before) = table.get_mut(name.as_str()) {
            let repeats = REPEATED.contains(&name.as_str());
            match (before.get_mut(), value.get_mut()) {
                (DeValue::Table(before), DeValue::Table(after)) => {
                    overlay(before, std::mem::replace(after, DeTable::new()));
                    continue;
                }
                (DeValue::Array(before), DeValue::Array(after)) if repeats => {
                    for entry in std::mem::replace(after, DeArray::new()) {
                        before.push(entry);
                    }
                    continue;
                }
                _ => {}
            }
        }
        // With its key, whose place is told too.
        table.remove(name.as_str());
        table.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::directory_with_keys;
    use super::super::{ConfigErrors, DatapathMode, load};
    use super::*;

    const BASE: &str = "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = [\"100.64.0.1/24\"]\n\
                        listen_port = 1\n[datapath]\nmode = \"kernel\"\nflows = 2048\n";

    /// A configuration of these files beside `sluice.toml`.
    fn layered(files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
        let directory = directory_with_keys();
        fs::create_dir(directory.path().join("sluice.d")).unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let main = directory.path().join("sluice.toml");
        (directory, main)
    }

    #[test]
    fn a_stronger_layer_says_what_it_says_and_no_more() {
        let (_directory, main) = layered(&[
            ("sluice.toml", BASE),
            (
                "sluice.d/20.toml",
                "[wireguard]\nlisten_port = 3\n[[route]]\ncidr = \"10.2.0.0/16\"\n",
            ),
            (
                "sluice.d/10.toml",
                "[wireguard]\nlisten_port = 2\n[[route]]\ncidr = \"10.1.0.0/16\"\n",
            ),
            ("sluice.d/30.toml", "\u{feff}datapath.mode = \"auto\""),
            ("sluice.d/.hidden.toml", "nonsense"),
            ("sluice.d/README", "nonsense"),
        ]);
        let config = load(&main).unwrap();
        assert_eq!(config.local.listen_port, 3);
        assert_eq!(config.local.datapath, DatapathMode::Auto);
        assert_eq!(config.local.limits.flows, 2048, "said by the file alone");
        let routes: Vec<String> = config
            .snapshot
            .routes
            .iter()
            .map(|route| route.cidr.to_string())
            .collect();
        assert_eq!(routes, ["10.1.0.0/16", "10.2.0.0/16"]);
    }

    #[test]
    fn a_problem_names_the_layer_that_it_stands_in() {
        let (_directory, main) = layered(&[
            ("sluice.toml", BASE),
            ("sluice.d/10.toml", "[[route]]\ncidr = \"10.1.0.0/16\"\n"),
            (
                "sluice.d/20.toml",
                "# ü\n[[route]]\ncidr = \"10.1.0.0/16\"\n[wireguard]\nmtu = 3\ncolour = 1\n",
            ),
        ]);
        let ConfigErrors(problems) = load(&main).unwrap_err();
        let told: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 3, "{told:?}");
        for (problem, place) in told
            .iter()
            .zip(["20.toml:3:8: ", "20.toml:5:7: ", "20.toml:6:1: "])
        {
            assert!(problem.contains(place), "{problem}");
        }
        let first = "sluice.d/10.toml); remove one";
        assert!(
            told[0].contains("(line 2 of ") && told[0].contains(first),
            "{told:?}"
        );
    }

    #[test]
    fn broken_syntax_hides_no_other_layer() {
        let (_directory, main) = layered(&[
            ("sluice.toml", BASE),
            ("sluice.d/10.toml", "[metrics\n"),
            ("sluice.d/20.toml", "[wireguard]\nmtu = 3\n"),
        ]);
        let told = load(&main).unwrap_err().to_string();
        assert_eq!(told.lines().count(), 2, "{told}");
        assert!(
            told.contains("10.toml:1:") && told.contains("20.toml:2:7:"),
            "{told}"
        );
    }

    #[test]
    fn user_data_is_a_layer_that_is_left_out_whole_when_it_is_wrong() {
        let (_directory, main) = layered(&[("sluice.toml", BASE)]);
        let settled = |base: &str, text: &str| {
            let mut layers = Layers::one(base, &main);
            layers.push(Path::new(USER_DATA_NAME), text);
            super::super::settle(layers, &main)
        };
        let good = "[wireguard]\nlisten_port = 7\n[[route]]\ncidr = \"10.1.0.0/16\"\n";
        let (config, layers) = settled(BASE, good).unwrap();
        assert_eq!(config.local.listen_port, 7);
        assert!(config.user_data.is_empty() && layers.starts().len() == 2);
        let bad = good.replace("10.1.0.0/16", "10.1.0.1/16");
        let (config, layers) = settled(BASE, &bad).unwrap();
        // Nothing of it, and all that is wrong with it.
        assert_eq!(
            (config.local.listen_port, config.snapshot.routes.len()),
            (1, 0)
        );
        assert_eq!((config.user_data.len(), layers.starts().len()), (1, 1));
        let told = &config.user_data[0];
        assert!(told.starts_with("user data:4:8: route.cidr: "), "{told}");
        // Rules are not left out if none remains, even where the user data is no TOML; those of a file do.
        let rule = "[[rule]]\nfrom = [\"*\"]\nto = [\"10.1.0.0/16\"]\n";
        for wrong in [bad.as_str(), "[[route\n", "[wireguard\n"] {
            let error = settled(BASE, &format!("{wrong}{rule}")).unwrap_err();
            let told = error.to_string();
            assert!(
                told.contains("user data: rule: the rest has no rule"),
                "{told}"
            );
            assert!(error.0.len() > 1, "{told}");
            assert!(settled(BASE, &format!("{wrong}# [[rule]]\n")).is_ok());
            let base = format!("{BASE}{rule}");
            assert!(settled(&base, &format!("{wrong}{rule}")).is_ok());
        }
        // A router that runs keeps what it has; one that never had it does without.
        let with = settled(BASE, good).unwrap().0;
        let without = settled(BASE, &bad).unwrap().0;
        assert!(without.loses_user_data(&with));
        assert!(!without.loses_user_data(&without) && !with.loses_user_data(&with));
        let never = settled(BASE, "").unwrap().0;
        assert!(!never.loses_user_data(&with) && !with.loses_user_data(&never));
        // Where nothing else says a configuration, there is none.
        let error = settled("", &bad).unwrap_err().to_string();
        assert!(error.contains("user data:4:8: "), "{error}");
        assert!(
            settled(
                "",
                &format!("{BASE}{good}").replacen("[wireguard]\nlisten_port = 7\n", "", 1)
            )
            .is_ok()
        );
    }

    #[test]
    fn drop_ins_do_without_the_file() {
        let (_directory, main) = layered(&[("sluice.d/10.toml", BASE)]);
        assert_eq!(load(&main).unwrap().local.listen_port, 1);
        let (_directory, main) = layered(&[]);
        let told = load(&main).unwrap_err().to_string();
        assert!(told.contains("sluice init"), "{told}");
    }
}
