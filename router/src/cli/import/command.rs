//! Commands of a wg-quick file. None is run; `wg set` of the device in PostUp is read instead, for
//! that is how keys are kept out of the file.

use std::path::Path;

use super::Note;
use super::conf::note;
use super::values::{Entry, Interface, Peer, Secret, number, parsed, shown};
use crate::wireguard::keys::PublicKey;

/// What becomes of a command's purpose.
pub(super) fn purpose(value: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| value.contains(word));
    if has(&["MASQUERADE", "masquerade", "SNAT", "snat"]) {
        "the command is left out: a [[route]] with snat = true translates sources"
    } else if has(&["ip_forward", "forwarding", "FORWARD", "forward"]) {
        "the command is left out: Sluice lets packets through between the tunnel and its routes"
    } else if has(&["TCPMSS", "maxseg"]) {
        "the command is left out: Sluice sets the MSS by itself"
    } else if has(&["ip route", "ip -4 route", "ip -6 route", "ip rule"]) {
        "the command is left out: Sluice routes allowed_ips into the tunnel and each [[route]] out \
         of it"
    } else {
        "the command is left out: Sluice runs none; if it is still needed, have systemd run it \
         (ExecStartPost= of sluice.service)"
    }
}

/// A word of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Word {
    text: String,
    /// Whether only a shell could tell what it stands for.
    opaque: bool,
}

/// Takes what PostUp's `text` sets of the device and its peers, or leaves the command out. The error
/// is for what sets them in a way that cannot be read.
pub(super) fn apply(
    at: usize,
    order: usize,
    text: &str,
    device: Option<&str>,
    interface: &mut Interface,
    peers: &mut Vec<Peer>,
) -> Result<Note, String> {
    const ELSEWHERE: &str = "Sluice runs no command, and what this one sets with wg it cannot read; \
                             write it into [Interface] and [Peer], or as wg set %i private-key \
                             FILE and wg set %i peer KEY preshared-key FILE";
    let commands = split(&text.replace("%i", device.unwrap_or("%i")));
    let (mut taken, mut elsewhere) = (0, 0);
    for command in &commands {
        let mut words = command.as_slice();
        while let [first, rest @ ..] = words
            && matches!(first.text.as_str(), "sudo" | "command" | "exec")
        {
            words = rest;
        }
        let [program, verb, rest @ ..] = words else {
            continue;
        };
        if program.text.rsplit('/').next() != Some("wg") {
            continue;
        }
        match (verb.text.as_str(), rest) {
            ("set", [name, rest @ ..]) if name.text == device.unwrap_or("%i") => {
                set(at, order, rest, interface, peers)?;
                taken += 1;
            }
            // Another device's.
            ("set", [name, ..]) if !name.opaque => elsewhere += 1,
            ("set" | "setconf" | "addconf" | "syncconf", _) => return Err(ELSEWHERE.to_owned()),
            _ => {}
        }
    }
    if taken == commands.len() {
        let text = "the command is not run; what it sets stands in sluice.toml";
        return Ok(note(at, text));
    }
    if taken + elsewhere == 0 && sets_somehow(text) {
        return Err(ELSEWHERE.to_owned());
    }
    let rest = purpose(text);
    Ok(note(
        at,
        match taken {
            0 => rest.to_owned(),
            _ => format!("what wg sets here stands in sluice.toml; of the rest, {rest}"),
        },
    ))
}

/// Whether `wg set` and its kin stand in a text deeper than [`split`] sees, for this device or one
/// that is not named.
fn sets_somehow(text: &str) -> bool {
    let mut words = text
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-')
        .filter(|word| !word.is_empty())
        .peekable();
    while let Some(word) = words.next() {
        let next = words.peek().copied();
        if word == "wg" && matches!(next, Some("set" | "setconf" | "addconf" | "syncconf")) {
            return true;
        }
    }
    false
}

/// Parts a line for the shell into simple commands, and these into words.
fn split(text: &str) -> Vec<Vec<Word>> {
    let mut commands = Vec::new();
    let mut command = Vec::new();
    let mut word: Option<Word> = None;
    let mut quote = None;
    let mut chars = text.chars();
    let current = |word: &mut Option<Word>, c: Option<char>, opaque: bool| {
        let word = word.get_or_insert(Word {
            text: String::new(),
            opaque: false,
        });
        word.text.extend(c);
        word.opaque |= opaque;
    };
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some('\''), c) => current(&mut word, Some(c), false),
            (_, '\\') => current(&mut word, chars.next(), false),
            (Some(_), c) => current(&mut word, Some(c), "$`".contains(c)),
            (None, '\'' | '"') => {
                quote = Some(c);
                current(&mut word, None, false);
            }
            (None, ';' | '&' | '|') => {
                command.extend(word.take());
                commands.push(std::mem::take(&mut command));
            }
            (None, c) if c.is_whitespace() => command.extend(word.take()),
            (None, c) => current(&mut word, Some(c), "$`<>(){}*?~[".contains(c)),
        }
    }
    command.extend(word);
    commands.push(command);
    commands.retain(|command| !command.is_empty());
    commands
}

