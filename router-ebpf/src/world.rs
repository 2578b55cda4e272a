//! Tables and routing in memory: the host's [`Tables`] and [`Steps`], for tests and measurements.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::{BTreeMap, HashMap, HashSet};

use crate::abi::{
    Account, Address, Flow, Fragment, FragmentKey, Link, Overlay, Prefix, Route, Settings, Side,
    Tuple, Way,
};
use crate::decide::{self, decide};
use crate::entry::Entry;
use crate::flow::{self, Draft};
use crate::forward::{Exit, Forward, Nat};
use crate::frame::Frame;
use crate::memory::Memory;
use crate::packet::{Packet, parse};
use crate::steps::Steps;
use crate::tables::{Hop, NO_CLAUSE, Refused, Tables};
use crate::verdict::Verdict;
use crate::{answer, fragment, icmp, mss, rewrite};

/// What the kernel's routing answers about a packet, were it as many bytes long.
pub type Routing = Box<dyn Fn(&Packet, u32) -> Result<Hop, Verdict>>;
/// The clause of the policy that lets a flow through whose first packet has the tuple.
pub type Rules = Box<dyn Fn(&Tuple) -> Option<u16>>;

/// An entry of the flow table, at a place that does not move.
type Place = Box<UnsafeCell<Flow>>;

/// A router's tables, and the kernel around them.
pub struct World {
    /// The settings.
    pub settings: Settings,
    /// Interface that the packets of each side come in by.
    pub ingress: [u32; 2],
    /// The peers' allowed IPs, each with its peer.
    pub overlay: Vec<(Prefix, Overlay)>,
    /// The router's own addresses.
    pub own: Vec<Address>,
    /// The advertised routes.
    pub routes: Vec<(Prefix, Route)>,
    /// The subnet-side NICs.
    pub links: BTreeMap<u32, Link>,
    /// What the kernel's masquerade takes by link and prefix, as in [`Address::octets`].
    pub masquerade: Vec<(u32, Prefix, [u8; 16])>,
    /// The policy; asked when [`Settings::bank`] is not zero.
    pub rules: Rules,
    /// The kernel's routing.
    pub routing: Routing,
    /// What sockets of the router wait for.
    pub sockets: HashSet<Tuple>,
    /// `CLOCK_MONOTONIC` in ns.
    pub now: u64,
    /// Answers that may still be sent.
    pub errors: Cell<u32>,
    /// Most entries of the flow table.
    pub entries: usize,
    random: Cell<u32>,
    flows: RefCell<HashMap<(Side, Tuple), Place>>,
    /// Entries that were taken out: as in the kernel, whoever found one may still look at it.
    removed: RefCell<Vec<Place>>,
    sources: RefCell<HashMap<Account, u32>>,
    fragments: RefCell<HashMap<FragmentKey, Fragment>>,
}

impl World {
    /// A router without peers, routes, rules and next hops.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            ingress: [0; 2],
            overlay: Vec::new(),
            own: Vec::new(),
            routes: Vec::new(),
            links: BTreeMap::new(),
            masquerade: Vec::new(),
            rules: Box::new(|_| None),
            routing: Box::new(|_, _| Err(Verdict::SlowFib)),
            sockets: HashSet::new(),
            now: 0,
            errors: Cell::new(u32::MAX),
            entries: usize::MAX,
            random: Cell::new(1),
            flows: RefCell::default(),
            removed: RefCell::default(),
            sources: RefCell::default(),
            fragments: RefCell::default(),
        }
    }

    /// What the program of `side` makes of the packet in `frame`; of a packet that is neither
    /// dropped nor the kernel's, also where it leaves to.
    pub fn run(&mut self, side: Side, frame: &mut Memory) -> (Verdict, Option<Forward>) {
        self.removed.get_mut().clear();
        let view = View { world: self, side };
        let mut forward = Forward::default();
        match view.process(side, frame, &mut forward) {
            Ok(()) => (forward.verdict, Some(forward)),
            Err(verdict) => (verdict, None),
        }
    }

    /// The tables as the program of `side` sees them.
    pub fn view(&self, side: Side) -> View<'_> {
        View { world: self, side }
    }

    /// Every entry of the flow table, in no order.
    pub fn flows(&self) -> Vec<(Side, Tuple, Flow)> {
        let flows = self.flows.borrow();
        let entry = |((side, tuple), flow): (&(Side, Tuple), &Place)| {
            // SAFETY: entries are written through shared references of this thread only, each of
            // which ends with the call that made it.
            (*side, *tuple, unsafe { *flow.get() })
        };
        flows.iter().map(entry).collect()
    }

    /// Takes out both entries of flows, as user space does when they are due.
    pub fn end(&mut self, mut due: impl FnMut(Side, &Tuple, &Flow) -> bool) {
        for (side, tuple, flow) in self.flows() {
            if due(side, &tuple, &flow) {
                let (other_side, other) = flow.other(side, &tuple);
                self.flows.get_mut().remove(&(side, tuple));
                self.flows.get_mut().remove(&(other_side, other));
            }
        }
        self.sources.get_mut().clear();
        for (side, tuple, flow) in self.flows() {
            if side != Side::Overlay {
                continue;
            }
            let accounts = if flow.flags & Flow::FROM_SUBNET != 0 {
                let host = &tuple.destination;
                [Some(Account::host(host)), Some(Account::subnet(host))]
            } else {
                let view = self.view(side);
                let peer = view.peer(&Prefix::host(tuple.source));
                [
                    peer.map(|peer| Account::peer(peer.peer, &tuple.source)),
                    None,
                ]
            };
            for account in accounts.into_iter().flatten() {
                *self.sources.get_mut().entry(account).or_default() += 1;
            }
        }
    }

    /// Forgets all flows and fragments.
    pub fn clear(&mut self) {
        self.flows.get_mut().clear();
        self.sources.get_mut().clear();
        self.fragments.get_mut().clear();
    }
}

