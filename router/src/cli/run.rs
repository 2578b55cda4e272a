//! `sluice run`: who says the settings.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;

use super::DEFAULT_CONFIG;
use crate::cloud::detect::Provider;
use crate::cloud::user_data;
use crate::config::{self, Config, ConfigErrors, Preferences, Variables};
use crate::runtime::Settings;
use crate::tailnet::node::default_state_dir;

/// How long a start waits for user data that has nothing beside it; a service manager begins anew then.
const ALONE: Duration = Duration::from_secs(60);
/// The same where there is a configuration.
const BESIDE_OTHERS: Duration = Duration::from_secs(5);

/// `sluice run`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration file; /etc/sluice/sluice.toml if there is one. Where there is none, the environment
    /// of Tailscale's containers (TS_AUTHKEY, TS_ROUTES, ...) says the settings.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Wait for `sluice up`, and keep here what it says, without a configuration file.
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    state_dir: Option<PathBuf>,
}

/// Who rules: a file, the environment, or commands. Where two would, the daemon does not start.
pub(super) fn settings(args: &Args) -> anyhow::Result<Settings> {
    let (default_file, state) = (Path::new(DEFAULT_CONFIG), default_state_dir());
    let variables = config::variables();
    if !takes_user_data(args, &variables, default_file) || !bring_user_data(default_file, &state)? {
        return choose(args, &variables, default_file, &state);
    }
    if let Err(errors) = config::load(default_file) {
        user_data::tell_console(&errors.to_string());
        return Err(errors.into());
    }
    Ok(Settings::File(default_file.to_owned()))
}

/// Whether the instance's user data would be a layer of the configuration.
fn takes_user_data(args: &Args, variables: &Variables, default_file: &Path) -> bool {
    let named = args.config.as_deref();
    args.state_dir.is_none()
        && named.is_none_or(|named| named == default_file)
        && config::joining(variables).is_empty()
        && Provider::Auto.is_aws()
}

/// Brings the user data of this instance. Whether there is some. What else says a configuration is not kept waiting:
/// then the daemon goes on asking.
fn bring_user_data(default_file: &Path, default_state: &Path) -> anyhow::Result<bool> {
    let path = Path::new(user_data::FILE);
    if path.exists() {
        return Ok(true);
    }
    let config = config::load(default_file);
    if config
        .as_ref()
        .is_ok_and(|config| !config.cloud.provider.is_aws())
    {
        return Ok(false);
    }
    let lack = lack(&config, default_file, default_state);
    let patience = if lack.is_some() { ALONE } else { BESIDE_OTHERS };
    match (user_data::bring_at_start(path, patience), lack) {
        (Ok(found), _) => Ok(found),
        (Err(error), Some(lack)) => {
            let text = format!("{lack}, and the user data cannot be had: {error}");
            user_data::tell_console(&text);
            bail!(text)
        }
        (Err(error), None) => {
            tracing::warn!("the user data is not there yet: {error}");
            Ok(false)
        }
    }
}

/// Why the router cannot run without user data; `None`: it can. What is wrong with a file may be what the user data
/// makes whole, or a mistake.
fn lack(
    config: &Result<Config, ConfigErrors>,
    default_file: &Path,
    default_state: &Path,
) -> Option<String> {
    let errors = config.as_ref().err()?;
    if config::is_there(default_file) {
        return Some(format!(
            "the configuration alone does not say how to run here ({errors})"
        ));
    }
    let commanded = Preferences::exist(default_state);
    (!commanded).then(|| "nothing but the user data can say how to run here".to_owned())
}

