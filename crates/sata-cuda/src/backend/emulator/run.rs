//! Running the blocks of a launch.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::super::{Entry, Launch};
use crate::Error;

// These are `emu.hpp`'s.
const ARENA_BYTES: usize = 1 << 27;
const STACK_BYTES: usize = 1 << 16;
const FIRST_STACK: usize = 8;
const MOST_THREADS: usize = 1024;
pub(super) const MOST_SHARED: u32 = 227 << 10;

/// What the compiled code reads and writes: `emu::Launch`.
#[repr(C)]
struct Job {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u64,
    blocks: u64,
    next: u64,
    failed: u32,
    message: [c_char; 256],
}

/// `void (void* arena, Launch*, void** arguments)`.
type Function = unsafe extern "C" fn(*mut c_void, *mut Job, *mut *mut c_void);

/// Threads of the system that share a launch's blocks.
pub(super) fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| {
        let asked = std::env::var("SATA_EMULATOR_THREADS").ok().and_then(|text| text.parse().ok());
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        asked.unwrap_or_else(all).clamp(1, 64)
    })
}

/// Refuses what a GPU would refuse.
pub(super) fn check(kernel: &str, launch: Launch) -> Result<(), Error> {
    launch.fault(MOST_SHARED).map_or(Ok(()), |reason| Err(failure(kernel, launch, reason)))
}

fn failure(kernel: &str, launch: Launch, reason: String) -> Error {
    let Launch { grid, block, shared } = launch;
    Error::Launch { kernel: kernel.into(), grid, block, shared, reason }
}

/// # Safety
/// `entry` was made by `SATA_EMU_ENTRY`, and `arguments` are what its kernel takes.
pub(super) unsafe fn run(
    kernel: &str,
    entry: Entry,
    launch: Launch,
    arguments: &mut [*mut c_void],
) -> Result<(), Error> {
    let blocks: u64 = launch.grid.iter().map(|&n| u64::from(n)).product();
    let mut job = Job {
        grid: launch.grid,
        block: launch.block,
        shared_bytes: u64::from(launch.shared),
        blocks,
        next: 0,
        failed: 0,
        message: [0; 256],
    };
    // SAFETY: entries of the emulator are functions of this type.
    let function = unsafe { std::mem::transmute::<*mut c_void, Function>(entry.0) };
    let shared = Shared { function, job: &raw mut job, arguments: arguments.as_mut_ptr() };
    let helpers = (threads() as u64).min(blocks) - 1;
    let mut arenas = vec![];
    for _ in 0..=helpers {
        let none = || failure(kernel, launch, "there is no memory for its threads".into());
        arenas.push(Arena::take().ok_or_else(none)?);
    }
    std::thread::scope(|scope| {
        let (first, others) = arenas.split_at(1);
        for arena in others {
            let shared = &shared;
            scope.spawn(move || shared.work(arena));
        }
        shared.work(&first[0]);
    });
    arenas.into_iter().for_each(Arena::give);
    if job.failed == 0 {
        return Ok(());
    }
    // SAFETY: its last byte is never written and is 0.
    let message = unsafe { CStr::from_ptr(job.message.as_ptr()) };
    Err(failure(kernel, launch, message.to_string_lossy().into_owned()))
}

/// What all threads of the system work on.
struct Shared {
    function: Function,
    job: *mut Job,
    arguments: *mut *mut c_void,
}

// SAFETY: the code takes blocks off the job atomically and only reads the arguments; that blocks may
// run at once is what a kernel is.
unsafe impl Sync for Shared {}

impl Shared {
    fn work(&self, arena: &Arena) {
        // SAFETY: the job and the arguments outlive the scope that this is called in, and nobody
        // else has this arena.
        unsafe { (self.function)(arena.base as *mut c_void, self.job, self.arguments) };
    }
}

/// Stacks of a block's fibers.
struct Arena {
    base: usize,
}

static FREE: Mutex<Vec<Arena>> = Mutex::new(vec![]);

impl Arena {
    fn take() -> Option<Self> {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.or_else(Self::new)
    }

    fn give(self) {
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    fn new() -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of our own, of which an aligned part is kept.
        let whole =
            unsafe { libc::mmap(std::ptr::null_mut(), 2 * ARENA_BYTES, protection, flags, -1, 0) };
        if whole == libc::MAP_FAILED {
            return None;
        }
        let whole = whole as usize;
        let base = whole.next_multiple_of(ARENA_BYTES);
        // SAFETY: parts of the mapping that nothing uses: what lies before and after the aligned
        // part, and the lowest page of each stack, where overflow is to crash.
        unsafe {
            libc::munmap(whole as *mut c_void, base - whole);
            libc::munmap((base + ARENA_BYTES) as *mut c_void, whole + ARENA_BYTES - base);
            for stack in FIRST_STACK..FIRST_STACK + MOST_THREADS {
                libc::mprotect((base + stack * STACK_BYTES) as *mut c_void, 4096, libc::PROT_NONE);
            }
        }
        Some(Arena { base })
    }
}
