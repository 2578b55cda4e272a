//! What the agent asks of AWS by signed calls.

use std::collections::BTreeSet;
use std::env;

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::run::{Agent, Job};
use super::{Checked, Claimed};
use crate::cloud::aws::{Aws, Error, Hook, compare};
use crate::cloud::life::Action;
use crate::tailnet::client::client_config;

/// Auto Scaling may put an instance under its hook a little after the instance's state says what for, and until then
/// the hook cannot be completed. After so many refusals, about a minute by the pauses of [`crate::cloud::life`],
/// nothing holds the instance.
const REFUSALS: u32 = 5;

impl Agent {
    /// Who makes the calls, in the instance's region or the one that the environment names.
    async fn aws(&mut self) -> Result<&mut Aws, String> {
        let aws = match self.aws.take() {
            Some(aws) => aws,
            None => self.new_aws().await?,
        };
        Ok(self.aws.insert(aws))
    }

    async fn new_aws(&mut self) -> Result<Aws, String> {
        let set = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let region = set("AWS_REGION").or_else(|| set("AWS_DEFAULT_REGION"));
        let of_instance = self.instance.as_ref().map(|known| known.region.clone());
        let region = region.or(of_instance).ok_or_else(|| {
            let why = self.problems.get(&Job::Who).and_then(|list| list.first());
            let why = why.map_or("it is being asked", String::as_str);
            format!("the region of AWS is not known yet: {why}")
        })?;
        let mut domain = None;
        // Outside EC2 nobody knows it.
        if let (Ok(imds), Some(_)) = (&mut self.imds, &self.instance) {
            let found = imds.get("meta-data/services/domain").await;
            domain = found.map_err(|error| error.to_string())?;
        }
        let domain = domain.as_deref().map_or("amazonaws.com", str::trim);
        let tls = client_config(None).map_err(|error| error.to_string())?;
        Ok(Aws::new(&region, domain, tls, self.imds.clone(), self.mark))
    }

    pub(super) async fn parameter(&mut self, name: &str) -> Result<Zeroizing<String>, String> {
        let told = |error: Error| match error.code() {
            Some("ParameterNotFound") => format!(
                "the parameter store has no parameter {name}; make it with: aws ssm put-parameter --type SecureString \
                 --name {name} --value ..."
            ),
            _ => format!("the parameter {name}: {error}"),
        };
        self.aws().await?.parameter(name).await.map_err(told)
    }

    /// Carries an action out, and says whether it went well. What is no matter of the cloud is done already.
    pub(super) async fn act(&mut self, action: Action) -> bool {
        let outcome = match action {
            Action::CompleteLaunch => {
                let name = self.settings.launch_hook.clone();
                self.hook(name, false).await
            }
            Action::Heartbeat => {
                let name = self.settings.termination_hook.clone();
                self.hook(name, true).await
            }
            Action::CompleteTermination => {
                let name = self.settings.termination_hook.clone();
                self.hook(name, false).await
            }
            Action::DropRoutes => self.drop_routes().await.map(|()| true),
            Action::Withdraw | Action::Advertise | Action::Leave => Ok(true),
        };
        let well = *outcome.as_ref().unwrap_or(&false);
        self.unobeyed = outcome.err();
        well
    }

    /// Tells the group about a hook. Without a group there is nobody to be told. `false`: it is to be told again,
    /// though nothing is wrong.
    async fn hook(&mut self, name: String, wait: bool) -> Result<bool, String> {
        let Some(instance) = self.instance.clone() else {
            return match &self.imds {
                Ok(_) => Err(
                    "who this instance is is not known yet, so its group cannot be told \
                              anything; it is tried again"
                        .to_owned(),
                ),
                Err(_) => Ok(true),
            };
        };
        let target = "meta-data/autoscaling/target-lifecycle-state";
        let grouped = match &mut self.imds {
            Ok(imds) => imds.get(target).await.map_err(|error| error.to_string())?,
            Err(_) => None,
        };
        if grouped.is_none() {
            return Ok(true);
        }
        if self.group.is_none() {
            let found = self.aws().await?.group(&instance.id).await;
            self.group = found.map_err(|error| {
                format!(
                    "the name of the instance's group is not known: {error}. Or turn on tags in the metadata (aws \
                     ec2 modify-instance-metadata-options --instance-id {} --instance-metadata-tags enabled)",
                    instance.id
                )
            })?;
        }
        let Some(group) = self.group.clone() else {
            return Ok(true);
        };
        let hook = Hook {
            group,
            name,
            instance: instance.id,
        };
        let aws = self.aws().await?;
        let held = match wait {
            true => aws.heartbeat(&hook).await,
            false => aws.complete(&hook).await,
        };
        let refused = self.refused.remove(&hook.name).unwrap_or(0);
        match held {
            Ok(true) => tracing::info!(
                hook = hook.name,
                group = hook.group,
                wait,
                "the group is told"
            ),
            Ok(false) if !wait && refused < REFUSALS => {
                tracing::debug!(
                    hook = hook.name,
                    group = hook.group,
                    "no hook of this name holds the instance yet"
                );
                self.refused.insert(hook.name, refused + 1);
                return Ok(false);
            }
            // As with every start of a daemon whose instance is in service.
            Ok(false) => tracing::info!(
                hook = hook.name,
                group = hook.group,
                "no hook of this name holds the instance"
            ),
            Err(error) => {
                return Err(format!(
                    "the hook {} of the group {} goes on holding this instance until its time is up: {error}",
                    hook.name, hook.group
                ));
            }
        }
        Ok(true)
    }

