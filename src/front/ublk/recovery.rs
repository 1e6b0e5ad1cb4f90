//! What becomes of a device that carries a volume's identity when the volume is to be attached.
//!
//! Owns: that decision, as a table. Invariant: a device that a process may still serve is left alone,
//! and one that somebody may use is never deleted; both are told. Who asks holds the group's locks, so
//! a device with the volume's identity is not another's: its server is gone, or going.

use super::abi::{DevInfo, Params, feature, state};
use super::params::{NEEDED, fits};
use crate::front::Volume;

/// How far its life has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Life {
    /// Not started, or stopped: there is no disk.
    Dead,
    /// Its server is there, or not yet quite gone.
    Live,
    /// Its server is gone; requests wait for the next one.
    Quiesced,
    /// A state that this version does not know.
    Unknown,
}

/// What is seen of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// How far its life has come.
    pub life: Life,
    /// It has the features that taking over needs.
    pub able: bool,
    /// It has the volume's size and blocks.
    pub fits: bool,
}

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Serve it again.
    TakeOver,
    /// Look again in a moment: the kernel has not yet taken leave of its server.
    Wait,
    /// Delete it, and make a new one.
    Delete,
    /// Delete it, and make a new one, if nobody uses it; otherwise leave it and say so.
    DeleteUnused,
}

impl Seen {
    /// What a device's information says.
    pub fn new(volume: &Volume, info: &DevInfo, params: &Params) -> Seen {
        let life = match info.state {
            state::DEAD => Life::Dead,
            state::LIVE => Life::Live,
            state::QUIESCED => Life::Quiesced,
            _ => Life::Unknown,
        };
        let able = info.flags & NEEDED == NEEDED && info.flags & feature::UNPRIVILEGED_DEV == 0;
        Seen { life, able, fits: fits(volume, params) }
    }
}

/// The table.
pub fn decide(seen: Seen) -> Decision {
    match seen {
        // Made, and its maker died before it was a disk; or stopped, and not yet deleted.
        Seen { life: Life::Dead, .. } => Decision::Delete,
        Seen { life: Life::Live, .. } => Decision::Wait,
        Seen { life: Life::Quiesced, able: true, fits: true } => Decision::TakeOver,
        Seen { life: Life::Quiesced | Life::Unknown, .. } => Decision::DeleteUnused,
    }
}
