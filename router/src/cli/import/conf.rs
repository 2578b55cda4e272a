//! Translates a wg-quick(8) file.
//!
//! What `wg setconf <(wg-quick strip FILE)` takes is taken, or refused by line: the rules are those of
//! wireguard-tools, `src/config.c` and `src/wg-quick/linux.bash`. wg takes all blanks out of a line,
//! wg-quick only those around key and value; names of keys have no case; a later value replaces the
//! one before, but for AllowedIPs, which gather.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

use zeroize::Zeroizing;

use super::values::{Entry, Interface, Peer};
use super::{Note, command, written};
use crate::wireguard::keys::PublicKey;

/// Longest name taken from a comment, in characters.
const LONGEST_NAME: usize = 60;

/// The keys of [Interface] that wg-quick takes for itself, in lower case.
const OF_WG_QUICK: [&str; 9] = [
    "address",
    "mtu",
    "dns",
    "table",
    "preup",
    "postup",
    "predown",
    "postdown",
    "saveconfig",
];

/// What becomes of a file.
#[derive(Debug)]
pub(super) struct Imported {
    /// The text of `sluice.toml`.
    pub(super) toml: String,
    /// Key files by name, with their keys in base64.
    pub(super) keys: Vec<(String, Zeroizing<String>)>,
    /// Key files that the text names, by the line that named them.
    pub(super) files: Vec<(usize, PathBuf)>,
    /// What was left out or changed, by line.
    pub(super) notes: Vec<Note>,
}

/// Reads a file; `stem` is its name without the end, which wg-quick takes for the device's. The
/// error is what keeps it from being a file of wg-quick at all.
pub(super) fn read(bytes: &[u8], stem: Option<&str>) -> Result<Imported, Vec<Note>> {
    let mut reader = Reader::default();
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut lines = 0;
    for line in bytes.split(|byte| *byte == b'\n') {
        lines += 1;
        let line = Zeroizing::new(decode(line).into_owned());
        reader.line(lines, &line);
    }
    let Reader {
        started,
        mut interface,
        peers,
        mut notes,
        mut problems,
        ..
    } = reader;
    for peer in peers.iter().filter(|peer| peer.public_key.is_none()) {
        let text = "[Peer]: has no PublicKey; add that line, or remove this block";
        problems.push(note(peer.line, text));
    }
    let mut peers = merge(peers, &mut notes);
    // wg-quick runs them when the rest is in force, in their order.
    for (at, text) in std::mem::take(&mut interface.commands) {
        let order = lines + at;
        let done = command::apply(at, order, &text, stem, &mut interface, &mut peers);
        match done {
            Ok(note) => notes.push(note),
            Err(text) => problems.push(note(at, format!("PostUp: {text}"))),
        }
    }
    if interface.private_key.is_none() {
        let text = match started {
            Some(_) if problems.is_empty() => {
                "[Interface] has no PrivateKey, and no PostUp = wg set %i private-key FILE; add one \
                 of them"
            }
            Some(_) => "[Interface] has no PrivateKey",
            None => "there is no [Interface] with a PrivateKey; is it a file of wg-quick?",
        };
        problems.push(note(started.unwrap_or(1), text));
    }
    if !problems.is_empty() {
        problems.sort_by_key(|note| note.line);
        return Err(problems);
    }
    Ok(written::write(&interface, peers, stem, notes))
}

/// The text of a line: UTF-8, else Latin-1, in which old editors wrote. Bash, which reads the file for
/// wg-quick, leaves zero bytes out.
fn decode(line: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(line) {
        Ok(text) if !line.contains(&0) => Cow::Borrowed(text),
        Ok(text) => Cow::Owned(text.replace('\0', "")),
        Err(_) => {
            let bytes = line.iter().filter(|byte| **byte != 0);
            Cow::Owned(bytes.map(|byte| char::from(*byte)).collect())
        }
    }
}

pub(super) fn note(line: usize, text: impl Into<String>) -> Note {
    Note {
        line,
        text: text.into(),
    }
}

