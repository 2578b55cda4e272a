//! The agent's loop: what is polled when, and what is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{mpsc, watch};

use super::{Checked, Claimed, Event, Order, Report, Settings};
use crate::cloud::aws::Aws;
use crate::cloud::imds::{Error, Imds};
use crate::cloud::instance::Instance;
use crate::cloud::life::{Seen, Target};
use crate::cloud::user_data;

/// A reclaimed spot instance has two minutes, and a hook may have 30 seconds.
const LIFE: Duration = Duration::from_secs(5);
const NETWORKS: Duration = Duration::from_secs(10);
/// What is looked at by calls to AWS, whose number an account shares.
const CALLS: Duration = Duration::from_secs(30);
/// What has failed is tried again after this, doubled each time up to [`MOST`].
const RETRY: Duration = Duration::from_secs(1);
const MOST: Duration = Duration::from_secs(60);

/// What is done again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Job {
    /// Who the instance is, until that is known.
    Who,
    /// The user data, until that is known.
    UserData,
    /// What the group and the spot market want.
    Life,
    /// The VPC's networks.
    Networks,
    /// The source/destination check.
    Check,
    /// The VPC's routes.
    Routes,
}

impl Job {
    const ALL: [Self; 6] = [
        Self::Who,
        Self::UserData,
        Self::Life,
        Self::Networks,
        Self::Check,
        Self::Routes,
    ];

    /// How often, while it goes well.
    fn period(self) -> Duration {
        match self {
            Self::Who | Self::UserData | Self::Life => LIFE,
            Self::Networks => NETWORKS,
            Self::Check | Self::Routes => CALLS,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Who => "who this instance is, until it is known",
            Self::UserData => "the user data, until it is known",
            Self::Life => {
                "what the group wants, and notices of the spot market (every 5 s, metadata service)"
            }
            Self::Networks => "the VPC's networks (every 10 s, metadata service)",
            Self::Check => "the source/destination check (every 30 s, EC2)",
            Self::Routes => "the VPC's route tables (every 30 s, EC2)",
        }
    }
}

pub(super) struct Agent {
    pub(super) settings: Settings,
    pub(super) mark: u32,
    /// The metadata service, or why there is none.
    pub(super) imds: Result<Imds, String>,
    pub(super) aws: Option<Aws>,
    pub(super) instance: Option<Instance>,
    asked: bool,
    pub(super) group: Option<String>,
    target: Option<String>,
    networks: Option<Vec<IpNet>>,
    pub(super) checked: Vec<Checked>,
    pub(super) routes: Vec<Claimed>,
    /// Every destination that was claimed since the start.
    pub(super) claimed: BTreeSet<IpNet>,
    /// Tables that were to lead here and are not any more, as long as they may.
    pub(super) gone: BTreeSet<String>,
    /// Routes that nobody has are taken.
    pub(super) claims: bool,
    spot: bool,
    rebalance: bool,
    /// The user data is where it is wanted, or there is none.
    user_data_known: bool,
    /// When each is due, and how often it has failed since it last went well.
    due: BTreeMap<Job, (Instant, u32)>,
    pub(super) problems: BTreeMap<Job, Vec<String>>,
    /// Why an order could not be carried out; it is given again.
    pub(super) unobeyed: Option<String>,
    /// How often a hook could not be completed, for it did not hold the instance.
    pub(super) refused: BTreeMap<String, u32>,
    events: mpsc::UnboundedSender<Event>,
    report: watch::Sender<Arc<Report>>,
}

impl Agent {
    pub(super) fn new(
        settings: Settings,
        mark: u32,
        events: mpsc::UnboundedSender<Event>,
        report: watch::Sender<Arc<Report>>,
    ) -> Self {
        let imds = match Imds::from_environment(mark) {
            Ok(Some(imds)) => Ok(imds),
            Ok(None) => Err(format!(
                "the metadata service is not asked, for {} is set; unset it, or set cloud.provider = \"none\"",
                crate::cloud::imds::DISABLED
            )),
            Err(error) => Err(error.to_string()),
        };
        let mut agent = Self {
            settings,
            mark,
            imds,
            aws: None,
            instance: None,
            asked: false,
            group: None,
            target: None,
            networks: None,
            checked: Vec::new(),
            routes: Vec::new(),
            claimed: BTreeSet::new(),
            gone: BTreeSet::new(),
            claims: false,
            spot: false,
            rebalance: false,
            user_data_known: false,
            due: BTreeMap::new(),
            problems: BTreeMap::new(),
            unobeyed: None,
            refused: BTreeMap::new(),
            events,
            report,
        };
        if let Err(why) = &agent.imds {
            agent.problems.insert(Job::Who, vec![why.clone()]);
            agent.asked = true;
        }
        agent
    }

