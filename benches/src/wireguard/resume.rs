//! A router that goes and comes back: how long until its peers have sessions again, which it begins
//! itself with all of them at once.

use std::time::{Duration, Instant};

use super::Lazy;
use super::bed::Bed;
use crate::case::{Case, CaseId, Failure, Measurement, Outcome, Round};

/// From the end of one daemon to the last session of the next.
const PATIENCE: Duration = Duration::from_secs(30);

/// A case of the scale suite.
pub(super) struct Resume {
    pub(super) id: CaseId,
    /// Those who had sessions.
    pub(super) peers: u16,
    pub(super) bed: Lazy,
}

impl Case for Resume {
    fn id(&self) -> &CaseId {
        &self.id
    }

    fn run(&mut self, round: Round) -> Result<Outcome, Failure> {
        if round.warm_up {
            // Every run starts a process anew: there is nothing to warm up.
            return Ok(Outcome::default());
        }
        let measured = self.bed.with(|bed| self.measure(bed))?;
        Ok(measured.into())
    }
}

impl Resume {
    fn measure(&self, bed: &mut Bed) -> Result<Vec<Measurement>, Failure> {
        let _pinned = bed.at_the_ends()?;
        let generator = bed.generator(self.peers)?;
        let begin = Instant::now();
        bed.hand_over()?;
        let resumed = generator.await_sessions(PATIENCE)?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(vec![
            // From the first message of the new daemon to the first one of the last session.
            Measurement::lower("resumed", "ms", ms(resumed.last - resumed.first)),
            Measurement::lower("away", "ms", ms(resumed.last - begin)),
            Measurement::fact("peers", "peers", self.peers.into()),
        ])
    }
}
