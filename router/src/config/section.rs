//! Takes typed values out of a parsed TOML table, and reports what is left over.

use std::borrow::Cow;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::Problems;
use super::suggest;
use crate::engine::Offloads;

/// Every section with its keys. `""` is the top level.
pub(super) const SCHEMA: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "name",
            "wireguard",
            "tailnet",
            "peer",
            "route",
            "rule",
            "policy",
            "cloud",
            "datapath",
            "drain",
            "offloads",
            "metrics",
            "api",
        ],
    ),
    (
        "wireguard",
        &[
            "private_key_file",
            "addresses",
            "listen_port",
            "mtu",
            "device",
        ],
    ),
    (
        "tailnet",
        &[
            "control_url",
            "auth_key",
            "client_id",
            "hostname",
            "advertise_routes",
            "advertise_tags",
            "accept_routes",
            "accept_dns",
            "ephemeral",
            "static_endpoints",
            "port_mapping",
            "relay_server_port",
            "relay_server_static_endpoints",
            "state_dir",
            "ca",
        ],
    ),
    (
        "peer",
        &[
            "name",
            "public_key",
            "preshared_key_file",
            "allowed_ips",
            "endpoint",
            "keepalive",
        ],
    ),
    ("route", &["cidr", "snat", "mode"]),
    ("rule", &["from", "to", "protocols"]),
    ("policy", &["denied"]),
    (
        "cloud",
        &[
            "provider",
            "vpc_route_tables",
            "vpc_routes",
            "launch_hook",
            "termination_hook",
        ],
    ),
    (
        "datapath",
        &[
            "mode",
            "uplink",
            "uplink_guard",
            "subnet",
            "external_addresses",
            "underlay_mark",
            "handed_over_mark",
            "permitted_mark",
            "workers",
            "flows",
            "flows_per_source",
            "tcp_timeout",
            "tcp_transitory_timeout",
            "udp_timeout",
            "icmp_timeout",
        ],
    ),
    ("drain", &["timeout", "stop_timeout"]),
    ("offloads", &Offloads::NAMES),
    ("metrics", &["listen", "hosts"]),
    ("api", &["socket"]),
];

/// Sections that may stand more than once, as `[[peer]]`.
pub(super) const REPEATED: &[&str] = &["peer", "route", "rule"];

fn keys_of(section: &str) -> &'static [&'static str] {
    let found = SCHEMA.iter().find(|(name, _)| *name == section);
    found.map_or(&[], |(_, keys)| keys)
}

fn heading(section: &str) -> String {
    match section {
        "" => "the top of the file, above the first [section]".to_owned(),
        s if REPEATED.contains(&s) => format!("[[{s}]]"),
        s => format!("[{s}]"),
    }
}

/// A value and the byte offset where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) at: usize,
}

/// A text of the file.
pub(super) type Text<'i> = At<Cow<'i, str>>;

/// A text, or what else the key may hold.
pub(super) enum TextOr<'i, T> {
    Text(Text<'i>),
    Other(T),
}

/// A text as it may stand in a sentence: quoted, on one line, not endless.
pub(super) fn quoted(text: &str) -> String {
    const LONGEST: usize = 80;
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

/// A table of the file whose values are taken one by one.
pub(super) struct Section<'i> {
    name: &'static str,
    pub(super) at: usize,
    entries: DeTable<'i>,
}

impl<'i> Section<'i> {
    /// The whole configuration, whose file begins at byte `at`.
    pub(super) fn top(entries: DeTable<'i>, at: usize) -> Self {
        Self {
            name: "",
            at,
            entries,
        }
    }

    /// The key as messages name it, e.g. `wireguard.mtu`.
    pub(super) fn key(&self, key: &str) -> String {
        match self.name {
            "" => key.to_owned(),
            name => format!("{name}.{key}"),
        }
    }

