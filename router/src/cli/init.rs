//! `sluice init`: a configuration to start from, and a private key.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context as _, bail};
use zeroize::Zeroizing;

use crate::files::{Existing, write_atomic};
use crate::wireguard::keys::PrivateKey;

const TEMPLATE: &str = include_str!("init.toml");
const KEY_FILE: &str = "private.key";

/// Writes `sluice.toml` and `private.key` into `directory`, and tells what was done and what comes
/// next. A key that is there is used and never replaced.
pub(super) fn init(directory: &Path, force: bool) -> anyhow::Result<String> {
    let config = directory.join("sluice.toml");
    let key_file = directory.join(KEY_FILE);
    if !force && config.symlink_metadata().is_ok() {
        bail!(
            "{0} is there already; edit it, or run `sluice init --force` to replace it",
            config.display()
        );
    }
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;

    let mut told = String::new();
    let fresh = PrivateKey::generate()?;
    let line = Zeroizing::new(format!("{}\n", fresh.expose_base64()));
    let (key, done) = match write_atomic(&key_file, line.as_bytes(), 0o600, Existing::Keep) {
        Ok(()) => (fresh, "wrote"),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let text = Zeroizing::new(
                fs::read_to_string(&key_file)
                    .with_context(|| format!("read {}", key_file.display()))?,
            );
            let key = text
                .parse()
                .with_context(|| format!("{}", key_file.display()))?;
            (key, "kept")
        }
        Err(error) => return Err(error).context(format!("write {}", key_file.display())),
    };
    let _ = writeln!(told, "{done} {} (secret, mode 600)", key_file.display());

    let mut random = [0u8; 7];
    getrandom::fill(&mut random)?;
    let (v4, v6) = tunnel_addresses(random);
    let text = TEMPLATE
        .replace("@V4@", &v4.to_string())
        .replace("@V6@", &v6.to_string());
    let existing = if force {
        Existing::Replace
    } else {
        Existing::Keep
    };
    write_atomic(&config, text.as_bytes(), 0o644, existing)
        .with_context(|| format!("write {}", config.display()))?;
    let shown = config.display();
    let _ = write!(
        told,
        "wrote {shown}\n\
         public key of this router: {}\n\
         \n\
         Next:\n\
         1. name the networks behind this router in {shown}\n\
         2. sluice add-peer laptop --config {shown} --endpoint THIS_HOST:51820\n\
         3. sluice check-config {shown}\n\
         4. sluice run --config {shown}\n",
        key.public()
    );
    Ok(told)
}

/// Addresses that two routers hardly ever share, so that one machine can be a peer of both: a /24
/// of the shared address space (RFC 6598), which neither a VPC nor a home network uses, and a /64
/// of a unique local prefix (RFC 4193).
fn tunnel_addresses(random: [u8; 7]) -> (Ipv4Addr, Ipv6Addr) {
    let [a, b, id @ ..] = random;
    let v4 = Ipv4Addr::new(100, 64 | a & 63, b, 1);
    let mut bytes = [0u8; 16];
    bytes[0] = 0xfd;
    bytes[1..6].copy_from_slice(&id);
    bytes[15] = 1;
    (v4, bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn what_it_writes_is_valid_and_nothing_is_lost() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("new/sluice");
        let told = init(&directory, false).unwrap();
        let config = crate::config::load(&directory.join("sluice.toml")).unwrap();
        let public = config.private_key().unwrap().public().to_string();
        assert!(told.contains(&public), "{told}");
        assert!(!told.contains(&config.private_key().unwrap().expose_base64()));
        let mode = fs::metadata(directory.join(KEY_FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);

        fs::write(directory.join("sluice.toml"), "mine").unwrap();
        let error = init(&directory, false).unwrap_err().to_string();
        assert!(error.contains("--force"), "{error}");
        assert_eq!(
            fs::read_to_string(directory.join("sluice.toml")).unwrap(),
            "mine"
        );

        let told = init(&directory, true).unwrap();
        assert!(told.starts_with("kept "), "{told}");
        let again = crate::config::load(&directory.join("sluice.toml")).unwrap();
        assert_eq!(again.private_key().unwrap().public().to_string(), public);
    }

    #[test]
    fn tunnel_addresses_stay_in_their_ranges() {
        for byte in [0, 1, 0x7f, 0xff] {
            let (v4, v6) = tunnel_addresses([byte; 7]);
            let shared: ipnet::Ipv4Net = "100.64.0.0/10".parse().unwrap();
            assert!(shared.contains(&v4), "{v4}");
            assert!(v6.is_unique_local(), "{v6}");
        }
    }
}
