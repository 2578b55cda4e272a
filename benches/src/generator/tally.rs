//! What became of a run's packets.

use super::packet::Stamp;

/// How far behind the newest packet of its flow a packet may be and still be judged.
const WINDOW: u64 = 1024;

/// What a receiver saw of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Different packets that arrived whole.
    pub received: u64,
    /// Packets that arrived once more.
    pub duplicated: u64,
    /// Packets that a later one of their flow had overtaken (RFC 4737 section 3.3).
    pub reordered: u64,
    /// Packets whose content was not what was sent.
    pub corrupted: u64,
}

/// Judges packets one by one.
pub(crate) struct Judge {
    run: u32,
    flows: Vec<Seen>,
    tally: Tally,
}

/// What was seen of one flow.
#[derive(Clone)]
struct Seen {
    /// The sequence number after the highest seen.
    next: u64,
    /// The last [`WINDOW`] sequence numbers below `next`, one bit each.
    window: [u64; (WINDOW / 64) as usize],
}

impl Judge {
    pub(crate) fn new(run: u32, flows: u32) -> Self {
        let unseen = Seen {
            next: 0,
            window: [0; (WINDOW / 64) as usize],
        };
        Self {
            run,
            flows: vec![unseen; flows as usize],
            tally: Tally::default(),
        }
    }

    /// Takes a payload as it arrived. Left-overs of other runs do not count.
    pub(crate) fn take(&mut self, payload: &[u8]) {
        let Some(stamp) = Stamp::read(payload) else {
            self.tally.corrupted += 1;
            return;
        };
        if stamp.run != self.run {
            return;
        }
        let Some(flow) = self.flows.get_mut(stamp.flow as usize) else {
            self.tally.corrupted += 1;
            return;
        };
        match flow.see(stamp.sequence) {
            Order::Next => self.tally.received += 1,
            Order::Overtaken => {
                self.tally.received += 1;
                self.tally.reordered += 1;
            }
            Order::Again => self.tally.duplicated += 1,
        }
    }

    /// Counts something that was meant for this receiver and is not even a payload.
    pub(crate) fn take_broken(&mut self) {
        self.tally.corrupted += 1;
    }

    pub(crate) fn tally(&self) -> Tally {
        self.tally
    }
}

enum Order {
    Next,
    Overtaken,
    Again,
}

impl Seen {
    fn see(&mut self, sequence: u64) -> Order {
        if sequence >= self.next {
            let skipped = (sequence - self.next).min(WINDOW);
            for i in 0..skipped {
                self.clear(sequence - 1 - i);
            }
            self.set(sequence);
            self.next = sequence + 1;
            return Order::Next;
        }
        // Too old to tell whether it came before: it is taken for late, not for doubled.
        if self.next - sequence > WINDOW {
            return Order::Overtaken;
        }
        if self.window[Self::word(sequence)] & Self::bit(sequence) != 0 {
            return Order::Again;
        }
        self.set(sequence);
        Order::Overtaken
    }

    fn word(sequence: u64) -> usize {
        (sequence % WINDOW / 64) as usize
    }

    fn bit(sequence: u64) -> u64 {
        1 << (sequence % 64)
    }

    fn set(&mut self, sequence: u64) {
        self.window[Self::word(sequence)] |= Self::bit(sequence);
    }

    fn clear(&mut self, sequence: u64) {
        self.window[Self::word(sequence)] &= !Self::bit(sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(order: &[(u32, u64)]) -> Tally {
        let mut judge = Judge::new(1, 2);
        let mut payload = [0; 40];
        for &(flow, sequence) in order {
            Stamp {
                run: 1,
                flow,
                sequence,
            }
            .write(&mut payload);
            judge.take(&payload);
        }
        judge.tally()
    }

    #[test]
    fn loss_reordering_and_doubles_are_told_apart() {
        let expected = Tally {
            received: 4,
            duplicated: 1,
            reordered: 1,
            corrupted: 0,
        };
        // Sequence 2 is lost, 1 comes late and twice; flow 1 is on its own.
        assert_eq!(tally(&[(0, 0), (0, 3), (0, 1), (0, 1), (1, 0)]), expected);
    }

    #[test]
    fn the_window_wraps_without_false_doubles() {
        let mut order: Vec<(u32, u64)> = (0..5000).map(|s| (0, s)).collect();
        order.push((0, 5000 + 3 * WINDOW));
        order.push((0, 5000 + 3 * WINDOW - 1));
        order.push((0, 10));
        let expected = Tally {
            received: 5003,
            duplicated: 0,
            reordered: 2,
            corrupted: 0,
        };
        assert_eq!(tally(&order), expected);
    }

    #[test]
    fn other_runs_do_not_count_and_foreign_flows_are_corruption() {
        let mut judge = Judge::new(1, 2);
        let mut payload = [0; 40];
        Stamp {
            run: 2,
            flow: 0,
            sequence: 0,
        }
        .write(&mut payload);
        judge.take(&payload);
        assert_eq!(judge.tally(), Tally::default());
        Stamp {
            run: 1,
            flow: 2,
            sequence: 0,
        }
        .write(&mut payload);
        judge.take(&payload);
        judge.take(&payload[..30]);
        judge.take_broken();
        assert_eq!(judge.tally().corrupted, 3);
    }
}