    fn take(&mut self, key: &str) -> Option<Spanned<DeValue<'i>>> {
        debug_assert!(keys_of(self.name).contains(&key), "{key} is not in SCHEMA");
        self.entries.remove(key)
    }

    pub(super) fn text(&mut self, key: &str, problems: &mut Problems<'_>) -> Option<Text<'i>> {
        let value = self.take(key)?;
        text(&self.key(key), value, problems)
    }

    pub(super) fn integer(&mut self, key: &str, problems: &mut Problems<'_>) -> Option<At<i64>> {
        let value = self.take(key)?;
        let at = value.span().start;
        match integer(value.get_ref()) {
            Some(value) => Some(At { value, at }),
            None => {
                let message = match value.get_ref() {
                    DeValue::String(s) if s.parse::<i64>().is_ok() => {
                        format!("{} is text; write {s} without the quotes", quoted(s))
                    }
                    DeValue::Integer(i) => format!("{i} is too large a number"),
                    other => format!("{}, but a whole number is wanted", kind(other)),
                };
                problems.add(at, self.key(key), message);
                None
            }
        }
    }

    pub(super) fn boolean(&mut self, key: &str, problems: &mut Problems<'_>) -> Option<At<bool>> {
        let value = self.take(key)?;
        let at = value.span().start;
        if let Some(value) = value.get_ref().as_bool() {
            return Some(At { value, at });
        }
        let message = match value.get_ref() {
            DeValue::String(s) if matches!(s.as_ref(), "true" | "false") => {
                format!("{} is text; write {s} without the quotes", quoted(s))
            }
            other => format!("{}; write true or false", kind(other)),
        };
        problems.add(at, self.key(key), message);
        None
    }

    pub(super) fn texts(
        &mut self,
        key: &str,
        problems: &mut Problems<'_>,
    ) -> Option<At<Vec<Text<'i>>>> {
        let list = self.list(key, problems)?;
        let key = self.key(key);
        let texts = list.value.into_iter();
        Some(At {
            value: texts.filter_map(|v| text(&key, v, problems)).collect(),
            at: list.at,
        })
    }

    pub(super) fn list(
        &mut self,
        key: &str,
        problems: &mut Problems<'_>,
    ) -> Option<At<Vec<Spanned<DeValue<'i>>>>> {
        let value = self.take(key)?;
        let at = value.span().start;
        match value.into_inner() {
            DeValue::Array(list) => Some(At {
                value: list.into_iter().collect(),
                at,
            }),
            DeValue::String(s) => {
                let shown = quoted(&s);
                let message = format!("{shown} must be a list; write [{shown}]");
                problems.add(at, self.key(key), message);
                None
            }
            other => {
                let message = format!("{}, but a list is wanted; write [...]", kind(&other));
                problems.add(at, self.key(key), message);
                None
            }
        }
    }

    /// A value that may be a text (a word such as `auto`), else what `other` takes.
    pub(super) fn text_or<T>(
        &mut self,
        key: &str,
        problems: &mut Problems<'_>,
        other: impl FnOnce(&mut Self, &str, &mut Problems<'_>) -> Option<T>,
    ) -> Option<TextOr<'i, T>> {
        let value = self.entries.get(key)?;
        if value.get_ref().is_str() {
            self.text(key, problems).map(TextOr::Text)
        } else {
            other(self, key, problems).map(TextOr::Other)
        }
    }

    /// Whether `key` stands in the section.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Reports `key` if the section lacks it.
    pub(super) fn require(&self, key: &str, example: &str, problems: &mut Problems<'_>) {
        // A secret that stands inline is told where it stands.
        let inline = key
            .strip_suffix("_file")
            .is_some_and(|key| self.entries.contains_key(key));
        if !inline && !self.entries.contains_key(key) {
            problems.missing(self.at, self.key(key), format!("missing; write {example}"));
        }
    }

    /// A section that may stand once.
    pub(super) fn section(
        &mut self,
        name: &'static str,
        problems: &mut Problems<'_>,
    ) -> Option<Self> {
        let value = self.take(name)?;
        let at = value.span().start;
        match value.into_inner() {
            DeValue::Table(entries) => Some(Self { name, at, entries }),
            DeValue::Array(list) => {
                // The second heading is the one too many.
                let at = list.get(1).map_or(at, |second| second.span().start);
                let message = format!("stands once; write one [{name}] in single brackets");
                problems.add(at, name, message);
                None
            }
            other => {
                let message = format!("{}, but [{name}] is a section", kind(&other));
                problems.add(at, name, message);
                None
            }
        }
    }

    /// A section that may stand any number of times.
    pub(super) fn sections(
        &mut self,
        name: &'static str,
        problems: &mut Problems<'_>,
    ) -> Vec<Self> {
        let Some(value) = self.take(name) else {
            return Vec::new();
        };
        let at = value.span().start;
        let double = || format!("write [[{name}]] in double brackets, once for each {name}");
        let DeValue::Array(list) = value.into_inner() else {
            problems.add(at, name, double());
            return Vec::new();
        };
        let mut found = Vec::with_capacity(list.len());
        for item in list {
            let at = item.span().start;
            match item.into_inner() {
                DeValue::Table(entries) => found.push(Self { name, at, entries }),
                _ => problems.add(at, name, double()),
            }
        }
        found
    }

    /// Reports the keys that nobody took.
    pub(super) fn finish(self, problems: &mut Problems<'_>) {
        for key in self.entries.keys() {
            let word: &str = key.get_ref();
            let message = unknown(self.name, word);
            let shown = quoted(word);
            let plain = word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
            let name = if plain && !word.is_empty() {
                word
            } else {
                &shown
            };
            problems.add(key.span().start, self.key(name), message);
        }
    }
}

