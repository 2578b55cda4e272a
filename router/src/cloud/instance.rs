//! What an EC2 instance is told of itself.

use ipnet::IpNet;
use serde::Serialize;

use super::imds::{Error, Imds};

/// Where this instance stands. It stays as long as the instance runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// As `i-0123456789abcdef0`.
    pub id: String,
    /// As `eu-central-1`.
    pub region: String,
    /// As `eu-central-1a`.
    pub zone: String,
    /// The zone's name that means the same in every account, as `euc1-az2`.
    pub zone_id: String,
    /// As `c7g.large`.
    pub kind: String,
    /// `spot` or `on-demand`.
    pub life: String,
    /// MAC address of the first network interface, as the service writes it.
    pub mac: String,
    /// The ids of its network interfaces, as `eni-…`, the first one's first.
    pub interfaces: Vec<String>,
    /// The group that it belongs to, if tags may be read through the service.
    pub group: Option<String>,
    /// Its tag `Name`, likewise.
    pub name: Option<String>,
}

impl Instance {
    /// Asks the service. What it does not know stays empty; only an instance without an id is none.
    pub async fn read(imds: &mut Imds) -> Result<Self, Error> {
        let id = must(imds, "meta-data/instance-id").await?;
        let mac = may(imds, "meta-data/mac").await?;
        let interfaces = interfaces(imds, &mac).await?;
        Ok(Self {
            id,
            region: may(imds, "meta-data/placement/region").await?,
            zone: may(imds, "meta-data/placement/availability-zone").await?,
            zone_id: may(imds, "meta-data/placement/availability-zone-id").await?,
            kind: may(imds, "meta-data/instance-type").await?,
            life: may(imds, "meta-data/instance-life-cycle").await?,
            interfaces,
            mac,
            group: tag(imds, "aws:autoscaling:groupName").await?,
            name: tag(imds, "Name").await?,
        })
    }

    /// The name that a router has if nobody gives it one: those of a group differ, and tell where each is.
    pub fn host_name(&self) -> Option<String> {
        let of_what = self.group.as_deref().or(self.name.as_deref())?;
        let end = self.id.get(self.id.len().checked_sub(5)?..)?;
        let name = format!("{of_what}-{}-{end}", self.zone);
        // A label of RFC 1123: what is no letter, digit or hyphen becomes a hyphen.
        let label: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let label = label.trim_matches('-').to_ascii_lowercase();
        // The end tells the routers of a group apart, so a long name loses its beginning.
        let from = label.len().saturating_sub(63);
        let label = label.get(from..)?.trim_matches('-');
        (!label.is_empty()).then(|| label.to_owned())
    }

    /// The VPC's networks now, IPv4 first, each once.
    pub async fn vpc(&self, imds: &mut Imds) -> Result<Vec<IpNet>, Error> {
        let mut nets = Vec::new();
        for family in ["vpc-ipv4-cidr-blocks", "vpc-ipv6-cidr-blocks"] {
            let path = format!("meta-data/network/interfaces/macs/{}/{family}", self.mac);
            let text = imds.get(&path).await?.unwrap_or_default();
            for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
                let net: IpNet = line.parse().map_err(|_| Error::Answer {
                    path: path.clone(),
                    what: format!("{line:?}, which is no CIDR"),
                })?;
                nets.push(net.trunc());
            }
        }
        nets.sort_unstable();
        nets.dedup();
        Ok(nets)
    }
}

async fn interfaces(imds: &mut Imds, first: &str) -> Result<Vec<String>, Error> {
    const FOLDER: &str = "meta-data/network/interfaces/macs/";
    let macs = may(imds, FOLDER).await?;
    let macs = macs.lines().map(|mac| mac.trim().trim_end_matches('/'));
    let others = macs.filter(|mac| *mac != first);
    let mut found = Vec::new();
    for mac in std::iter::once(first).chain(others) {
        let id = may(imds, &format!("{FOLDER}{mac}/interface-id")).await?;
        found.extend(Some(id).filter(|id| !id.is_empty()));
    }
    Ok(found)
}

async fn must(imds: &mut Imds, path: &str) -> Result<String, Error> {
    let found = may(imds, path).await?;
    if found.is_empty() {
        return Err(Error::Answer {
            path: path.to_owned(),
            what: "nothing".to_owned(),
        });
    }
    Ok(found)
}

async fn may(imds: &mut Imds, path: &str) -> Result<String, Error> {
    Ok(imds.get(path).await?.unwrap_or_default().trim().to_owned())
}

async fn tag(imds: &mut Imds, name: &str) -> Result<Option<String>, Error> {
    let path = format!("meta-data/tags/instance/{name}");
    let found = may(imds, &path).await?;
    Ok((!found.is_empty()).then_some(found))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_router_is_named_after_its_group_and_place() {
        let instance = |group: Option<&str>, name: Option<&str>| Instance {
            id: "i-0123456789abcdef0".to_owned(),
            zone: "eu-central-1a".to_owned(),
            group: group.map(str::to_owned),
            name: name.map(str::to_owned),
            ..Instance::default()
        };
        let named = |group, name| instance(group, name).host_name();
        assert_eq!(
            named(Some("Routers of prod"), Some("other")).unwrap(),
            "routers-of-prod-eu-central-1a-cdef0"
        );
        assert_eq!(named(None, Some("gw")).unwrap(), "gw-eu-central-1a-cdef0");
        assert_eq!(named(None, None), None);
        let long = named(Some(&"x".repeat(90)), None).unwrap();
        assert!(
            long.len() <= 63 && long.ends_with("-eu-central-1a-cdef0"),
            "{long}"
        );
        let strange = Instance {
            group: Some("ä".to_owned()),
            id: "é".to_owned(),
            ..Instance::default()
        };
        assert_eq!(strange.host_name(), None);
    }
}
