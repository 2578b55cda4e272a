//! Reading sets back.

use super::{Family, GETSETELEM, INET, Nft, Span, TABLE};
use crate::netlink::Error;
use crate::netlink::wire::{self, attribute, attributes};

/// `NFT_SET_ELEM_INTERVAL_END`.
pub(super) const INTERVAL_END: u32 = 1;

impl Nft {
    /// The contents of a set of addresses, in order.
    pub(crate) fn address_set(
        &mut self,
        table: &str,
        set: &str,
        family: Family,
    ) -> Result<Vec<Span>, Error> {
        let answer = self
            .dump(GETSETELEM, INET, |payload| {
                payload.text(TABLE, table);
                payload.text(2, set);
            })
            .map_err(|refusal| Error::refused(format!("read set {set} of {table}"), refusal))?;
        Ok(spans(&answer, family))
    }
}

impl Nft {
    /// The contents of a set of single addresses, in no order; nothing, when there is no such set.
    pub(crate) fn host_set(&mut self, table: &str, set: &str) -> Result<Vec<u128>, Error> {
        let answer = self.dump(GETSETELEM, INET, |payload| {
            payload.text(TABLE, table);
            payload.text(2, set);
        });
        match answer {
            Ok(answer) => Ok(listed(&answer).map(|(address, _)| address).collect()),
            Err(refusal) if refusal.errno == libc::ENOENT => Ok(Vec::new()),
            Err(refusal) => Err(Error::refused(
                format!("read set {set} of {table}"),
                refusal,
            )),
        }
    }
}

/// The elements in the kernel's answer, as [`edge`] tells them.
fn listed(answer: &[u8]) -> impl Iterator<Item = (u128, bool)> {
    wire::messages(answer)
        .filter_map(|message| attribute(message.payload.get(4..)?, 3))
        .flat_map(attributes)
        .filter_map(|(_, element)| edge(element))
}

/// The ranges in the kernel's answer, which lists where each begins and where it has ended.
fn spans(answer: &[u8], family: Family) -> Vec<Span> {
    let mut edges: Vec<(u128, bool)> = listed(answer).collect();
    // Where one has ended and the next begins, the end comes first.
    edges.sort_unstable_by_key(|(address, begins)| (*address, *begins));
    let mut spans = Vec::with_capacity(edges.len().div_ceil(2));
    let mut open = None;
    for (address, begins) in edges {
        if begins {
            open = open.or(Some(address));
        } else if let (Some(first), Some(last)) = (open.take(), address.checked_sub(1)) {
            spans.push((first, last));
        }
    }
    // A range up to the last address has no end.
    spans.extend(open.map(|first| (first, family.last())));
    spans
}

/// The address of an element, and whether a range begins there.
fn edge(element: &[u8]) -> Option<(u128, bool)> {
    let key = attribute(attribute(element, 1)?, 1)?;
    let mut address = [0; 16];
    address
        .get_mut(16usize.checked_sub(key.len())?..)?
        .copy_from_slice(key);
    let flags = attribute(element, 3)
        .and_then(|flags| wire::field(flags, 0))
        .map_or(0, u32::from_be_bytes);
    Some((u128::from_be_bytes(address), flags & INTERVAL_END == 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::nft::Transaction;
    use crate::netlink::nft::transaction::tests::{of_kind, transaction};
    use proptest::prelude::*;

    /// What is written for a set, as the kernel would send it back: in messages of the same form.
    fn written(family: Family, spans: &[Span]) -> Vec<u8> {
        let mut tx: Transaction<'_> = transaction();
        tx.address_set("s", family, spans);
        of_kind(&tx, crate::netlink::nft::NEWSETELEM)
            .into_iter()
            .flat_map(|message| {
                let mut bytes = ((16 + message.payload.len()) as u32).to_ne_bytes().to_vec();
                bytes.resize(16, 0);
                bytes.extend_from_slice(message.payload);
                bytes
            })
            .collect()
    }

    #[test]
    fn a_set_is_read_as_it_was_written() {
        for family in [Family::V4, Family::V6] {
            let last = family.last();
            for set in [
                &[][..],
                &[(0, last)],
                &[(0, 0), (2, 7), (9, 9), (last - 1, last)],
            ] {
                assert_eq!(spans(&written(family, set), family), set);
            }
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_a_panic(bytes: Vec<u8>) {
            spans(&bytes, Family::V4);
            edge(&bytes);
        }
    }
}
