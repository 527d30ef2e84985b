//! What this machine has: memory, threads.

use crate::failure::{Failure, Outcome};

/// Bytes that can still be allocated, where the system says (Linux).
pub fn available_memory() -> Option<u128> {
    meminfo("MemAvailable:")
}

/// Bytes of memory, where the system says (Linux).
pub fn total_memory() -> Option<u128> {
    meminfo("MemTotal:")
}

fn meminfo(field: &str) -> Option<u128> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    let kib: u128 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Bytes of memory that this process holds, where the system says (Linux).
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// The most that this process has held, likewise.
pub fn peak_resident() -> Option<u64> {
    status("VmHWM:")
}

fn status(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// The processor's own name, where the system says (Linux).
pub fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// Makes the thread pool that all work runs on; all processors when `threads` is not given.
///
/// # Errors
/// When the system has no threads to give.
pub fn set_threads(threads: Option<usize>) -> Outcome {
    let Some(threads) = threads else {
        return Ok(());
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|error| Failure::new(format!("--threads {threads}: {error}")))
}

/// Makes candle compute each of its own operations on the thread that asks for it. Its elementwise
/// operations otherwise share one set of threads behind a lock, on which threads with work of their
/// own wait for each other.
///
/// Only for the beginning of a command, while the process has one thread.
pub fn keep_tensors_on_their_thread() {
    // SAFETY: no other thread exists yet that could read the environment.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
}

/// Makes the process keep the memory that tensors leave for the next ones: returning it to the system
/// and asking for it again takes a quarter of the time of a training step.
pub fn keep_tensor_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: these change settings of the allocator alone.
    unsafe {
        // Some versions refuse the second: then the first holds.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// Threads that work runs on.
pub fn threads() -> usize {
    rayon::current_num_threads()
}
