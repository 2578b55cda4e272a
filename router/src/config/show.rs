//! What a configuration says in all, and which layer has said it.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::layers;
use super::problem::{ConfigErrors, Lines};
use super::section::REPEATED;

/// What holds where no layer says otherwise, as far as it is the same on every machine.
const BUILT_IN: &str = include_str!("defaults.toml");

/// Keys whose values are secrets, unless they tell where the secret is.
const SECRETS: [&str; 4] = ["auth_key", "client_secret", "preshared_key", "private_key"];
/// How a text begins that tells where a secret is.
const ELSEWHERE: [&str; 2] = ["file:", "ssm:"];

/// The configuration at `path` with its other layers and the defaults, as one file; with `origin`, behind each
/// value where it has come from. Secrets are masked. It must be valid.
pub fn show(path: &Path, origin: bool) -> Result<String, ConfigErrors> {
    let (_, layers) = super::effective(path)?;
    let layers = layers.over("built-in", BUILT_IN);
    let sources = layers.sources();
    let mut whole = DeTable::new();
    for source in &sources {
        let (table, _) = DeTable::parse_recoverable(source);
        layers::overlay(&mut whole, table.into_inner());
    }
    let shown = Shown {
        lines: Lines::new(&layers),
        text: layers.text(),
        origin,
    };
    let mut out = String::new();
    shown.table(&whole, "", &mut out);
    Ok(out)
}

struct Shown<'t> {
    lines: Lines<'t>,
    text: &'t str,
    origin: bool,
}

impl Shown<'_> {
    /// Values first: what stands behind a heading is the section's.
    fn table(&self, table: &DeTable<'_>, name: &str, out: &mut String) {
        let is_section = |name: &str, value: &DeValue<'_>| {
            value.is_table() || (value.is_array() && REPEATED.contains(&name))
        };
        for (key, value) in table.iter() {
            if !is_section(key.get_ref(), value.get_ref()) {
                self.value(key.get_ref(), value, out);
            }
        }
        for (key, value) in table.iter() {
            let key = key.get_ref().as_ref();
            let inner = match name {
                "" => key.to_owned(),
                outer => format!("{outer}.{key}"),
            };
            match value.get_ref() {
                DeValue::Table(section) => {
                    let _ = writeln!(out, "\n[{inner}]");
                    self.table(section, &inner, out);
                }
                DeValue::Array(list) if REPEATED.contains(&key) => {
                    for entry in list {
                        if let DeValue::Table(section) = entry.get_ref() {
                            let _ = writeln!(out, "\n[[{inner}]]");
                            self.table(section, &inner, out);
                        }
                    }
                }
                _ => {}
            }
        }
    }

    fn value(&self, key: &str, value: &Spanned<DeValue<'_>>, out: &mut String) {
        let Range { start, end } = value.span();
        // As it was written.
        let mut written = self.text.get(start..end).unwrap_or_default();
        let text = value.get_ref().as_str().unwrap_or_default();
        let elsewhere = ELSEWHERE.iter().any(|prefix| text.starts_with(prefix));
        if SECRETS.contains(&key) && !elsewhere {
            written = "\"(masked)\"";
        }
        let _ = write!(out, "{key} = {written}");
        if self.origin {
            let file = self.lines.files().nth(self.lines.layer(start));
            let name = file.map(|file| file.display().to_string());
            let _ = match name.as_deref() {
                Some("built-in") | None => write!(out, "  # built-in"),
                Some(name) => {
                    let line = self.lines.position(start).line;
                    write!(out, "  # {name}:{line}")
                }
            };
        }
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::layers::Layers;
    use super::super::tests::{EXAMPLE, directory_with_keys, parse_in_temporary_directory};
    use super::*;

    #[test]
    fn what_is_built_in_is_what_holds_without_it() {
        let identity = "private_key_file = \"private.key\"\naddresses = [\"100.64.0.1/24\"]\n";
        let without = format!("[wireguard]\n{identity}");
        let with = BUILT_IN.replacen("[wireguard]\n", &without, 1);
        let [without, with] =
            [without, with].map(|text| parse_in_temporary_directory(&text).unwrap());
        assert_eq!(without, with);
    }

    #[test]
    fn each_value_has_its_origin_and_the_whole_is_the_same_configuration() {
        let directory = directory_with_keys();
        let main = directory.path().join("sluice.toml");
        fs::write(&main, EXAMPLE).unwrap();
        fs::create_dir(directory.path().join("sluice.d")).unwrap();
        let over = "\n[wireguard]\nlisten_port = 7\n[[route]]\ncidr = \"10.99.0.0/16\"\n";
        fs::write(directory.path().join("sluice.d/over.toml"), over).unwrap();
        let config = super::super::load(&main).unwrap();
        for origin in [false, true] {
            let shown = show(&main, origin).unwrap();
            let again = parse_in_temporary_directory(&shown);
            let again = again.unwrap_or_else(|error| panic!("{error}\n{shown}"));
            assert_eq!(again.snapshot, config.snapshot, "{shown}");
            assert_eq!(again.local.listen_port, 7, "{shown}");
            assert_eq!(shown.contains("listen_port = 7  # "), origin, "{shown}");
            assert_eq!(shown.contains("sluice.d/over.toml:3\n"), origin, "{shown}");
        }
    }

    #[test]
    fn what_nobody_has_said_is_shown_as_built_in() {
        let directory = directory_with_keys();
        let main = directory.path().join("sluice.toml");
        let text =
            "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = [\"100.64.0.1/24\"]\n";
        fs::write(&main, text).unwrap();
        let shown = show(&main, true).unwrap();
        assert!(
            shown.contains("device = \"sluice0\"  # built-in\n"),
            "{shown}"
        );
        assert!(shown.contains("sluice.toml:3\n"), "{shown}");
    }

    #[test]
    fn a_secret_is_not_shown() {
        let text =
            "auth_key = \"tskey-auth-secret\"\nother = 1\n[a]\nauth_key = \"file:/run/key\"\n";
        let layers = Layers::one(text, Path::new("a.toml"));
        let sources = layers.sources();
        let (table, errors) = DeTable::parse_recoverable(&sources[0]);
        assert!(errors.is_empty());
        let shown = Shown {
            lines: Lines::new(&layers),
            text: layers.text(),
            origin: true,
        };
        let mut out = String::new();
        shown.table(table.get_ref(), "", &mut out);
        assert!(!out.contains("tskey"), "{out}");
        assert!(
            out.contains("auth_key = \"(masked)\"  # a.toml:1\n"),
            "{out}"
        );
        assert!(
            out.contains("auth_key = \"file:/run/key\"  # a.toml:4\n"),
            "{out}"
        );
    }
}
