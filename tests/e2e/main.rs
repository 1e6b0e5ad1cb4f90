//! volrep from end to end: the real program, real files, real clients, two nodes over loopback.
//!
//! Owns: nothing. Invariant: nothing outside the scratch places (and the loop devices) is touched, and
//! nothing is left. VOLREP_LONG=1 runs the long forms.

mod bench;
mod cascade;
mod cascade_delay;
mod crash;
mod delay;
#[path = "../descriptors/mod.rs"]
mod descriptors;
mod drill;
mod exits;
mod failback;
mod filesystem;
mod input;
mod interop;
mod model;
mod nbd;
mod outage;
mod outdate;
mod pair;
#[path = "../place/mod.rs"]
mod place;
mod postgres;
mod promote;
mod refresh;
mod resync;
mod shadows;
mod split_brain;
mod switchover;
mod view;
