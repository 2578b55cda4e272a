//! The instance's user data as a layer of the configuration.
//!
//! Sluice's part is the whole text, or the one MIME part whose type is `text/x-sluice` or `application/toml`, so that
//! it goes together with cloud-init's parts. It is kept in the runtime directory: user data changes only while an
//! instance is stopped.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine as _;
use zeroize::Zeroizing;

use super::imds::{self, Imds};
use crate::files::{Existing, write_atomic};

/// Where it is kept.
pub const FILE: &str = "/run/sluice/user-data.toml";

/// Types of the part that is Sluice's.
const TYPES: [&str; 2] = ["text/x-sluice", "application/toml"];
/// How texts begin that are for others: scripts, and what cloud-init knows.
const OTHERS: [&str; 8] = [
    "#!",
    "#cloud-config",
    "#cloud-boothook",
    "#include",
    "#part-handler",
    "#upstart-job",
    "## template:",
    "<powershell>",
];
/// Between two tries at the start.
const AGAIN: Duration = Duration::from_millis(500);

/// User data that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The service has not told.
    #[error(transparent)]
    Imds(#[from] imds::Error),
    /// It is none that can be read.
    #[error("the user data of this instance is not used: {0}")]
    Unreadable(&'static str),
    /// It cannot be kept.
    #[error("the user data of this instance is not used, for it cannot be kept at {FILE}: {0}")]
    Unkept(io::Error),
}

/// Asks the service for the user data, and keeps Sluice's part at `path`. Whether there is one.
pub async fn bring(imds: &mut Imds, path: &Path) -> Result<bool, Error> {
    let found = imds.bytes("user-data").await?;
    let Some(text) = found.map(|bytes| ours(&bytes)).transpose()?.flatten() else {
        return Ok(false);
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(Error::Unkept)?;
    // It may hold secrets.
    write_atomic(path, text.as_bytes(), 0o600, Existing::Replace).map_err(Error::Unkept)?;
    tracing::info!("the configuration has a layer out of the instance's user data");
    Ok(true)
}

/// The same before anything else, for so long at most: early in a boot the network may not be there yet. Blocks.
pub fn bring_at_start(path: &Path, patience: Duration) -> Result<bool, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let until = Instant::now() + patience;
    runtime.block_on(async {
        let imds = Imds::from_environment(0).map_err(|error| error.to_string())?;
        let Some(mut imds) = imds else {
            return Ok(false);
        };
        loop {
            match bring(&mut imds, path).await {
                Ok(found) => return Ok(found),
                Err(Error::Imds(error)) if Instant::now() + AGAIN < until => {
                    tracing::debug!("user data: {error}");
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    })
}

/// Says something on the machine's console, where it is seen when nothing else of the machine is reached.
pub fn tell_console(text: &str) {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let console = fs::OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open("/dev/console");
    // Where there is none, the log has it all the same.
    if let Ok(mut console) = console {
        let _ = console.write_all(format!("sluice: {text}\r\n").as_bytes());
    }
}

/// Sluice's part of user data as the service gives it; `None` if all of it is for others. MIME by RFC 2045 and 2046.
pub fn ours(bytes: &[u8]) -> Result<Option<Zeroizing<String>>, Error> {
    if bytes.starts_with(&[0x1f, 0x8b]) {
        return Err(Error::Unreadable(
            "it is compressed; give it as plain text, of which an instance takes 16 KiB",
        ));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|_| Error::Unreadable("it is no UTF-8 text; save it as UTF-8"))?;
    let text = text.trim_start_matches('\u{feff}');
    if text.trim().is_empty() || OTHERS.iter().any(|start| text.starts_with(start)) {
        return Ok(None);
    }
    let (head, body) = split_head(text);
    let kind = head.iter().find(|(name, _)| name == "content-type");
    match kind {
        Some((_, kind)) if kind.to_ascii_lowercase().starts_with("multipart/") => {
            let boundary = boundary(kind).ok_or(Error::Unreadable(
                "it is MIME without a boundary; make it with `cloud-init devel make-mime` or the like",
            ))?;
            part(body, &boundary)
        }
        Some(_) => one_part(text),
        None => Ok(Some(Zeroizing::new(text.to_owned()))),
    }
}

/// The one part that is Sluice's.
fn part(body: &str, boundary: &str) -> Result<Option<Zeroizing<String>>, Error> {
    let mark = format!("--{boundary}");
    let mut parts: Vec<String> = Vec::new();
    let mut current: Option<String> = None;
    for line in body.split_inclusive('\n') {
        match line.trim_end().strip_prefix(mark.as_str()) {
            Some("" | "--") => {
                parts.extend(current.take());
                if line.trim_end() != mark {
                    break;
                }
                current = Some(String::new());
            }
            _ => {
                if let Some(current) = &mut current {
                    current.push_str(line);
                }
            }
        }
    }
    parts.extend(current);
    let mut found = None;
    for part in &parts {
        if let Some(text) = one_part(part)? {
            if found.is_some() {
                return Err(Error::Unreadable(
                    "two of its MIME parts are for Sluice; put them into one",
                ));
            }
            found = Some(text);
        }
    }
    Ok(found)
}

/// What is behind a head, if the head says that it is Sluice's.
fn one_part(text: &str) -> Result<Option<Zeroizing<String>>, Error> {
    let (head, body) = split_head(text);
    let value = |name: &str| {
        let found = head.iter().find(|(known, _)| known == name);
        found.map_or("", |(_, value)| value.as_str())
    };
    let kind = value("content-type").split(';').next().unwrap_or_default();
    if !TYPES.contains(&kind.trim().to_ascii_lowercase().as_str()) {
        return Ok(None);
    }
    match value("content-transfer-encoding")
        .to_ascii_lowercase()
        .as_str()
    {
        "" | "7bit" | "8bit" | "binary" => Ok(Some(Zeroizing::new(body.to_owned()))),
        "base64" => {
            let packed: String = body.chars().filter(|c| !c.is_ascii_whitespace()).collect();
            let bytes = base64::engine::general_purpose::STANDARD.decode(packed);
            let text = bytes.ok().and_then(|bytes| String::from_utf8(bytes).ok());
            text.map(|text| Some(Zeroizing::new(text)))
                .ok_or(Error::Unreadable(
                    "its MIME part for Sluice is no text in base64",
                ))
        }
        _ => Err(Error::Unreadable(
            "its MIME part for Sluice has an encoding other than 7bit, 8bit and base64",
        )),
    }
}

/// The fields of a MIME head (RFC 2045, 5322), names in lower case, and what is behind it. A text without one is
/// all body.
fn split_head(text: &str) -> (Vec<(String, String)>, &str) {
    let mut fields: Vec<(String, String)> = Vec::new();
    let mut rest = text;
    while let Some(line) = rest.split_inclusive('\n').next() {
        let behind = rest.get(line.len()..).unwrap_or_default();
        let trimmed = line.trim_end();
        if trimmed.is_empty() {
            return (fields, behind);
        }
        let continued = line.starts_with([' ', '\t']);
        match (continued, fields.last_mut(), trimmed.split_once(':')) {
            (true, Some((_, value)), _) => {
                value.push(' ');
                value.push_str(trimmed.trim());
            }
            (false, _, Some((name, value))) if is_name(name) => {
                fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
            _ => return (Vec::new(), text),
        }
        rest = behind;
    }
    (Vec::new(), text)
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
}

fn boundary(kind: &str) -> Option<String> {
    let mut parameters = kind.split(';').skip(1);
    parameters.find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        let value = value.trim().trim_matches('"');
        (name.trim().eq_ignore_ascii_case("boundary") && !value.is_empty())
            .then(|| value.to_owned())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn found(text: &str) -> Result<Option<String>, String> {
        ours(text.as_bytes())
            .map(|found| found.map(|text| text.to_string()))
            .map_err(|error| error.to_string())
    }

    const TOML: &str = "[tailnet]\nauth_key = \"ssm:/key\"\n";

    #[test]
    fn toml_alone_is_ours_and_scripts_are_not() {
        assert_eq!(found(TOML).unwrap().as_deref(), Some(TOML));
        // A comment is no script.
        let with_comment = format!("# a router\n{TOML}");
        assert_eq!(found(&with_comment).unwrap(), Some(with_comment));
        for text in ["", " \n", "#!/bin/sh\n", "#cloud-config\npackages: []\n"] {
            assert_eq!(found(text).unwrap(), None, "{text}");
        }
    }

    fn mime(parts: &[&str]) -> String {
        let mut text =
            "Content-Type: multipart/mixed;\n boundary=\"==b==\"\nMIME-Version: 1.0\n\n".to_owned();
        for part in parts {
            text += &format!("--==b==\n{part}");
        }
        text + "--==b==--\n"
    }

    #[test]
    fn one_part_of_mime_is_ours() {
        let script = "Content-Type: text/x-shellscript\n\n#!/bin/sh\n";
        let plain =
            format!("MIME-Version: 1.0\nContent-Type: text/x-sluice; charset=\"utf-8\"\n\n{TOML}");
        let packed = base64::engine::general_purpose::STANDARD.encode(TOML);
        let (first, last) = packed.split_at(20);
        let packed = format!(
            "Content-Type: application/toml\nContent-Transfer-Encoding: base64\n\n{first}\n{last}\n"
        );
        for part in [&plain, &packed] {
            let text = mime(&[script, part]);
            assert_eq!(found(&text).unwrap().as_deref(), Some(TOML), "{text}");
            let crlf = text.replace('\n', "\r\n");
            let got = found(&crlf).unwrap().unwrap();
            assert_eq!(got.replace("\r\n", "\n"), TOML, "{crlf}");
        }
        assert_eq!(found(&mime(&[script])).unwrap(), None);
        let error = found(&mime(&[&plain, &packed])).unwrap_err();
        assert!(error.contains("two of its MIME parts"), "{error}");
        let odd = plain
            .replace("charset", "x")
            .replace("\n\n", "\nContent-Transfer-Encoding: x-uu\n\n");
        assert!(found(&mime(&[&odd])).unwrap_err().contains("encoding"));
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        for (bytes, says) in [
            (&b"\x1f\x8b\x08"[..], "compressed"),
            (b"\xff\xfe", "UTF-8"),
            (b"Content-Type: multipart/mixed\n\n--b\n", "boundary"),
        ] {
            let error = ours(bytes).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
