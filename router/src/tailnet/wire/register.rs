//! Registration: `tailcfg.RegisterRequest`, and the server's keys.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Hostinfo, wire};

/// Where the client shows that it may join. Never printed.
#[derive(
    Clone, Default, PartialEq, Serialize, Deserialize, zeroize::Zeroize, zeroize::ZeroizeOnDrop,
)]
#[serde(rename_all = "PascalCase")]
pub struct RegisterAuth {
    /// A pre-authentication key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth_key: Option<String>,
}

impl fmt::Debug for RegisterAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegisterAuth(..)")
    }
}

wire! {
    /// Asks to let a node key in, to extend nothing, or to end it.
    pub struct RegisterRequest {
        /// Capability version.
        pub version: u16,
        /// `nodekey:` to be let in.
        pub node_key: String,
        /// `nodekey:` that it replaces.
        pub old_node_key: String,
        /// The proof, where there is one.
        pub auth: RegisterAuth,
        /// When the key shall end; in the past: now. Only ever sooner.
        pub expiry: String,
        /// The URL that a person was sent to: the response waits until it was visited.
        pub followup: String,
        /// About the node.
        pub hostinfo: Hostinfo,
        /// The node goes when it is not connected.
        pub ephemeral: bool,
    }

    /// The answer.
    pub struct RegisterResponse {
        /// Owner of the node.
        pub user: User,
        /// How the owner has logged in.
        pub login: Login,
        /// Another node key is needed.
        pub node_key_expired: bool,
        /// An administrator has let the node in.
        pub machine_authorized: bool,
        /// Where a person must go; empty when the node is in.
        #[serde(rename = "AuthURL")]
        pub auth_url: String,
        /// Signature under tailnet lock, base64: to be signed anew for another key.
        pub node_key_signature: String,
        /// Why the node may not join. Fatal.
        pub error: String,
    }

    /// A user.
    pub struct User {
        /// Number.
        #[serde(rename = "ID")]
        pub id: i64,
        /// Name.
        pub display_name: String,
    }

    /// A login.
    pub struct Login {
        /// Number.
        #[serde(rename = "ID")]
        pub id: i64,
        /// Like an address of mail.
        pub login_name: String,
        /// Name.
        pub display_name: String,
    }
}

/// Answer of `/key?v=N`. The legacy key is of a protocol that nobody speaks any more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServerKeys {
    /// `mkey:` of the Noise handshake.
    pub public_key: Option<String>,
}