    pub(super) async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            self.publish();
            let next = self.next();
            let wait = async {
                match next {
                    Some((_, due)) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.obey(order).await,
                    None => return,
                },
                () = wait => if let Some((job, _)) = next {
                    self.look(job).await;
                },
            }
        }
    }

    async fn obey(&mut self, order: Order) {
        match order {
            Order::Act(action) => {
                let well = self.act(action).await;
                self.tell(Event::Done(action, well));
            }
            Order::Claim(claims) => {
                self.claims = claims;
                self.due.remove(&Job::Routes);
                if claims {
                    // Routes that could not be dropped are wanted again.
                    self.unobeyed = None;
                }
            }
            Order::Set(settings) => {
                if *settings != self.settings {
                    self.set(*settings);
                }
            }
            Order::Parameter(name, answer) => {
                let _ = answer.send(self.parameter(&name).await);
            }
        }
    }

    fn set(&mut self, settings: Settings) {
        let before = std::mem::replace(&mut self.settings, settings);
        let wanted = &self.settings.route_tables;
        self.gone.extend(before.route_tables);
        self.gone.retain(|table| !wanted.contains(table));
        self.claimed.extend(&before.overlay);
        for job in [Job::Check, Job::Routes, Job::UserData] {
            self.due.remove(&job);
            // Nobody looks any more whether it still holds.
            if !self.wants(job) {
                self.problems.remove(&job);
            }
        }
        if !self.wants(Job::Check) {
            self.checked.clear();
        }
        if !self.wants(Job::Routes) {
            self.routes.clear();
        }
    }

    pub(super) fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Whether a job is done at all.
    fn wants(&self, job: Job) -> bool {
        let known = self.instance.is_some();
        match job {
            Job::Who => self.imds.is_ok() && !known,
            Job::UserData => {
                self.imds.is_ok() && self.settings.user_data.is_some() && !self.user_data_known
            }
            Job::Life | Job::Networks => known,
            Job::Check => known && self.settings.keeps_sources,
            Job::Routes => {
                known && !(self.settings.route_tables.is_empty() && self.gone.is_empty())
            }
        }
    }

    /// The job that is due first, and when.
    fn next(&self) -> Option<(Job, Instant)> {
        let now = Instant::now();
        let wanted = Job::ALL.into_iter().filter(|job| self.wants(*job));
        let due = wanted.map(|job| (job, self.due.get(&job).map_or(now, |(due, _)| *due)));
        due.min_by_key(|(_, due)| *due)
    }

    async fn look(&mut self, job: Job) {
        let problems = match job {
            Job::Who => self.learn_who().await.err(),
            Job::UserData => self.learn_user_data().await.err(),
            Job::Life => self.learn_life().await.err(),
            Job::Networks => self.learn_networks().await.err(),
            Job::Check => self.look_at_check().await.err(),
            Job::Routes => self.look_at_routes().await.err(),
        };
        let now = Instant::now();
        let failed = match &problems {
            None => 0,
            Some(_) => self.due.get(&job).map_or(0, |(_, failed)| *failed) + 1,
        };
        let wait = match failed {
            0 => job.period(),
            failed => RETRY.saturating_mul(1 << (failed - 1).min(10)).min(MOST),
        };
        self.due.insert(job, (now + wait, failed));
        match problems {
            Some(problems) => _ = self.problems.insert(job, problems),
            None => _ = self.problems.remove(&job),
        }
    }

    /// Asks the metadata service.
    async fn ask(&mut self, path: &str) -> Result<Option<String>, Vec<String>> {
        let imds = self.imds.as_mut().map_err(|why| vec![why.clone()])?;
        let found = imds.get(path).await.map_err(told)?;
        let found = found.map(|text| text.trim().to_owned());
        Ok(found.filter(|text| !text.is_empty()))
    }

    async fn learn_who(&mut self) -> Result<(), Vec<String>> {
        self.asked = true;
        let imds = self.imds.as_mut().map_err(|why| vec![why.clone()])?;
        let instance = Instance::read(imds).await.map_err(told)?;
        tracing::info!(
            instance = instance.id,
            zone = instance.zone,
            group = instance.group,
            "this is an EC2 instance"
        );
        self.group.clone_from(&instance.group);
        self.instance = Some(instance);
        Ok(())
    }

    async fn learn_user_data(&mut self) -> Result<(), Vec<String>> {
        let Some(path) = self.settings.user_data.clone() else {
            return Ok(());
        };
        if !path.exists() {
            let imds = self.imds.as_mut().map_err(|why| vec![why.clone()])?;
            let brought = user_data::bring(imds, &path).await;
            brought.map_err(|error| vec![error.to_string()])?;
        }
        self.user_data_known = true;
        Ok(())
    }

    async fn learn_life(&mut self) -> Result<(), Vec<String>> {
        let target = self
            .ask("meta-data/autoscaling/target-lifecycle-state")
            .await?;
        if target != self.target {
            tracing::info!(
                target = target.as_deref().unwrap_or("none"),
                "the group wants another state"
            );
            let seen = match target.as_deref() {
                Some("InService") => Some(Target::InService),
                Some("Terminated") => Some(Target::Terminated),
                _ => None,
            };
            self.target = target;
            if let Some(target) = seen {
                self.tell(Event::Seen(Seen::Target(target)));
            }
        }
        let is_spot = self.instance.as_ref().is_some_and(|i| i.life == "spot");
        if is_spot && !self.spot && self.ask("meta-data/spot/instance-action").await?.is_some() {
            tracing::warn!("the spot market takes this instance back within two minutes");
            self.spot = true;
            self.tell(Event::Seen(Seen::Spot));
        }
        let rebalance = "meta-data/events/recommendations/rebalance";
        if is_spot && !self.rebalance && self.ask(rebalance).await?.is_some() {
            // The group that heeds it begins another instance before it takes this one out. Without one nobody would
            // take over, and the notice may be all that ever comes.
            tracing::warn!(
                "the spot market is likely to take this instance back; the router serves until its group or the \
                 market does"
            );
            self.rebalance = true;
        }
        Ok(())
    }

    async fn learn_networks(&mut self) -> Result<(), Vec<String>> {
        let (Ok(imds), Some(instance)) = (&mut self.imds, &self.instance) else {
            return Ok(());
        };
        let networks = instance.vpc(imds).await.map_err(told)?;
        if networks.is_empty() {
            // Every VPC has one: the answer is not to be believed.
            return Err(vec![format!(
                "the metadata service knows no network of the VPC at the interface {}; it is asked again",
                instance.mac
            )]);
        }
        if self.networks.as_ref() != Some(&networks) {
            tracing::info!(?networks, "the VPC's networks");
            self.networks = Some(networks.clone());
            self.tell(Event::Networks(networks));
        }
        Ok(())
    }

    fn publish(&self) {
        let polled = Job::ALL.into_iter().filter(|job| self.wants(*job));
        // What several jobs suffer from is told once.
        let problems = self.problems.values().flatten().chain(&self.unobeyed);
        let problems: BTreeSet<&String> = problems.collect();
        let report = Report {
            instance: self.instance.clone(),
            asked: self.asked,
            group: self.group.clone(),
            target: self.target.clone(),
            rebalance: self.rebalance,
            networks: self.networks.clone(),
            source_dest_check: self.checked.clone(),
            routes: self.routes.clone(),
            polled: polled.map(Job::words).collect(),
            problems: problems.into_iter().cloned().collect(),
        };
        let before = self.report.borrow().clone();
        if *before == report {
            return;
        }
        for problem in &report.problems {
            if !before.problems.contains(problem) {
                tracing::warn!("{problem}");
            }
        }
        self.report.send_replace(Arc::new(report));
        self.tell(Event::Changed);
    }
}

fn told(error: Error) -> Vec<String> {
    vec![error.to_string()]
}
