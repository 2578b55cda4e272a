//! The calls that a router makes to AWS: signed, few, and each with its permission named when it is missing.

mod call;
mod credentials;
mod endpoint;

use std::collections::BTreeSet;

use ipnet::IpNet;

pub use call::{Aws, Error};
pub use credentials::Credentials;
pub use endpoint::EndpointError;

use call::Query;

/// A lifecycle hook of the instance's group, and the instance that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The group.
    pub group: String,
    /// The hook.
    pub name: String,
    /// The instance.
    pub instance: String,
}

/// A route of a VPC route table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VpcRoute {
    /// Its destination.
    pub cidr: IpNet,
    /// The network interface that it leads to; `None` if it leads to something else.
    pub interface: Option<String>,
    /// It was made by somebody (`CreateRoute`), not by the table or a gateway.
    pub by_hand: bool,
    /// What it leads to is gone (`blackhole`), so nobody's packets go by it.
    pub dead: bool,
}

impl Aws {
    /// Says that a hook need not hold its instance any longer (CompleteLifecycleAction). Whether it did.
    pub async fn complete(&mut self, hook: &Hook) -> Result<bool, Error> {
        let query = Query::auto_scaling("CompleteLifecycleAction")
            .with("LifecycleActionResult", "CONTINUE");
        held(self.ask(of_hook(query, hook)).await)
    }

    /// Says that a hook is to wait on (RecordLifecycleActionHeartbeat). Whether it holds the instance.
    pub async fn heartbeat(&mut self, hook: &Hook) -> Result<bool, Error> {
        let query = Query::auto_scaling("RecordLifecycleActionHeartbeat");
        held(self.ask(of_hook(query, hook)).await)
    }

    /// The group that an instance belongs to (DescribeAutoScalingInstances).
    pub async fn group(&mut self, instance: &str) -> Result<Option<String>, Error> {
        let query = Query::auto_scaling("DescribeAutoScalingInstances")
            .with("InstanceIds.member.1", instance);
        let answer = self.ask(query).await?;
        let document = answer.xml()?;
        let mut found = document.descendants();
        let found = found.find(|node| node.has_tag_name_of("AutoScalingGroupName"));
        Ok(found.and_then(|node| node.text()).map(str::to_owned))
    }

    /// Whether an interface drops what is neither from nor for its own addresses.
    pub async fn source_dest_check(&mut self, interface: &str) -> Result<bool, Error> {
        let query = Query::ec2("DescribeNetworkInterfaceAttribute")
            .with("NetworkInterfaceId", interface)
            .with("Attribute", "sourceDestCheck");
        let answer = self.ask(query).await?;
        let document = answer.xml()?;
        let value = document
            .descendants()
            .find(|node| node.has_tag_name_of("sourceDestCheck"))
            .and_then(|node| node.children().find(|child| child.has_tag_name_of("value")))
            .and_then(|node| node.text());
        match value {
            Some("true") => Ok(true),
            Some("false") => Ok(false),
            _ => Err(answer.unclear("no value of sourceDestCheck")),
        }
    }

    /// Has an interface take every packet.
    pub async fn stop_source_dest_check(&mut self, interface: &str) -> Result<(), Error> {
        let query = Query::ec2("ModifyNetworkInterfaceAttribute")
            .with("NetworkInterfaceId", interface)
            .with("SourceDestCheck.Value", "false");
        self.ask(query).await.map(drop)
    }

    /// The routes of a table.
    pub async fn routes(&mut self, table: &str) -> Result<Vec<VpcRoute>, Error> {
        let query = Query::ec2("DescribeRouteTables").with("RouteTableId.1", table);
        let answer = self.ask(query).await?;
        let document = answer.xml()?;
        let sets = document
            .descendants()
            .filter(|node| node.has_tag_name_of("routeSet"));
        let items = sets.flat_map(|set| set.children());
        let items = items.filter(|node| node.has_tag_name_of("item"));
        Ok(items.filter_map(route).collect())
    }