    /// Looks whether interfaces take packets that are not their own, and has them do so.
    pub(super) async fn look_at_check(&mut self) -> Result<(), Vec<String>> {
        let interfaces = self.instance.as_ref().map(|known| known.interfaces.clone());
        let (mut checked, mut problems) = (Vec::new(), Vec::new());
        for interface in interfaces.unwrap_or_default() {
            match self.stop_check(&interface).await {
                Ok(stopped) => {
                    if stopped {
                        tracing::info!(interface, "the source/destination check is turned off");
                    }
                    checked.push(Checked {
                        interface,
                        on: false,
                    });
                }
                Err(why) => {
                    problems.push(format!(
                        "peers' own addresses in the VPC (snat = false, vpc_route_tables) need the source/destination \
                         check of {interface} off, or EC2 drops the packets, and this router cannot see to it: {why}. \
                         Turn it off with: aws ec2 modify-network-interface-attribute --network-interface-id \
                         {interface} --no-source-dest-check"
                    ));
                    checked.push(Checked {
                        interface,
                        on: true,
                    });
                }
            }
        }
        self.checked = checked;
        match problems.is_empty() {
            true => Ok(()),
            false => Err(problems),
        }
    }

    /// Whether the check was on until now.
    async fn stop_check(&mut self, interface: &str) -> Result<bool, String> {
        let aws = self.aws().await?;
        let told = |error: Error| error.to_string();
        if !aws.source_dest_check(interface).await.map_err(told)? {
            return Ok(false);
        }
        aws.stop_source_dest_check(interface).await.map_err(told)?;
        Ok(true)
    }

    /// Has the route tables lead the overlay here, as far as they lead it nowhere else.
    pub(super) async fn look_at_routes(&mut self) -> Result<(), Vec<String>> {
        let wanted: BTreeSet<IpNet> = self.settings.overlay.iter().copied().collect();
        self.claimed.extend(&wanted);
        let (mut routes, mut problems) = (Vec::new(), Vec::new());
        for table in self.settings.route_tables.clone() {
            let claimed = self.claim(&table, &wanted, &mut problems).await;
            match claimed {
                Ok(claimed) => routes.extend(claimed),
                Err(why) => problems.push(format!(
                    "the VPC route table {table} does not lead to the peers by this router: {why}"
                )),
            }
        }
        problems.extend(self.give_up_gone().await);
        self.routes = routes;
        match problems.is_empty() {
            true => Ok(()),
            false => Err(problems),
        }
    }

