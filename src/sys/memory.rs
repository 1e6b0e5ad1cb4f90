//! The program's allocator: large buffers from an arena of pages; everything else is the system's.
//!
//! Owns: the arena. Records, the payloads of requests and what is read from disks are buffers of some kilobytes to a
//! megabyte, aligned to pages, that live for milliseconds on any thread. The system's allocator cuts such ones out of larger
//! pieces, keeps what is left over in each thread's arena, and can't give locked memory back from the middle of one: it
//! grew to several times of what was in use. A mapping for each would cost its page faults, more than the bytes in it cost
//! to copy. Here a free run of pages is free for a buffer of any size, the lowest that is long enough is taken, and
//! what finds no room has a mapping of its own for as long as it lives. Invariant: a page is free, or part of one buffer;
//! so of what is freed at most [`ARENA`] bytes are kept.

use nix::libc;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

const PAGE: usize = 4096;
/// Anything of this size is a buffer, and what is aligned to pages is one, whatever its size.
const LARGE: usize = 64 << 10;
/// Bytes of the arena. A busy node should find room in it for all that it uses at a time; it is most of
/// what the process holds when it has been busy.
const ARENA: usize = 48 << 20;
const WORDS: usize = ARENA / PAGE / 64;

/// The allocator.
pub struct Buffers {
    arena: Mutex<Arena>,
}

struct Arena {
    /// Its address; 0 before the first buffer, 1 when the kernel has no room for it.
    base: usize,
    /// A bit for each page: it is free.
    free: [u64; WORDS],
    /// No page is free in the words before this one.
    low: usize,
}

/// What is a buffer of ours; otherwise it is the system's.
const fn ours(layout: &Layout) -> bool {
    let (size, align) = (layout.size(), layout.align());
    align <= PAGE && size > 0 && (size >= LARGE || align == PAGE)
}

/// Bytes of the pages that a buffer takes.
const fn whole(bytes: usize) -> usize {
    bytes.div_ceil(PAGE) * PAGE
}

impl Buffers {
    /// Nothing is mapped before it is needed.
    pub const fn new() -> Buffers {
        Buffers { arena: Mutex::new(Arena { base: 0, free: [u64::MAX; WORDS], low: 0 }) }
    }

    fn arena(&self) -> MutexGuard<'_, Arena> {
        self.arena.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer, and whether it is all zeroes. Null when there is no memory.
    fn take(&self, bytes: usize) -> (*mut u8, bool) {
        if let Some(at) = self.arena().take(bytes.div_ceil(PAGE)) {
            return (at as *mut u8, false);
        }
        (map(whole(bytes)), true)
    }

    /// # Safety
    /// `at` came from [`Buffers::take`] for so many bytes, and nobody uses it any more.
    unsafe fn give(&self, at: *mut u8, bytes: usize) {
        if !self.arena().give(at.addr(), bytes.div_ceil(PAGE)) {
            // SAFETY: it is not in the arena, so it is a mapping of its own, and nobody uses it. Where the kernel can't
            // (it has no room to note the hole), the memory is lost.
            unsafe { libc::munmap(at.cast(), whole(bytes)) };
        }
    }
}

impl Default for Buffers {
    fn default() -> Buffers {
        Buffers::new()
    }
}

impl Arena {
    /// The address of so many pages that were free.
    fn take(&mut self, pages: usize) -> Option<usize> {
        if self.base == 0 {
            self.base = (map(ARENA) as usize).max(1);
        }
        let first = self.find(pages).filter(|_| self.base > 1)?;
        self.mark(first, pages, false);
        Some(self.base + first * PAGE)
    }

    /// Whether the pages at this address are of the arena; they are free now.
    fn give(&mut self, at: usize, pages: usize) -> bool {
        let first = at.wrapping_sub(self.base) / PAGE;
        let inside = self.base > 1 && first < WORDS * 64;
        if inside {
            self.mark(first, pages, true);
        }
        inside
    }

