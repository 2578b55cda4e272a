//! What commands ask of the router: joining and leaving a tailnet, and its settings there.

use serde::{Deserialize, Serialize};

use crate::config::{Changes, Login};

/// Longest order in bytes.
pub(super) const LONGEST: usize = 256 << 10;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "lowercase")]
pub enum Order {
    /// Take part in the tailnet, like this from now on.
    Up {
        /// What was said of the settings.
        changes: Changes,
        /// Settings that were not mentioned go back to their defaults.
        reset: bool,
        /// What lets the router in.
        login: Option<Login>,
        /// Log in anew, even if the node's key is good.
        force: bool,
    },
    /// Be like this from now on.
    Set {
        /// What was said of the settings.
        changes: Changes,
    },
    /// Log in anew.
    Login {
        /// What was said of the settings.
        changes: Changes,
        /// What lets the router in; `None`: the key of the settings, or a person.
        login: Option<Login>,
    },
    /// End the node's key.
    Logout,
    /// Take no part in the tailnet, but stay its node.
    Down,
}