/// A [`World`] as the program of one side sees it.
#[derive(Clone, Copy)]
pub struct View<'a> {
    world: &'a World,
    side: Side,
}

impl View<'_> {
    /// Parses the packet, decides about it, and carries that out.
    fn process(self, side: Side, frame: &mut Memory, forward: &mut Forward) -> Result<(), Verdict> {
        let mut packet = Packet::default();
        parse(side, frame, &mut packet).map_err(|verdict| match side {
            Side::Overlay => verdict,
            Side::Subnet => Verdict::PassUnrelated,
        })?;
        match decide(side, &mut packet, frame, &self, forward) {
            Err(Verdict::DropPolicy) => answer::reject(side, &packet, &self, forward)?,
            Ok(()) if forward.exit == Exit::Answer && !answer::may_send(&packet, &self) => {
                return Err(forward.verdict);
            }
            outcome => outcome?,
        }
        if forward.exit == Exit::Answer {
            return answer::send(&packet, forward, frame);
        }
        rewrite::apply(side, &packet, forward, &self, frame)
    }
}

fn contains(cidr: &Prefix, address: &Prefix) -> bool {
    let bits = |prefix: &Prefix| {
        let octets = u128::from_be_bytes(prefix.address.octets);
        let len = cidr.len - 8 * size_of::<[u8; 4]>() as u32;
        octets.checked_shr(128 - len).unwrap_or(0)
    };
    cidr.address.family == address.address.family && bits(cidr) == bits(address)
}