    /// Has a table's route to `cidr` lead to an interface: a new one, or (`replace`) one that is there.
    pub async fn set_route(
        &mut self,
        table: &str,
        cidr: IpNet,
        interface: &str,
        replace: bool,
    ) -> Result<(), Error> {
        let action = if replace {
            "ReplaceRoute"
        } else {
            "CreateRoute"
        };
        let query = Query::ec2(action)
            .with("RouteTableId", table)
            .with("NetworkInterfaceId", interface)
            .with(destination(cidr), &cidr.to_string());
        self.ask(query).await.map(drop)
    }

    /// Takes a route out of a table, if it is there.
    pub async fn delete_route(&mut self, table: &str, cidr: IpNet) -> Result<(), Error> {
        let query = Query::ec2("DeleteRoute")
            .with("RouteTableId", table)
            .with(destination(cidr), &cidr.to_string());
        match self.ask(query).await {
            Err(error) if error.code() == Some("InvalidRoute.NotFound") => Ok(()),
            other => other.map(drop),
        }
    }

    /// A parameter of Systems Manager, decrypted.
    pub async fn parameter(&mut self, name: &str) -> Result<zeroize::Zeroizing<String>, Error> {
        let answer = self.ask(Query::parameter(name)).await?;
        answer.parameter()
    }
}

/// Which of `wanted` a table lacks, and which of its routes are ours to take away: those that lead to
/// `interface` and are not wanted. What leads elsewhere is another's; where it stands in the way it is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteChange {
    /// To be made.
    pub create: Vec<IpNet>,
    /// To lead here from now on: what they led to is gone.
    pub replace: Vec<IpNet>,
    /// To be taken away.
    pub delete: Vec<IpNet>,
    /// Wanted, but they lead to something of somebody else.
    pub foreign: Vec<(IpNet, Option<String>)>,
}

/// Compares a table with what is wanted of it.
pub fn compare(
    there: &[VpcRoute],
    wanted: &BTreeSet<IpNet>,
    interface: &str,
    claimed: &BTreeSet<IpNet>,
) -> RouteChange {
    let mut change = RouteChange::default();
    for cidr in wanted {
        match there.iter().find(|route| route.cidr == *cidr) {
            None => change.create.push(*cidr),
            Some(route) if route.interface.as_deref() == Some(interface) => {}
            Some(route) if route.by_hand && route.dead => change.replace.push(*cidr),
            Some(route) => change.foreign.push((*cidr, route.interface.clone())),
        }
    }
    let ours = there.iter().filter(|route| {
        route.by_hand
            && route.interface.as_deref() == Some(interface)
            && claimed.contains(&route.cidr)
            && !wanted.contains(&route.cidr)
    });
    change.delete.extend(ours.map(|route| route.cidr));
    change
}

/// Whether a hook holds the instance, by the answer to a call about it.
fn held<T>(answer: Result<T, Error>) -> Result<bool, Error> {
    match answer {
        Ok(_) => Ok(true),
        // AWS has no other code for it.
        Err(Error::Refused { code, text, .. })
            if code == "ValidationError" && text.contains("No active Lifecycle Action") =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn of_hook(query: Query, hook: &Hook) -> Query {
    query
        .with("AutoScalingGroupName", &hook.group)
        .with("LifecycleHookName", &hook.name)
        .with("InstanceId", &hook.instance)
}

fn destination(cidr: IpNet) -> &'static str {
    match cidr {
        IpNet::V4(_) => "DestinationCidrBlock",
        IpNet::V6(_) => "DestinationIpv6CidrBlock",
    }
}

fn route(item: roxmltree::Node<'_, '_>) -> Option<VpcRoute> {
    let text = |name: &str| {
        let found = item.children().find(|child| child.has_tag_name_of(name));
        found.and_then(|node| node.text())
    };
    let cidr = text("destinationCidrBlock").or_else(|| text("destinationIpv6CidrBlock"))?;
    Some(VpcRoute {
        cidr: cidr.parse::<IpNet>().ok()?.trunc(),
        interface: text("networkInterfaceId").map(str::to_owned),
        by_hand: text("origin") == Some("CreateRoute"),
        dead: text("state") == Some("blackhole"),
    })
}

/// Names without regard to the namespace, which carries the version of the API.
trait Local {
    fn has_tag_name_of(&self, name: &str) -> bool;
}

impl Local for roxmltree::Node<'_, '_> {
    fn has_tag_name_of(&self, name: &str) -> bool {
        self.is_element() && self.tag_name().name() == name
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
