//! The reading of a primary's whole image: after a recovery, a promotion, and at the end.
//!
//! Owns: the parts not yet read. Invariant: no request of the workload is submitted before the image is
//! known to be that of the journal's last record (I1, I4, I5).

use crate::content::{SECTOR, WriteId, parse_run};
use crate::history::Image;
use crate::scenario::Phase;
use crate::workload::Asked;
use crate::world::{Outcome, World, broken};
use bytes::Bytes;
use volrep::node::event::Op;
use volrep::units::{Address, Extent, Hash};

/// The parts that are still to be read, and what has been read.
pub struct Reading {
    left: Vec<Extent>,
    outstanding: usize,
    image: Image,
    /// What is read is the truth from here on: the node was promoted.
    rebase: bool,
}

impl World {
    /// Begins to read the whole image of a primary.
    pub fn begin_verify(&mut self, node: usize) -> Outcome {
        let chunk = self.scenario.rng.log(16 << 10, 4 << 20) / 4096 * 4096;
        let mut left = Vec::new();
        for &(number, size, _) in &self.plan.volumes {
            for at in (0..size).step_by(chunk as usize) {
                let address = Address::new(number, at).expect("within a small volume");
                left.push(Extent::new(address, chunk.min(size - at)).expect("whole sectors"));
            }
        }
        self.scenario.rng.shuffle(&mut left);
        let image =
            (0..self.model.volumes.len()).map(|v| vec![0; self.model.volume_sectors(v) as usize]).collect();
        let rebase = self.scenario.rebase;
        self.scenario.verify = Some(Reading { left, outstanding: 0, image, rebase });
        self.start_step(node);
        self.verify_on(node)
    }

    fn verify_on(&mut self, node: usize) -> Outcome {
        while let Some(v) = &mut self.scenario.verify
            && v.outstanding < 4
            && let Some(extent) = v.left.pop()
        {
            v.outstanding += 1;
            let tick = self.model.tick();
            self.issue(node, Op::Read(extent), Asked::Verify { extent, tick })?;
        }
        Ok(())
    }

    /// A part of the image came back.
    pub fn verified(&mut self, node: usize, extent: Extent, bytes: &Bytes, tick: u64) -> Outcome {
        let Some(v) = &mut self.scenario.verify else {
            return Ok(());
        };
        v.outstanding -= 1;
        if bytes.is_empty() {
            v.left.push(extent); // its disk failed once
            return self.verify_on(node);
        }
        let number = extent.address().volume();
        let first = extent.address().offset() / SECTOR as u64;
        let ids = parse_run(bytes, number, first).or_else(|text| broken("I12", text))?;
        let volume = self.model.volume_index(number).expect("a volume of the plan");
        v.image[volume][first as usize..first as usize + ids.len()].copy_from_slice(&ids);
        if !v.rebase {
            self.counts.check("I6");
            self.counts.check("I3");
            self.model
                .check_read(extent, bytes, tick)
                .or_else(|text| broken("I3", format!("after a recovery: {text}")))?;
        }
        let finished = v.left.is_empty() && v.outstanding == 0;
        if finished { self.image_read(node) } else { self.verify_on(node) }
    }

    /// The whole image was read: it must be the image of the journal's last record.
    fn image_read(&mut self, node: usize) -> Outcome {
        let Some(v) = self.scenario.verify.take() else {
            return Ok(());
        };
        let tail = self.tail_hash(node)?;
        self.counts.check("I1");
        self.same_image(&v.image, tail, "after a recovery")?;
        for shadow in 0..self.hosts.len() {
            if let Some(applied) = self.hosts[shadow].watch.applied
                && !v.rebase
                && !self.scenario.promoted
                && !self.history.includes(tail, applied.hash)
            {
                return broken(
                    "I1",
                    format!("the primary came back without {applied:?}, which {shadow} had applied"),
                );
            }
        }
        if v.rebase {
            self.check_promoted(node, &v.image, tail)?;
            self.model.rebase(&v.image);
            self.marks.since = self.model.tick();
            self.scenario.rebase = false;
        }
        if self.scenario.phase() != Phase::Join {
            self.work.open = true;
            self.work.progress = self.now;
            self.kick();
        }
        Ok(())
    }

    /// A promoted shadow holds what it said it had applied, and what was promised to be there.
    fn check_promoted(&mut self, node: usize, image: &[Vec<WriteId>], tail: Hash) -> Outcome {
        self.counts.check("I5");
        if let Some(applied) = self.hosts[node].watch.applied
            && !self.history.includes(tail, applied.hash)
        {
            return broken("I5", format!("promoted without {applied:?}, which it had reported as applied"));
        }
        self.check_rewound(node, tail)?;
        let watch = &self.hosts[node].watch;
        if watch.cut.is_some() || watch.second || self.accepted_loss(node) {
            return Ok(()); // that was promised, and is given up
        }
        self.counts.check("I4");
        if self.claims_everything(node) {
            self.counts.met("promoted as one that holds everything");
            if let Some(text) = self.model.missing(image, |w| w.flushed) {
                return broken("I4", format!("promoted as one that holds everything: {text}"));
            }
        }
        let bit = 1u8 << node;
        match self.model.missing(image, |w| w.remote & bit != 0) {
            None => Ok(()),
            Some(text) => broken("I4", format!("promoted member of the sync set: {text}")),
        }
    }

    /// The chain hash of a node's last record.
    pub fn tail_hash(&mut self, node: usize) -> Result<Hash, crate::world::Violation> {
        let Some(s) = self.poll(node)? else {
            return broken("contract", "gone while it was looked at");
        };
        let watch = &self.hosts[node].watch;
        match watch.at(s.tail_lsn, self.history.origin) {
            Some(hash) => Ok(hash),
            None => broken("I1", format!("its tail {} was never written to its journal", s.tail_lsn)),
        }
    }

    pub fn same_image(&self, image: &[Vec<WriteId>], tail: Hash, when: &str) -> Outcome {
        let expected = self.history.image(tail);
        for (volume, (is, should)) in image.iter().zip(&expected).enumerate() {
            if let Some(sector) = is.iter().zip(should).position(|(a, b)| a != b) {
                let lsn = self.history.get(tail).map_or(0, |e| e.lsn.0);
                let text = format!(
                    "{when}: volume {volume} sector {sector} is of write {}, the records up to {lsn} say {}",
                    is[sector], should[sector]
                );
                return broken("I1", text);
            }
        }
        Ok(())
    }
}