    /// The first of the lowest pages that are free, so many in a row.
    fn find(&mut self, pages: usize) -> Option<usize> {
        while self.low < WORDS && self.free[self.low] == 0 {
            self.low += 1;
        }
        let (mut start, mut run) = (0, 0);
        for (word, bits) in self.free.iter().enumerate().skip(self.low) {
            let mut bit = 0;
            while bit < 64 {
                let rest = bits >> bit;
                let free = rest & 1 == 1;
                let same = if free { rest.trailing_ones() } else { rest.trailing_zeros() };
                let same = (same as usize).min(64 - bit);
                if !free {
                    run = 0;
                } else if run == 0 {
                    (start, run) = (word * 64 + bit, same);
                } else {
                    run += same;
                }
                if run >= pages {
                    return Some(start);
                }
                bit += same;
            }
        }
        None
    }

    fn mark(&mut self, first: usize, pages: usize, free: bool) {
        let (mut at, end) = (first, first + pages);
        while at < end {
            let (word, bit) = (at / 64, at % 64);
            let many = (64 - bit).min(end - at);
            let bits = (u64::MAX >> (64 - many)) << bit;
            debug_assert!(self.free[word] & bits == if free { 0 } else { bits });
            if free {
                self.free[word] |= bits;
            } else {
                self.free[word] &= !bits;
            }
            at += many;
        }
        if free {
            self.low = self.low.min(first / 64);
        }
    }
}

/// New memory, all zeroes; null when the kernel has none.
fn map(bytes: usize) -> *mut u8 {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping touches no memory that is in use.
    match unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind, -1, 0) } {
        libc::MAP_FAILED => ptr::null_mut(),
        at => at.cast(),
    }
}

