//! The maps that user space fills, each changed only where it differs from what is wanted.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;

use aya::Pod;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, HashMap, IterableMap as _, LpmTrie, MapData, MapError};
use aya::util::KernelVersion;
use ipnet::IpNet;
use router_ebpf::abi::{self, Address, Prefix, Settings, Way, WayPrefix};

use super::banks::{Banks, News};
use super::sys::update_batch;
use super::{failed, routes, take_map};
use crate::control::Denied;
use crate::datapath::limits::Limits;
use crate::datapath::policy;
use crate::datapath::{Error, External, OverlayChange, Spec};

/// Since this kernel a FIB lookup answers with the path's MTU.
const FIB_MTU_KERNEL: KernelVersion = KernelVersion::new(5, 12, 0);

/// The maps.
pub(super) struct Tables {
    settings: Array<MapData, Settings>,
    /// What is in `settings`.
    current: Settings,
    banks: Banks,
    limits: Limits,
    routes: Mirror<Prefix, abi::Route>,
    links: Mirror<u32, abi::Link>,
    masquerade: Mirror<WayPrefix, [u8; 16]>,
}

impl Tables {
    /// Takes the maps out of the loaded object.
    pub(super) fn take(programs: &mut aya::Ebpf, limits: Limits) -> Result<Self, Error> {
        let settings: Array<_, Settings> = take_map(programs, abi::SETTINGS)?;
        let current = settings.get(&0, 0);
        let routes: LpmTrie<_, Address, abi::Route> = take_map(programs, abi::ROUTES)?;
        let links: HashMap<_, u32, abi::Link> = take_map(programs, abi::LINKS)?;
        let masquerade: LpmTrie<_, Way, [u8; 16]> = take_map(programs, abi::MASQUERADE)?;
        Ok(Self {
            settings,
            current: current.map_err(|error| failed("read the eBPF settings", error))?,
            banks: Banks::take(programs)?,
            limits,
            routes: Mirror::new(routes, "routes", abi::MAX_ROUTES),
            links: Mirror::new(links, "subnet-side NICs", abi::MAX_LINKS),
            masquerade: Mirror::new(masquerade, "external addresses", abi::MAX_MASQUERADE),
        })
    }

    /// Makes the maps say what `spec` says.
    pub(super) fn install(&mut self, spec: &Spec) -> Result<News, Error> {
        let routes = routes::with_mtus(&spec.routes, &spec.route_mtus);
        let links = spec
            .subnet
            .iter()
            .filter_map(|link| {
                let mtu = mtu(&link.name)
                    .map_err(|error| failed(format!("read the MTU of {}", link.name), error));
                // One that has just gone is not served: the next spec tells of it.
                Some(mtu.transpose()?.map(|mtu| {
                    let external = spec.external.get(&link.index);
                    let chosen = external.map_or(&[][..], |external| &external.chosen);
                    (link.index, link_value(mtu, chosen))
                }))
            })
            .collect::<Result<_, Error>>()?;
        let (bank, taken) = self.banks.stage(spec)?;
        let others = [
            self.masquerade.install(masquerade(&spec.external))?,
            self.links.install(links)?,
            self.routes.install(routes)?,
        ];
        let settings = Settings {
            generation: self.current.generation,
            bank,
            flows_per_source: self.limits.flows_per_source,
            flows_from_subnet: self.limits.flows_from_subnet(),
            ..settings(spec)
        };
        // Last: the new generation makes the programs judge by the new tables.
        if taken || others.contains(&true) || settings != self.current {
            self.write(Settings {
                generation: next_generation(self.current.generation),
                ..settings
            })?;
        }
        Ok(self.banks.commit())
    }

    /// Changes the peers alone.
    pub(super) fn change_peers(&mut self, change: &OverlayChange) -> Result<News, Error> {
        if self.banks.change_peers(change)? {
            self.bump_generation()?;
        }
        Ok(self.banks.commit())
    }

    /// The peers' allowed IPs as they are in force.
    pub(super) fn allowed(&self) -> BTreeMap<IpNet, u32> {
        self.banks.allowed()
    }

    /// New flows let through by each rule of the policy in force.
    pub(super) fn rule_hits(&self) -> Result<Vec<u64>, Error> {
        self.banks.hits()
    }

    /// The generation in force.
    pub(super) fn generation(&self) -> u32 {
        self.current.generation
    }

    /// Has every flow judged anew, and its next hop found anew, by its next packet.
    pub(super) fn bump_generation(&mut self) -> Result<(), Error> {
        self.write(Settings {
            generation: next_generation(self.current.generation),
            ..self.current
        })
    }

    fn write(&mut self, settings: Settings) -> Result<(), Error> {
        self.settings
            .set(0, settings, 0)
            .map_err(|error| failed("write the eBPF settings", error))?;
        self.current = settings;
        Ok(())
    }
}