/// The sentence for a key that `section` does not have. Its value is never shown: it may be a key.
fn unknown(section: &str, word: &str) -> String {
    let lower = word.to_ascii_lowercase();
    let secret = match section {
        "" | "wireguard" if lower.replace('_', "") == "privatekey" => Some("private_key_file"),
        "peer" if lower.replace('_', "") == "presharedkey" => Some("preshared_key_file"),
        _ => None,
    };
    if let Some(file) = secret {
        return format!(
            "a secret does not stand in this file; put it in a file of its own with mode 600 and \
             name that in {file}"
        );
    }
    let known = keys_of(section);
    if let Some(meant) = suggest::nearest(word, known.iter().copied()) {
        return format!("unknown key; did you mean {meant}?");
    }
    let elsewhere = SCHEMA
        .iter()
        .find(|(name, keys)| *name != section && keys.contains(&lower.as_str()));
    if let Some((home, _)) = elsewhere {
        return format!("unknown key here; it belongs in {}", heading(home));
    }
    format!("unknown key; {} has {}", heading(section), known.join(", "))
}

pub(super) fn integer(value: &DeValue<'_>) -> Option<i64> {
    let integer = value.as_integer()?;
    i64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

/// A text, or a problem.
pub(super) fn text<'i>(
    key: &str,
    value: Spanned<DeValue<'i>>,
    problems: &mut Problems<'_>,
) -> Option<Text<'i>> {
    let at = value.span().start;
    let message = match value.into_inner() {
        DeValue::String(value) => return Some(At { value, at }),
        DeValue::Integer(i) => format!("{i} must stand in quotes; write \"{i}\""),
        DeValue::Float(f) => format!("{f} must stand in quotes; write \"{f}\""),
        DeValue::Boolean(b) => format!("{b} must stand in quotes; write \"{b}\""),
        other => format!("{}, but a text in quotes is wanted", kind(&other)),
    };
    problems.add(at, key.to_owned(), message);
    None
}

/// A whole number that must lie in `range`.
pub(super) fn within<T: TryFrom<i64>>(
    number: At<i64>,
    key: &'static str,
    range: std::ops::RangeInclusive<i64>,
    what: &str,
    problems: &mut Problems<'_>,
) -> Option<T> {
    if range.contains(&number.value) {
        return T::try_from(number.value).ok();
    }
    let (value, low, high) = (number.value, range.start(), range.end());
    let message = format!("{value} is no {what}; write a number from {low} to {high}");
    problems.add(number.at, key, message);
    None
}

fn kind(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(s) => format!("{} is text", quoted(s)),
        DeValue::Integer(i) => format!("{i} is a number"),
        DeValue::Float(f) => format!("{f} is no whole number"),
        DeValue::Boolean(b) => format!("{b} is a truth value"),
        DeValue::Datetime(d) => format!("{d} is a date"),
        DeValue::Array(_) => "this is a list".to_owned(),
        DeValue::Table(_) => "this is a section".to_owned(),
    }
}
