//! Where the services are: at their usual names, or where the variables say that the SDKs know too.

use std::net::IpAddr;

use hyper::Uri;

use crate::cloud::imds::near;

/// Names another place for every service.
const ALL: &str = "AWS_ENDPOINT_URL";

/// A place that is none.
#[derive(Debug, thiserror::Error)]
#[error(
    "{variable} is {value:?}; it must be an https:// URL, or an http:// one of a loopback or link-local address, for \
     requests are signed but not encrypted there"
)]
pub struct EndpointError {
    variable: String,
    value: String,
}

/// Where a service is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// By TLS.
    pub(super) tls: bool,
    /// Name or address.
    pub(super) host: String,
    /// TCP port, host byte order.
    pub(super) port: u16,
    /// What the request is addressed to, as in `Host`.
    pub(super) authority: String,
}

impl Endpoint {
    /// The place of `service` in `region`; `variable` gives values of the environment.
    pub(super) fn find(
        service: Service,
        region: &str,
        domain: &str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, EndpointError> {
        let own = format!("{ALL}_{}", service.variable());
        for name in [own.as_str(), ALL] {
            if let Some(value) = variable(name).filter(|value| !value.is_empty()) {
                return Self::parse(&value).ok_or_else(|| EndpointError {
                    variable: name.to_owned(),
                    value,
                });
            }
        }
        let host = format!("{}.{region}.{domain}", service.signing_name());
        Ok(Self {
            tls: true,
            authority: host.clone(),
            host,
            port: 443,
        })
    }

    fn parse(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let tls = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return None;
        }
        let host = uri.host()?.trim_matches(['[', ']']).to_owned();
        let only_near = host.parse::<IpAddr>().is_ok_and(near);
        if !tls && !only_near {
            return None;
        }
        Some(Self {
            tls,
            port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authority: uri.authority()?.as_str().to_owned(),
            host,
        })
    }
}

/// The services that are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    /// EC2 Auto Scaling.
    AutoScaling,
    /// EC2.
    Ec2,
    /// Systems Manager.
    Ssm,
}

impl Service {
    /// The name in signatures, which is the one in host names too.
    pub(super) fn signing_name(self) -> &'static str {
        match self {
            Self::AutoScaling => "autoscaling",
            Self::Ec2 => "ec2",
            Self::Ssm => "ssm",
        }
    }

    fn variable(self) -> &'static str {
        match self {
            Self::AutoScaling => "AUTO_SCALING",
            Self::Ec2 => "EC2",
            Self::Ssm => "SSM",
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn find(service: Service, set: &[(&str, &str)]) -> Result<String, String> {
        let set = |name: &str| {
            let found = set.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Endpoint::find(service, "eu-central-1", "amazonaws.com", set)
            .map(|found| {
                let scheme = if found.tls { "https" } else { "http" };
                format!(
                    "{scheme}://{}:{} {}",
                    found.host, found.port, found.authority
                )
            })
            .map_err(|error| error.to_string())
    }

    #[test]
    fn services_are_where_the_environment_says() {
        let usual = "https://autoscaling.eu-central-1.amazonaws.com:443 autoscaling.eu-central-1.amazonaws.com";
        assert_eq!(find(Service::AutoScaling, &[]).unwrap(), usual);
        let all = ("AWS_ENDPOINT_URL", "http://127.0.0.1:5000");
        let own = ("AWS_ENDPOINT_URL_EC2", "https://ec2.internal");
        assert_eq!(
            find(Service::Ec2, &[all]).unwrap(),
            "http://127.0.0.1:5000 127.0.0.1:5000"
        );
        assert_eq!(
            find(Service::Ec2, &[all, own]).unwrap(),
            "https://ec2.internal:443 ec2.internal"
        );
        assert_eq!(
            find(Service::Ssm, &[("AWS_ENDPOINT_URL", "http://[::1]:81/")]).unwrap(),
            "http://::1:81 [::1]:81"
        );
    }

    #[test]
    fn nothing_goes_unencrypted_over_a_network() {
        for value in [
            "http://192.0.2.1:5000",
            "http://localhost:5000",
            "ftp://127.0.0.1",
            "https://ec2.internal/path",
            "127.0.0.1:5000",
        ] {
            let error = find(Service::Ec2, &[("AWS_ENDPOINT_URL", value)]).unwrap_err();
            assert!(
                error.contains("AWS_ENDPOINT_URL") && error.contains(value),
                "{error}"
            );
        }
    }
}