    async fn claim(
        &mut self,
        table: &str,
        wanted: &BTreeSet<IpNet>,
        problems: &mut Vec<String>,
    ) -> Result<Vec<Claimed>, String> {
        let own = self.own_interface()?;
        let (grouped, claims) = (self.group.is_some(), self.claims);
        let claimed = self.claimed.clone();
        let told = |error: Error| error.to_string();
        let aws = self.aws().await?;
        let there = aws.routes(table).await.map_err(told)?;
        let change = compare(&there, wanted, &own, &claimed);
        let mut missing = BTreeSet::new();
        for (cidrs, replace) in [(&change.create, false), (&change.replace, true)] {
            for cidr in cidrs {
                if !claims {
                    missing.insert(*cidr);
                    continue;
                }
                match aws.set_route(table, *cidr, &own, replace).await {
                    Ok(()) => tracing::info!(table, %cidr, "a VPC route leads here from now on"),
                    Err(error) => {
                        missing.insert(*cidr);
                        problems.push(format!(
                            "the VPC route table {table} does not lead {cidr} to the peers by this router: {error}"
                        ));
                    }
                }
            }
        }
        for cidr in &change.delete {
            match aws.delete_route(table, *cidr).await {
                Ok(()) => tracing::info!(
                    table,
                    %cidr,
                    "a VPC route is taken away, for it is not wanted any more"
                ),
                Err(error) => problems.push(format!(
                    "the VPC route table {table} still leads {cidr} here, which is not wanted any more: {error}"
                )),
            }
        }
        for (cidr, interface) in &change.foreign {
            // In a group one router has the route, and the others wait for it. Routers are interfaces.
            if !(grouped && interface.is_some()) {
                problems.push(format!(
                    "the VPC route table {table} leads {cidr} to {} and not to this router, which leaves what is \
                     another's alone: take that route away with `aws ec2 delete-route --route-table-id {table} {} \
                     {cidr}`, or the table out of cloud.vpc_route_tables",
                    interface.as_deref().unwrap_or("something that is no interface"),
                    match cidr {
                        IpNet::V4(_) => "--destination-cidr-block",
                        IpNet::V6(_) => "--destination-ipv6-cidr-block",
                    }
                ));
            }
        }
        let claimed = wanted.iter().map(|cidr| {
            let foreign = change.foreign.iter().find(|(other, _)| other == cidr);
            let is_own = foreign.is_none() && !missing.contains(cidr);
            let elsewhere = foreign.and_then(|(_, interface)| interface.clone());
            Claimed {
                table: table.to_owned(),
                cidr: *cidr,
                interface: is_own.then(|| own.clone()).or(elsewhere),
                own: is_own,
                waits: grouped && foreign.is_some_and(|(_, interface)| interface.is_some()),
            }
        });
        Ok(claimed.collect())
    }

    fn own_interface(&self) -> Result<String, String> {
        let known = self.instance.as_ref();
        let first = known.and_then(|known| known.interfaces.first());
        first.cloned().ok_or_else(|| {
            "the metadata service does not tell the id of this instance's interface".to_owned()
        })
    }

    /// Takes away the VPC routes that lead to this instance.
    async fn drop_routes(&mut self) -> Result<(), String> {
        // Or the next look would take them back.
        self.claims = false;
        if self.instance.is_none() {
            return Ok(());
        }
        self.claimed.extend(&self.settings.overlay);
        let mut problems = Vec::new();
        // A table that fails keeps the routes in no other.
        for table in self.settings.route_tables.clone() {
            problems.extend(self.give_up(&table).await.err());
        }
        problems.extend(self.give_up_gone().await);
        // Where they lead now is seen at the next look.
        self.routes.clear();
        match problems.is_empty() {
            true => Ok(()),
            false => Err(problems.join("; ")),
        }
    }

    /// Takes away what leads here in tables that the configuration does not name any more. What cannot be is tried
    /// again.
    async fn give_up_gone(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        for table in self.gone.clone() {
            match self.give_up(&table).await {
                Ok(()) => _ = self.gone.remove(&table),
                Err(why) => problems.push(why),
            }
        }
        problems
    }

    /// Takes away what leads here in a table, as much of it as can be.
    async fn give_up(&mut self, table: &str) -> Result<(), String> {
        let kept = |why: String| {
            format!("routes of the VPC route table {table} may still lead to this router: {why}")
        };
        let own = self.own_interface().map_err(kept)?;
        let claimed = self.claimed.clone();
        let aws = self.aws().await.map_err(kept)?;
        let there = match aws.routes(table).await {
            // Nothing leads anywhere in a table that is gone.
            Err(error) if error.code() == Some("InvalidRouteTableID.NotFound") => return Ok(()),
            there => there.map_err(|error| kept(error.to_string()))?,
        };
        let mut failures = Vec::new();
        for cidr in compare(&there, &BTreeSet::new(), &own, &claimed).delete {
            match aws.delete_route(table, cidr).await {
                Ok(()) => tracing::info!(table, %cidr, "a VPC route that led here is taken away"),
                Err(error) => failures.push(format!("{cidr}: {error}")),
            }
        }
        match failures.is_empty() {
            true => Ok(()),
            false => Err(kept(failures.join("; "))),
        }
    }
}