/// The words after `wg set DEVICE`, as wg(8) reads them.
fn set(
    at: usize,
    order: usize,
    words: &[Word],
    interface: &mut Interface,
    peers: &mut Vec<Peer>,
) -> Result<(), String> {
    let mut notes = Vec::new();
    let mut peer: Option<usize> = None;
    let mut words = words.iter();
    while let Some(key) = words.next() {
        if key.text == "remove" && peer.is_some() {
            if let Some(peer) = peer.take() {
                peers.remove(peer);
            }
            continue;
        }
        let value = words.next();
        let Some(value) = value.filter(|value| !value.opaque && !key.opaque) else {
            return Err(format!(
                "Sluice runs no command, so it cannot tell the value of {}; put a secret into a \
                 file of its own (mode 600) and write that file's path, anything else as it is",
                shown(&key.text)
            ));
        };
        let text = value.text.as_str();
        let entry = |key| Entry {
            line: at,
            key,
            value: text,
        };
        match (key.text.as_str(), peer.and_then(|peer| peers.get_mut(peer))) {
            ("private-key", None) => interface.private_key = Some(Secret::File(at, path(text)?)),
            ("listen-port", None) => {
                interface.listen_port = Some(number(text)?).filter(|port| *port > 0);
            }
            ("fwmark", None) => interface.entry(entry("fwmark"), &mut notes)?,
            ("peer", _) => {
                let key: PublicKey = parsed(text)?;
                let known = peers.iter().position(|peer| peer.public_key == Some(key));
                peer = Some(known.unwrap_or_else(|| {
                    let mut new = Peer::new(at, None);
                    new.public_key = Some(key);
                    peers.push(new);
                    peers.len() - 1
                }));
            }
            ("preshared-key", Some(peer)) => {
                peer.preshared_key = Some(Secret::File(at, path(text)?));
            }
            ("allowed-ips", Some(peer)) => {
                if !text.contains(['+', '-']) {
                    peer.allowed_ips.clear();
                }
                peer.entry(entry("allowedips"), order, &mut notes)?;
            }
            ("endpoint", Some(peer)) => peer.entry(entry("endpoint"), order, &mut notes)?,
            ("persistent-keepalive", Some(peer)) => {
                peer.entry(entry("persistentkeepalive"), order, &mut notes)?;
            }
            // A secret that stands where it should not has more characters.
            _ if key.text.len() < 24 => {
                return Err(format!("{} is no word of wg set here", shown(&key.text)));
            }
            _ => return Err("there is something that wg set does not take".to_owned()),
        }
    }
    match notes.into_iter().next() {
        Some(note) => Err(format!("{}; take that out of the command", note.text)),
        None => Ok(()),
    }
}

fn path(text: &str) -> Result<String, String> {
    if Path::new(text).is_absolute() {
        Ok(text.to_owned())
    } else {
        // Not shown: it may be the key itself.
        Err("the file of a key must be named from / on; write its whole path".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(text: &str) -> Vec<Vec<String>> {
        let shown = |word: Word| {
            let mark = if word.opaque { "?" } else { "" };
            format!("{}{mark}", word.text)
        };
        let command = |command: Vec<Word>| command.into_iter().map(shown).collect();
        split(text).into_iter().map(command).collect()
    }

    #[test]
    fn a_line_is_parted_as_a_shell_does() {
        assert_eq!(
            words(r#"wg set wg0 private-key "/a b/c" ; echo 'x;y' && z \; "$HOME""#),
            [
                vec!["wg", "set", "wg0", "private-key", "/a b/c"],
                vec!["echo", "x;y"],
                vec!["z", ";", "$HOME?"],
            ]
        );
        assert_eq!(
            words("wg set wg0 private-key <(pass wg)"),
            [vec!["wg", "set", "wg0", "private-key", "<(pass?", "wg)?"]]
        );
        assert_eq!(words("  ;; && "), Vec::<Vec<String>>::new());
        assert_eq!(words("a ''"), [["a", ""]]);
    }

    proptest! {
        #[test]
        fn any_line_is_parted(text in "\\PC{0,60}|[wgset%i '\"\\\\;&|$]{0,40}") {
            split(&text);
            let _ = apply(1, 1, &text, Some("wg0"), &mut Interface::default(), &mut Vec::new());
        }
    }
}
