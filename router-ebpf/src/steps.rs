//! The steps of a decision that the programs do apart from it.

use crate::abi::Side;
use crate::entry::Entry;
use crate::forward::{Forward, Nat};
use crate::frame::Frame;
use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::Verdict;

/// The rare steps of a decision and of what carries it out. The programs have each in a function of its
/// own, which the verifier judges by itself; what a step does is the function that its comment names.
pub trait Steps: Tables {
    /// Why a packet goes no further. On the host that is always a verdict; a program may suspend a packet
    /// until a step is done for which there is no room on the stack in the middle of a decision.
    type Stop: From<Verdict>;

    /// [`crate::decide::find_flow`].
    fn find_flow<F: Frame>(
        &self,
        side: Side,
        packet: &mut Packet,
        frame: &F,
    ) -> Result<bool, Self::Stop>;

    /// [`crate::flow::draft`], then [`crate::flow::enter`].
    fn open(&self, side: Side, packet: &Packet) -> Result<(), Self::Stop>;

    /// [`crate::flow::judge`].
    fn judge(&self, side: Side, packet: &Packet, entry: Entry<'_>) -> Result<(), Self::Stop>;

    /// [`crate::flow::probe_mtu`].
    fn probe_mtu(&self, packet: &Packet, entry: Entry<'_>) -> Result<(), Verdict>;

    /// [`crate::flow::look_across`].
    fn look_across(&self, side: Side, packet: &Packet, entry: Entry<'_>) -> bool;

    /// [`crate::flow::is_routers`].
    fn is_routers(&self, packet: &Packet, entry: Entry<'_>) -> bool;

    /// [`crate::fragment::lead`].
    fn lead(
        &self,
        side: Side,
        packet: &Packet,
        entry: Entry<'_>,
        stack: bool,
    ) -> Result<(), Verdict>;

    /// [`crate::mss::clamp`] with the TCP header of the SYN `packet`, to [`crate::mss::limit`].
    fn clamp_mss<F: Frame>(
        &self,
        side: Side,
        packet: &Packet,
        forward: &Forward,
        frame: &mut F,
    ) -> Result<(), Verdict>;

    /// [`crate::icmp::translate_quote`].
    fn translate_quote<F: Frame>(
        &self,
        side: Side,
        packet: &Packet,
        nat: &Nat,
        frame: &mut F,
    ) -> Result<(), Self::Stop>;
}