// SAFETY: a buffer has the size and the alignment that was asked for (whole pages) and is given to one caller at a time;
// what is not a buffer by its layout, which is the same when it is freed, is the system's all its life. Nothing here
// allocates, or panics.
unsafe impl GlobalAlloc for Buffers {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ours(&layout) {
            return self.take(layout.size()).0;
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !ours(&layout) {
            // SAFETY: the caller's promise is passed on.
            return unsafe { System.alloc_zeroed(layout) };
        }
        let (at, zeroes) = self.take(layout.size());
        if !zeroes {
            // SAFETY: it was taken, and has that many bytes.
            unsafe { at.write_bytes(0, layout.size()) };
        }
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if ours(&layout) {
            // SAFETY: the caller's promise: it came from `alloc` with this layout, and is not used any more.
            unsafe { self.give(at, layout.size()) }
        } else {
            // SAFETY: the caller's promise is passed on.
            unsafe { System.dealloc(at, layout) }
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `size` rounded up to the alignment does not overflow.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (ours(&layout), ours(&new)) {
            // SAFETY: the caller's promise is passed on.
            (false, false) => unsafe { System.realloc(at, layout, size) },
            (true, true) if whole(layout.size()) == whole(size) => at,
            _ => {
                // SAFETY: the caller promises that `size` is not zero.
                let moved = unsafe { self.alloc(new) };
                if !moved.is_null() {
                    // SAFETY: both have so many bytes, and the new one is nobody else's; the old one is done with.
                    unsafe {
                        ptr::copy_nonoverlapping(at, moved, layout.size().min(size));
                        self.dealloc(at, layout);
                    }
                }
                moved
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    fn used(buffers: &Buffers) -> usize {
        buffers.arena().free.iter().map(|w| w.count_zeros() as usize).sum()
    }

    #[test]
    fn what_is_a_buffer() {
        assert!(ours(&layout(4096, 4096)) && ours(&layout(100, 4096)) && ours(&layout(65536, 1)));
        assert!(!ours(&layout(65535, 8)) && !ours(&layout(8192, 8192)));
    }

    #[test]
    fn the_lowest_run_that_is_long_enough_is_taken() {
        let mut arena = Arena { base: 0, free: [u64::MAX; WORDS], low: 0 };
        let at = arena.take(3).unwrap();
        let page = |a: &mut Arena, n| a.take(n).map(|other| (other - at) / PAGE);
        assert_eq!(page(&mut arena, 59), Some(3));
        assert_eq!(page(&mut arena, 130), Some(62), "over the ends of words");
        assert_eq!(page(&mut arena, 1), Some(192));
        assert!(arena.give(at + 3 * PAGE, 59));
        assert_eq!(page(&mut arena, 60), Some(193), "the hole is too short");
        assert_eq!(page(&mut arena, 20), Some(3));
        assert_eq!(page(&mut arena, 39), Some(23));
        assert_eq!(page(&mut arena, 1), Some(253));
        assert_eq!(page(&mut arena, WORDS * 64), None);
        assert!(arena.give(at + 62 * PAGE, 130) && arena.give(at, 3));
        assert_eq!(page(&mut arena, 3), Some(0));
        assert!(!arena.give(at + ARENA, 1) && !arena.give(at - PAGE, 1));
    }

    #[test]
    fn what_finds_no_room_is_mapped_and_unmapped() {
        let buffers = Buffers::new();
        let one = layout(1 << 20, 4096);
        // SAFETY: each is freed once, with its layout, and written within its bounds.
        unsafe {
            let at: Vec<_> = (0..60).map(|_| buffers.alloc(one)).collect();
            for (n, at) in at.iter().enumerate() {
                assert!(!at.is_null() && at.addr().is_multiple_of(PAGE));
                at.write_bytes(n as u8, one.size());
            }
            assert_eq!(used(&buffers), ARENA / PAGE);
            for (n, at) in at.into_iter().enumerate() {
                assert!(std::slice::from_raw_parts(at, one.size()).iter().all(|b| *b == n as u8));
                buffers.dealloc(at, one);
            }
            assert_eq!(used(&buffers), 0);
            let at = buffers.alloc_zeroed(one);
            assert!(std::slice::from_raw_parts(at, one.size()).iter().all(|b| *b == 0));
            buffers.dealloc(at, one);
        }
    }

    #[test]
    fn what_grows_and_shrinks_keeps_its_bytes() {
        let buffers = Buffers::new();
        // SAFETY: as above.
        unsafe {
            let mut size = 1000;
            let mut at = buffers.alloc(layout(size, 1));
            at.write_bytes(3, size);
            for next in [60_000, 70_000, 72_000, 500_000, ARENA + 1, 80_000, 1000] {
                at = buffers.realloc(at, layout(size, 1), next);
                size = next;
                assert!(std::slice::from_raw_parts(at, 1000).iter().all(|b| *b == 3), "{size}");
            }
            buffers.dealloc(at, layout(size, 1));
        }
        assert_eq!(used(&buffers), 0);
    }

    #[test]
    fn threads_share_it() {
        let buffers = Buffers::new();
        let busy = |seed: usize| {
            let mut held: Vec<(*mut u8, Layout, u8)> = Vec::new();
            for i in 0..2000 {
                let mark = (i + seed) as u8;
                let layout = layout(1 + (i * 7919 + seed) % 300_000, 4096);
                // SAFETY: written within its bounds.
                held.push(unsafe {
                    let at = buffers.alloc(layout);
                    at.write_bytes(mark, layout.size());
                    (at, layout, mark)
                });
                if held.len() > 100 {
                    let (at, layout, mark) = held.swap_remove((i * 31) % 100);
                    // SAFETY: freed once, with its layout.
                    unsafe {
                        assert!(std::slice::from_raw_parts(at, layout.size()).iter().all(|b| *b == mark));
                        buffers.dealloc(at, layout);
                    }
                }
            }
            // SAFETY: as above.
            held.into_iter().for_each(|(at, layout, _)| unsafe { buffers.dealloc(at, layout) });
        };
        let busy = &busy;
        std::thread::scope(|s| (0..4).for_each(|n| drop(s.spawn(move || busy(n * 77)))));
        assert_eq!(used(&buffers), 0);
    }
}
