//! What requests are signed with: from the environment, else the instance's role.

use std::env;
use std::fmt;

use serde::Deserialize;
use zeroize::Zeroizing;

use crate::cloud::imds::{self, Imds};
use crate::tailnet::time::Timestamp;

/// Keys that sign requests. A role's are good for some hours.
#[derive(Clone)]
pub struct Credentials {
    /// Names the key.
    pub id: String,
    /// The key.
    pub secret: Zeroizing<String>,
    /// Goes with a role's key.
    pub session: Option<Zeroizing<String>>,
    /// The end of the key, if it has one.
    pub until: Option<Timestamp>,
    /// Whose they are, for sentences: the role, or the environment.
    pub owner: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials of {}", self.owner)
    }
}

/// Why there are no credentials.
#[derive(Debug, thiserror::Error)]
pub enum NoCredentials {
    /// The service cannot be asked.
    #[error(transparent)]
    Imds(#[from] imds::Error),
    /// There is no service to be asked, and why.
    #[error("there are no credentials: {0}")]
    NoService(String),
    /// No role.
    #[error(
        "the instance has no role, so nothing can be asked of AWS; give its launch template an instance profile \
         (deploy/aws has one)"
    )]
    NoRole,
    /// The service has none for the role.
    #[error("the metadata service has no credentials for the role {role}: {what}")]
    Role {
        /// The role.
        role: String,
        /// What it says.
        what: String,
    },
}

/// What stands at `iam/security-credentials/<role>`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    code: Option<String>,
    access_key_id: Option<String>,
    secret_access_key: Option<Zeroizing<String>>,
    token: Option<Zeroizing<String>>,
    expiration: Option<String>,
}

impl Credentials {
    /// Those of the environment, by the names that every SDK knows.
    pub fn of_environment() -> Option<Self> {
        let value = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        Some(Self {
            id: value("AWS_ACCESS_KEY_ID")?,
            secret: Zeroizing::new(value("AWS_SECRET_ACCESS_KEY")?),
            session: value("AWS_SESSION_TOKEN").map(Zeroizing::new),
            until: None,
            owner: "the environment".to_owned(),
        })
    }

    /// Those of the instance's role.
    pub async fn of_role(imds: &mut Imds) -> Result<Self, NoCredentials> {
        const FOLDER: &str = "meta-data/iam/security-credentials/";
        let roles = imds.get(FOLDER).await?.unwrap_or_default();
        let role = roles.lines().next().unwrap_or_default().trim().to_owned();
        if role.is_empty() {
            return Err(NoCredentials::NoRole);
        }
        let text = imds.get(&format!("{FOLDER}{role}")).await?;
        let text = Zeroizing::new(text.unwrap_or_default());
        Self::read(&text, &role)
    }

    fn read(text: &str, role: &str) -> Result<Self, NoCredentials> {
        // Not the parser's words, which may quote a value.
        let none = |what: &str| NoCredentials::Role {
            role: role.to_owned(),
            what: what.to_owned(),
        };
        let answer: Answer =
            serde_json::from_str(text).map_err(|_| none("the answer is no JSON of that kind"))?;
        if let Some(code) = answer.code.filter(|code| code != "Success") {
            return Err(none(&code));
        }
        let until = answer.expiration.as_deref();
        let until =
            until.map(|text| Timestamp::parse(text).ok_or_else(|| none("their end is no time")));
        Ok(Self {
            id: answer
                .access_key_id
                .ok_or_else(|| none("there is no key id"))?,
            secret: answer
                .secret_access_key
                .ok_or_else(|| none("there is no key"))?,
            session: answer.token,
            until: until.transpose()?,
            owner: format!("the role {role}"),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_roles_credentials_are_read_and_never_shown() {
        let text = r#"{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"ASIAX","SecretAccessKey":"geheim",
            "Token":"zeichen","Expiration":"2026-11-30T12:00:00Z","LastUpdated":"2026-11-30T06:00:00Z"}"#;
        let found = Credentials::read(text, "router").unwrap();
        assert_eq!(
            (found.id.as_str(), found.secret.as_str()),
            ("ASIAX", "geheim")
        );
        assert_eq!(found.until, Timestamp::parse("2026-11-30T12:00:00Z"));
        assert_eq!(format!("{found:?}"), "Credentials of the role router");
        for (text, says) in [
            (
                r#"{"Code":"AssumeRoleUnauthorizedAccess"}"#,
                "AssumeRoleUnauthorizedAccess",
            ),
            (
                r#"{"Code":"Success","AccessKeyId":"geheim"}"#,
                "there is no key",
            ),
            (r#"geheim"#, "no JSON"),
        ] {
            let error = Credentials::read(text, "router").unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains("geheim"), "{error}");
        }
    }
}
