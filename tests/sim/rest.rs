//! The last look, when everything is at rest.
//!
//! Owns: nothing. Invariant: every image is that of its own journal's end, and they are all the same (I1).

use crate::world::{Outcome, World, broken};
use volrep::disk::File;
use volrep::units::{Address, Extent};

impl World {
    /// After the drain: every backing is the image of its own tail, and they are all the same.
    pub fn last_look(&mut self) -> Outcome {
        let primary = self.scenario.primary;
        let tail = self.tail_hash(primary)?;
        let current: Vec<_> = self.followers().collect();
        for node in std::iter::once(primary).chain(current) {
            let s = self.hosts[node].status.clone().expect("at rest");
            if node != primary && self.excused(&s) {
                self.counts.met(&format!("excused at the end: {}", s.state));
                continue;
            }
            self.counts.check("I1");
            let mut image = Vec::new();
            for &(number, _, _) in &self.plan.volumes {
                let writes = self.hosts[node].disk.writes(File::Backing(number), number);
                image.push(writes.or_else(|text| broken("I12", text))?);
            }
            self.same_image(&image, tail, &format!("at rest, node {node}"))?;
            self.check_marks(node, tail)?;
            if node == primary {
                self.check_at_rest(primary)?;
            }
        }
        Ok(())
    }

    /// The primary's backing agrees with what was answered.
    fn check_at_rest(&mut self, node: usize) -> Outcome {
        for &(number, size, _) in &self.plan.volumes {
            let extent = Extent::new(Address::new(number, 0).expect("small"), size).expect("whole sectors");
            let tick = self.model.tick();
            let content = self.hosts[node].disk.content(File::Backing(number));
            self.model
                .check_read(extent, &content, tick)
                .or_else(|text| broken("I2", format!("at rest: {text}")))?;
        }
        Ok(())
    }
}