/// Has the generations begin behind the one by which flows were judged that are taken over: each is
/// judged anew before its next packet passes.
pub(super) fn begin_behind(programs: &mut aya::Ebpf, generation: u32) -> Result<(), Error> {
    let context = "write the eBPF settings";
    let map = programs.map_mut(abi::SETTINGS);
    let map = map.ok_or_else(|| failed(context, "the object does not have them"))?;
    let settings = Settings {
        abi_version: abi::ABI_VERSION,
        generation,
        ..Settings::default()
    };
    Array::<_, Settings>::try_from(map)
        .and_then(|mut map| map.set(0, settings, 0))
        .map_err(|error| failed(context, error))
}

/// Zero is what no flow was ever judged by.
fn next_generation(generation: u32) -> u32 {
    generation.checked_add(1).unwrap_or(1)
}

fn masquerade(external: &BTreeMap<u32, External>) -> BTreeMap<WayPrefix, [u8; 16]> {
    let of_link = |(index, external): (&u32, &External)| {
        let index = *index;
        let table = external.masquerade.clone().into_iter();
        table.map(move |(net, taken)| {
            let way = Way::new(index, address(net.network()));
            let prefix = WayPrefix::toward(way, net.prefix_len());
            (prefix, address(taken).octets)
        })
    };
    external.iter().flat_map(of_link).collect()
}

fn link_value(mtu: u32, external: &[IpAddr]) -> abi::Link {
    let mut link = abi::Link {
        mtu,
        ..abi::Link::default()
    };
    for address in external {
        let (count, slot) = match address {
            IpAddr::V4(_) => (&mut link.v4_count, link.v4.len()),
            IpAddr::V6(_) => (&mut link.v6_count, link.v6.len()),
        };
        let place = usize::from(*count);
        if place == slot {
            continue;
        }
        *count += 1;
        match address {
            IpAddr::V4(address) => link.v4[place] = address.octets(),
            IpAddr::V6(address) => link.v6[place] = address.octets(),
        }
    }
    link
}

fn settings(spec: &Spec) -> Settings {
    let ports = spec.fast_nat_ports().0;
    let ports = [*ports.start(), *ports.end()];
    let mut flags = 0;
    if KernelVersion::current().is_ok_and(|version| version >= FIB_MTU_KERNEL) {
        flags |= Settings::FIB_MTU;
    }
    if spec.policy.denied == Denied::Reject {
        flags |= Settings::REJECT;
    }
    if spec.draining {
        flags |= Settings::DRAINING;
    }
    if !policy::is_restricted(&spec.policy, true) {
        flags |= Settings::OPEN_FROM_OVERLAY;
    }
    if !policy::is_restricted(&spec.policy, false) {
        flags |= Settings::OPEN_TO_OVERLAY;
    }
    Settings {
        abi_version: abi::ABI_VERSION,
        flags,
        tun: spec.tun.index,
        mtu: u32::from(spec.mtu),
        kept_ports: ports,
        ports,
        ..Settings::default()
    }
}

/// An address as a key.
pub(super) fn address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::v4(address.octets()),
        IpAddr::V6(address) => Address::v6(address.octets()),
    }
}

/// The key of a CIDR.
pub(super) fn prefix(cidr: &IpNet) -> Prefix {
    Prefix::cidr(address(cidr.network()), cidr.prefix_len())
}

/// MTU in bytes of the interface `name` in this thread's network namespace; `None`: there is none of
/// that name.
pub(super) fn mtu(name: &str) -> io::Result<Option<u32>> {
    // SAFETY: `ifreq` consists of integers and arrays, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    if name.len() > room {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: the descriptor is open, and the kernel reads and writes one `ifreq`.
    let code = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SIOCGIFMTU as _,
            &raw mut request,
        )
    };
    if code < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENODEV) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: SIOCGIFMTU has filled this member of the union.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    u32::try_from(mtu)
        .map(Some)
        .map_err(|_| io::ErrorKind::InvalidData.into())
}

/// A map of keys and values as [`Mirror`] needs it.
pub(super) trait Store<K, V>: Send + Sync {
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError>;
    /// Puts all of them in one step. `false`: that cannot be, and some may be there.
    fn put_at_once(&mut self, _pairs: &[(K, V)]) -> bool {
        false
    }
    fn delete(&mut self, key: &K) -> Result<(), MapError>;
}