/// Makes one of the peers that have the same key, as the kernel does: what a later block says
/// replaces what the former said, AllowedIPs always.
fn merge(peers: Vec<Peer>, notes: &mut Vec<Note>) -> Vec<Peer> {
    let mut places: HashMap<PublicKey, usize> = HashMap::new();
    let mut merged: Vec<Peer> = Vec::new();
    for peer in peers {
        let place = peer.public_key.and_then(|key| {
            let place = *places.entry(key).or_insert(merged.len());
            merged.get_mut(place)
        });
        match place {
            Some(former) => {
                let text = format!(
                    "this [Peer] has the key of the one in line {}: they are one peer, with the \
                     AllowedIPs that stand here",
                    former.line
                );
                notes.push(note(peer.line, text));
                former.replace(peer);
            }
            None => merged.push(peer),
        }
    }
    merged
}

#[derive(Default)]
struct Reader {
    section: Section,
    /// The line of the first [Interface].
    started: Option<usize>,
    /// The comment of the line before.
    comment: Option<String>,
    interface: Interface,
    peers: Vec<Peer>,
    notes: Vec<Note>,
    problems: Vec<Note>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Section {
    #[default]
    None,
    Interface,
    Peer,
}

impl Reader {
    fn line(&mut self, at: usize, line: &str) {
        let (words, comment) = match line.split_once('#') {
            Some((words, comment)) => (words.trim(), named(comment)),
            None => (line.trim(), None),
        };
        let before = std::mem::replace(&mut self.comment, comment);
        if words.is_empty() {
            // A comment right after `[Peer]` names it too.
            if let (Some(peer), Some(name)) = (self.peers.last_mut(), &self.comment)
                && peer.line + 1 == at
                && peer.name.is_none()
            {
                peer.name = Some(name.clone());
            }
            return;
        }
        let bare = bare(words);
        if bare.starts_with('[') {
            self.section = match bare.to_ascii_lowercase().as_str() {
                "[interface]" => {
                    self.started.get_or_insert(at);
                    Section::Interface
                }
                "[peer]" => {
                    let name = self.comment.take().or(before);
                    self.peers.push(Peer::new(at, name));
                    Section::Peer
                }
                _ => {
                    let text = format!("{words} is no section of wg-quick");
                    self.problems.push(note(at, text));
                    Section::None
                }
            };
            return;
        }
        let (Some((key, value)), Some((bare_key, bare_value))) =
            (words.split_once('='), bare.split_once('='))
        else {
            let text = "there is no `Key = value` here; is it a file of wg-quick?";
            self.problems.push(note(at, text));
            return;
        };
        let key = key.trim();
        let (lower, bare_lower) = (key.to_ascii_lowercase(), bare_key.to_ascii_lowercase());
        let bare = Entry {
            line: at,
            key: &bare_lower,
            value: bare_value,
        };
        let notes = &mut self.notes;
        let done = match (self.section, self.peers.last_mut()) {
            (Section::Interface, _) if OF_WG_QUICK.contains(&&*lower) => {
                let entry = Entry {
                    line: at,
                    key: &lower,
                    value: value.trim(),
                };
                self.interface.of_wg_quick(entry, notes)
            }
            (Section::Interface, _) => self.interface.entry(bare, notes),
            (Section::Peer, Some(peer)) => peer.entry(bare, at, notes),
            _ => Err("stands before [Interface]".to_owned()),
        };
        if let Err(text) = done {
            self.problems.push(note(at, format!("{key}: {text}")));
        }
    }
}

/// A line as wg sees it.
fn bare(words: &str) -> Zeroizing<String> {
    let mut bare = Zeroizing::new(String::with_capacity(words.len()));
    bare.extend(words.chars().filter(|c| !c.is_whitespace()));
    bare
}

/// A name out of a comment, as people and other programs write it.
fn named(comment: &str) -> Option<String> {
    let mut name = comment.trim_start_matches('#').trim();
    for start in ["BEGIN_PEER ", "Client ", "Name ", "friendly_name", "Name:"] {
        name = name.strip_prefix(start).map_or(name, str::trim_start);
    }
    name = name.trim_start_matches(['=', ':']).trim();
    let whole = !name.is_empty()
        && name.chars().count() <= LONGEST_NAME
        && !name.contains(char::is_control)
        && name != "*"
        // A line that was commented out, or a network.
        && !name.contains(['=', '/']);
    whole.then(|| name.to_owned())
}
