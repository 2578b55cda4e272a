//! `genkey`, `genpsk` and `pubkey`, with the output and the complaints of wg(8).

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;

use anyhow::bail;
use zeroize::Zeroizing;

use crate::wireguard::keys::{PresharedKey, PrivateKey};

/// Length of a key in base64.
const KEY: usize = 44;

pub(super) fn genkey() -> anyhow::Result<()> {
    warn_if_world_accessible();
    let key = PrivateKey::generate()?;
    print_secret(key.expose_base64())
}

pub(super) fn genpsk() -> anyhow::Result<()> {
    warn_if_world_accessible();
    let key = PresharedKey::generate()?;
    print_secret(key.expose_base64())
}

pub(super) fn pubkey() -> anyhow::Result<()> {
    let mut input = Zeroizing::new(Vec::with_capacity(4096));
    io::stdin().lock().take(4096).read_to_end(&mut input)?;
    super::print(&format!("{}\n", public_key(&input)?))
}

/// The public key of a private key in base64 that only white space may follow.
fn public_key(input: &[u8]) -> anyhow::Result<String> {
    let malformed = "Key is not the correct length or format";
    let Some((key, rest)) = input.split_at_checked(KEY) else {
        bail!(malformed);
    };
    if !rest.trim_ascii().is_empty() {
        bail!("Trailing characters found after key");
    }
    match std::str::from_utf8(key).ok().and_then(|key| {
        let exact = key.trim() == key;
        key.parse::<PrivateKey>().ok().filter(|_| exact)
    }) {
        Some(key) => Ok(key.public().to_string()),
        None => bail!(malformed),
    }
}

fn print_secret(key: String) -> anyhow::Result<()> {
    let mut line = Zeroizing::new(key);
    line.push('\n');
    super::print(&line)
}

/// Warns if standard output is a file that others may open.
pub(super) fn warn_if_world_accessible() {
    let stdout = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    let Ok(metadata) = stdout.and_then(|stdout| stdout.metadata()) else {
        return;
    };
    if metadata.is_file() && metadata.mode() & 0o007 != 0 {
        eprintln!(
            "Warning: writing to world accessible file.\n\
             Consider setting the umask to 077 and trying again."
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pubkey_takes_what_wg_takes() {
        // RFC 7748 section 6.1, Alice.
        let private = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
        let public = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
        for input in [
            private.to_owned(),
            format!("{private}\n"),
            format!("{private} \n\n\t"),
        ] {
            assert_eq!(public_key(input.as_bytes()).unwrap(), public);
        }
        for (input, says) in [
            (String::new(), "Key is not"),
            (private[..43].to_owned(), "Key is not"),
            (format!(" {}", &private[..43]), "Key is not"),
            (private.replace('=', "A"), "Key is not"),
            (format!(" {private}"), "Trailing characters"),
            (format!("{private}x"), "Trailing characters"),
        ] {
            let error = public_key(input.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(says), "{input:?}: {error}");
        }
    }
}