impl<T, V> Store<Prefix, V> for LpmTrie<T, Address, V>
where
    T: Borrow<MapData> + std::borrow::BorrowMut<MapData> + Send + Sync,
    V: Pod + Send + Sync,
{
    fn put(&mut self, key: &Prefix, value: &V) -> Result<(), MapError> {
        self.insert(&Key::new(key.len, key.address), value, 0)
    }

    fn put_at_once(&mut self, pairs: &[(Prefix, V)]) -> bool {
        let key = |(key, _): &(Prefix, V)| Key::new(key.len, key.address);
        let keys: Vec<_> = pairs.iter().map(key).collect();
        let values: Vec<V> = pairs.iter().map(|(_, value)| *value).collect();
        // SAFETY: the map was opened as one of these keys and values, whose sizes aya has compared.
        unsafe { update_batch(self.map().fd().as_fd(), &keys, &values) }.is_ok()
    }

    fn delete(&mut self, key: &Prefix) -> Result<(), MapError> {
        self.remove(&Key::new(key.len, key.address))
    }
}

impl<T, V> Store<WayPrefix, V> for LpmTrie<T, Way, V>
where
    T: Borrow<MapData> + std::borrow::BorrowMut<MapData> + Send + Sync,
    V: Pod + Send + Sync,
{
    fn put(&mut self, key: &WayPrefix, value: &V) -> Result<(), MapError> {
        self.insert(&Key::new(key.len, key.way), value, 0)
    }

    fn delete(&mut self, key: &WayPrefix) -> Result<(), MapError> {
        self.remove(&Key::new(key.len, key.way))
    }
}

impl<T, K, V> Store<K, V> for HashMap<T, K, V>
where
    T: Borrow<MapData> + std::borrow::BorrowMut<MapData> + Send + Sync,
    K: Pod + Send + Sync,
    V: Pod + Send + Sync,
{
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        self.insert(key, value, 0)
    }

    fn delete(&mut self, key: &K) -> Result<(), MapError> {
        self.remove(key)
    }
}

/// A map, and what is in it.
pub(super) struct Mirror<K, V> {
    map: Box<dyn Store<K, V>>,
    content: BTreeMap<K, V>,
    what: &'static str,
    max: usize,
}

impl<K: Ord + Copy, V: PartialEq + Copy> Mirror<K, V> {
    pub(super) fn new(map: impl Store<K, V> + 'static, what: &'static str, max: usize) -> Self {
        Self {
            map: Box::new(map),
            content: BTreeMap::new(),
            what,
            max,
        }
    }

    /// What is in the map.
    pub(super) fn content(&self) -> &BTreeMap<K, V> {
        &self.content
    }

    /// Makes the map hold `wanted`: what is new or changed first, so that no lookup of an entry
    /// that stays ever misses it. Tells whether anything was different.
    pub(super) fn install(&mut self, wanted: BTreeMap<K, V>) -> Result<bool, Error> {
        if wanted.len() > self.max {
            return Err(self.full(wanted.len()));
        }
        let stale = self.content.keys().filter(|key| !wanted.contains_key(key));
        let stale: Vec<K> = stale.copied().collect();
        let mut changed = !stale.is_empty();
        for (key, value) in wanted {
            changed |= self.write(key, value)?;
        }
        for key in stale {
            self.delete(key)?;
        }
        Ok(changed)
    }

    /// Has the map hold one value, and tells whether it was another.
    pub(super) fn put(&mut self, key: K, value: V) -> Result<bool, Error> {
        let count = self.content.len() + 1;
        if count > self.max && !self.content.contains_key(&key) {
            return Err(self.full(count));
        }
        self.write(key, value)
    }

    /// The same for many.
    pub(super) fn put_all(&mut self, mut pairs: Vec<(K, V)>) -> Result<(), Error> {
        pairs.retain(|(key, value)| self.content.get(key) != Some(value));
        let new = pairs
            .iter()
            .filter(|(key, _)| !self.content.contains_key(key));
        let count = self.content.len() + new.count();
        if count > self.max {
            return Err(self.full(count));
        }
        // Only newer kernels take tries in one step.
        if pairs.len() > 1 && self.map.put_at_once(&pairs) {
            self.content.extend(pairs);
            return Ok(());
        }
        let mut pairs = pairs.into_iter();
        pairs.try_for_each(|(key, value)| self.write(key, value).map(drop))
    }

    fn write(&mut self, key: K, value: V) -> Result<bool, Error> {
        if self.content.get(&key) == Some(&value) {
            return Ok(false);
        }
        let outcome = self.map.put(&key, &value);
        outcome.map_err(|error| failed(self.context(), error))?;
        self.content.insert(key, value);
        Ok(true)
    }

    /// Has the map hold nothing for `key`.
    pub(super) fn delete(&mut self, key: K) -> Result<(), Error> {
        if self.content.contains_key(&key) {
            let outcome = self.map.delete(&key);
            outcome.map_err(|error| failed(self.context(), error))?;
            self.content.remove(&key);
        }
        Ok(())
    }

    fn context(&self) -> String {
        format!("write the eBPF map of {}", self.what)
    }

    fn full(&self, count: usize) -> Error {
        let max = self.max;
        failed(
            self.context(),
            format!("{count} are more than its {max} places"),
        )
    }
}