fn choose(
    args: &Args,
    variables: &Variables,
    default_file: &Path,
    default_state: &Path,
) -> anyhow::Result<Settings> {
    let joining = config::joining(variables);
    let named = joining.join(", ");
    let file = args.config.clone().or_else(|| {
        let there = args.state_dir.is_none() && config::is_there(default_file);
        there.then(|| default_file.to_owned())
    });
    if let Some(file) = file {
        if !joining.is_empty() {
            if config::load(&file)?.tailnet.is_some() {
                bail!(
                    "{} has [tailnet], and the environment would have the router join a tailnet too ({named}): \
                     one of both can rule; unset the variables, or take the file away",
                    file.display()
                );
            }
            tracing::warn!(
                "{named} in the environment does nothing: {} rules, and has no [tailnet]",
                file.display()
            );
        }
        return Ok(Settings::File(file));
    }
    if let Some(state_dir) = &args.state_dir {
        if !joining.is_empty() {
            bail!(
                "--state-dir has the router wait for `sluice up`, and the environment would have it join a tailnet \
                 ({named}): one of both can rule; unset the variables, or leave --state-dir out and set TS_STATE_DIR"
            );
        }
        return Ok(Settings::Commands(state_dir.clone()));
    }
    if !joining.is_empty() {
        let environment = config::read_environment(variables)?;
        let kept = environment.config.tailnet.as_ref();
        if kept.is_some_and(|settings| Preferences::exist(&settings.state_dir)) {
            tracing::warn!(
                "what `sluice up` has said before does nothing: the environment rules ({named})"
            );
        }
        for note in &environment.notes {
            tracing::warn!("{note}");
        }
        return Ok(Settings::Environment(Box::new(environment)));
    }
    if Preferences::exist(default_state) {
        return Ok(Settings::Commands(default_state.to_owned()));
    }
    bail!(
        "nothing says how to run: {} does not exist (`sluice init` makes one), and TS_AUTHKEY and the like are not set; \
         or run `sluice run --state-dir {}` and say it with `sluice up`",
        default_file.display(),
        default_state.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_user_data_must_say_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path();
        let plain = config::tests::directory_with_keys();
        let file = plain.path().join("sluice.toml");
        let lack = |state: &Path| lack(&config::load(&file), &file, state);
        let alone = lack(state).unwrap();
        assert!(alone.contains("nothing but the user data"), "{alone}");
        // A mistake is told, and is none of the preferences'.
        std::fs::write(&file, "[metrics]\nlisten = \"nowhere\"\n").unwrap();
        let wrong = lack(state).unwrap();
        assert!(
            wrong.contains("sluice.toml:2:10: metrics.listen: "),
            "{wrong}"
        );
        Preferences::default().save(state).unwrap();
        assert!(lack(state).is_some());
        std::fs::remove_file(&file).unwrap();
        assert_eq!(lack(state), None);
        std::fs::write(&file, config::tests::EXAMPLE).unwrap();
        assert_eq!(lack(folder.path().join("none").as_path()), None);
    }

    #[test]
    fn one_rules() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing.toml");
        let joins = folder.path().join("joins.toml");
        std::fs::write(&joins, "[tailnet]\nstate_dir = \"/x\"\n").unwrap();
        let plain = config::tests::directory_with_keys();
        let file = plain.path().join("sluice.toml");
        std::fs::write(&file, config::tests::EXAMPLE).unwrap();
        let set = Variables::from([("TS_AUTHKEY".to_owned(), "tskey-auth-x".to_owned())]);
        let none = Variables::new();
        let state = folder.path();
        let args = |config: Option<&Path>, state_dir: Option<&Path>| Args {
            config: config.map(Path::to_owned),
            state_dir: state_dir.map(Path::to_owned),
        };
        let asked = args(None, None);
        let choose = |args: &Args, variables: &Variables, default: &Path| {
            choose(args, variables, default, state)
        };

        assert!(matches!(
            choose(&asked, &none, &joins),
            Ok(Settings::File(_))
        ));
        assert!(matches!(
            choose(&asked, &set, &missing),
            Ok(Settings::Environment(_))
        ));
        // A drop-in alone is a configuration, too.
        let layered = folder.path().join("layered.toml");
        std::fs::create_dir(layered.with_extension("d")).unwrap();
        std::fs::copy(&joins, layered.with_extension("d").join("10.toml")).unwrap();
        assert!(matches!(
            choose(&asked, &none, &layered),
            Ok(Settings::File(found)) if found == layered
        ));
        // A file without [tailnet] rules, and the variables do nothing.
        assert!(matches!(choose(&asked, &set, &file), Ok(Settings::File(_))));
        let named = args(Some(&missing), None);
        assert!(
            matches!(choose(&named, &none, &joins), Ok(Settings::File(found)) if found == missing)
        );
        let waits = args(None, Some(state));
        assert!(matches!(
            choose(&waits, &none, &joins),
            Ok(Settings::Commands(_))
        ));
        for (args, variables, default) in [(&asked, &set, &joins), (&waits, &set, &missing)] {
            let error = choose(args, variables, default).unwrap_err().to_string();
            assert!(
                error.contains("TS_AUTHKEY") && error.contains("one of both"),
                "{error}"
            );
        }
        let error = choose(&asked, &none, &missing).unwrap_err().to_string();
        assert!(
            error.contains("sluice init") && error.contains("sluice up"),
            "{error}"
        );
        Preferences::default().save(state).unwrap();
        assert!(matches!(
            choose(&asked, &none, &missing),
            Ok(Settings::Commands(_))
        ));
    }
}