impl Tables for View<'_> {
    fn settings(&self) -> Option<&Settings> {
        Some(&self.world.settings)
    }

    fn ingress(&self) -> u32 {
        self.world.ingress[self.side as usize]
    }

    fn now(&self) -> u64 {
        self.world.now
    }

    fn random(&self) -> u32 {
        // The generator of Numerical Recipes; the high bits are the good ones.
        let state = self.world.random.get();
        let state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.world.random.set(state);
        state.rotate_left(16)
    }

    fn peer(&self, address: &Prefix) -> Option<&Overlay> {
        let overlay = self.world.overlay.iter();
        let around = overlay.filter(|(cidr, _)| contains(cidr, address));
        let (_, peer) = around.max_by_key(|(cidr, _)| cidr.len)?;
        (!self.world.own.contains(&address.address)).then_some(peer)
    }

    fn route(&self, address: &Prefix) -> Option<Route> {
        let routes = self.world.routes.iter();
        let longest = routes
            .filter(|(cidr, _)| contains(cidr, address))
            .max_by_key(|(cidr, _)| cidr.len)?;
        Some(longest.1)
    }

    fn link(&self, index: u32) -> Option<&Link> {
        self.world.links.get(&index)
    }

    fn masquerade(&self, way: &Way, flow: &mut Flow) -> bool {
        let toward = Prefix::host(way.toward);
        let table = self.world.masquerade.iter();
        let longest = table
            .filter(|(link, net, _)| link.to_ne_bytes() == way.link && contains(net, &toward))
            .max_by_key(|(_, net, _)| net.len);
        if let Some((.., address)) = longest {
            flow.address = *address;
        }
        longest.is_some()
    }

    fn permits(&self, class: u32, tuple: &Tuple, settings: &Settings) -> Result<u16, Verdict> {
        if settings.is_open(class) {
            return Ok(NO_CLAUSE);
        }
        (self.world.rules)(tuple).ok_or(Verdict::DropPolicy)
    }

    fn count_clause(&self, _: u16, _: &Settings) {}

    fn flow(&self, side: Side, tuple: &Tuple) -> Option<Entry<'_>> {
        let flows = self.world.flows.borrow();
        let flow = flows.get(&(side, *tuple))?.get();
        // SAFETY: a box does not move, and one that is taken out goes to `removed`, which only a
        // method with exclusive access empties.
        Some(unsafe { Entry::new(flow) })
    }

    fn add_flow(&self, side: Side, tuple: &Tuple, flow: &Flow) -> Result<(), Refused> {
        let mut flows = self.world.flows.borrow_mut();
        let full = flows.len() >= self.world.entries;
        match flows.entry((side, *tuple)) {
            std::collections::hash_map::Entry::Occupied(_) => Err(Refused::Exists),
            _ if full => Err(Refused::Full),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(Box::new(UnsafeCell::new(*flow)));
                Ok(())
            }
        }
    }

    fn remove_flow(&self, side: Side, tuple: &Tuple) {
        if let Some(flow) = self.world.flows.borrow_mut().remove(&(side, *tuple)) {
            self.world.removed.borrow_mut().push(flow);
        }
    }

    fn take_place(&self, account: &Account, limit: u32) -> bool {
        let mut sources = self.world.sources.borrow_mut();
        let count = sources.entry(*account).or_default();
        let room = *count < limit;
        *count += u32::from(room);
        room
    }

    fn give_place_back(&self, account: &Account) {
        if let Some(count) = self.world.sources.borrow_mut().get_mut(account) {
            *count = count.saturating_sub(1);
        }
    }

    fn is_socket(&self, tuple: &Tuple) -> bool {
        self.world.sockets.contains(tuple)
    }

    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.world.fragments.borrow().get(key).copied()
    }

    fn add_fragment(&self, key: &FragmentKey, fragment: Fragment) {
        self.world.fragments.borrow_mut().insert(*key, fragment);
    }

    fn may_send_error(&self) -> bool {
        let left = self.world.errors.get();
        self.world.errors.set(left.saturating_sub(1));
        left > 0
    }

    fn claim(&self, reply: &Tuple, flow: &Flow) -> Result<(), Refused> {
        if self.is_socket(reply) {
            return Err(Refused::Exists);
        }
        self.add_flow(Side::Subnet, reply, flow)
    }

    fn next_hop(&self, packet: &Packet, len: u32, _: &Settings) -> Result<Hop, Verdict> {
        (self.world.routing)(packet, len)
    }
}

impl Steps for View<'_> {
    type Stop = Verdict;

    fn find_flow<F: Frame>(
        &self,
        side: Side,
        packet: &mut Packet,
        frame: &F,
    ) -> Result<bool, Verdict> {
        decide::find_flow(side, packet, frame, self)
    }

    fn open(&self, side: Side, packet: &Packet) -> Result<(), Verdict> {
        let draft = &mut Draft::default();
        flow::draft(side, packet, self, draft)?;
        flow::enter(side, draft, self)
    }

    fn judge(&self, side: Side, packet: &Packet, entry: Entry<'_>) -> Result<(), Verdict> {
        flow::judge(side, packet, entry, self)
    }

    fn probe_mtu(&self, packet: &Packet, entry: Entry<'_>) -> Result<(), Verdict> {
        flow::probe_mtu(packet, entry, self)
    }

    fn look_across(&self, side: Side, packet: &Packet, entry: Entry<'_>) -> bool {
        flow::look_across(side, packet, entry, self)
    }

    fn is_routers(&self, packet: &Packet, entry: Entry<'_>) -> bool {
        flow::is_routers(packet, entry, self)
    }

    fn lead(
        &self,
        side: Side,
        packet: &Packet,
        entry: Entry<'_>,
        stack: bool,
    ) -> Result<(), Verdict> {
        fragment::lead(side, packet, entry, self, stack)
    }

    fn clamp_mss<F: Frame>(
        &self,
        side: Side,
        packet: &Packet,
        forward: &Forward,
        frame: &mut F,
    ) -> Result<(), Verdict> {
        let limit = mss::limit(side, packet, forward, self)?;
        let (at, len) = (packet.transport_at, packet.transport_len);
        mss::clamp(frame, at, len, limit, &mut mss::Options::default())
    }

    fn translate_quote<F: Frame>(
        &self,
        side: Side,
        packet: &Packet,
        nat: &Nat,
        frame: &mut F,
    ) -> Result<(), Verdict> {
        icmp::translate_quote(side, packet, nat, frame)
    }
}
