//! Memory whose end lies before a page that cannot be touched, and whose first bytes are NaN.
//!
//! A kernel that reads or writes beyond a buffer's end crashes the program at that instruction; one
//! that writes just before its start is found when the buffer is freed.

const ALIGN: usize = 16;
const MARK: u8 = 0xa5;

fn page() -> usize {
    // SAFETY: asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(page).unwrap_or(4096)
}

/// Where the mapping begins, its length, and the place of the data in it.
fn layout(bytes: usize) -> Option<(usize, usize)> {
    let data = bytes.max(1).checked_next_multiple_of(ALIGN)?;
    let room = data.checked_next_multiple_of(page())?;
    Some((room.checked_add(page())?, room - data))
}

/// `bytes` bytes of 0xff, or none where there is no more memory.
pub(super) fn alloc(bytes: usize) -> Option<u64> {
    let (length, at) = layout(bytes)?;
    let (protection, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
    // SAFETY: a new mapping of our own.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return None;
    }
    let base = base.cast::<u8>();
    // SAFETY: all within the mapping just made; its last page is given up to be the guard.
    unsafe {
        libc::mprotect(base.add(length - page()).cast(), page(), libc::PROT_NONE);
        base.write_bytes(MARK, at);
        base.add(at).write_bytes(0xff, length - page() - at);
    }
    Some(base as u64 + at as u64)
}

/// # Safety
/// `address` comes from `alloc` with the same `bytes`, and nothing uses it any more.
pub(super) unsafe fn free(address: u64, bytes: usize) {
    let Some((length, at)) = layout(bytes) else {
        return;
    };
    let base = (address - at as u64) as *mut u8;
    // SAFETY: the bytes of the mapping before the data, which `alloc` set.
    let before = unsafe { std::slice::from_raw_parts(base, at) };
    let touched = before.iter().position(|&byte| byte != MARK);
    // SAFETY: the mapping that `alloc` made, whole.
    unsafe { libc::munmap(base.cast(), length) };
    if let (Some(touched), false) = (touched, std::thread::panicking()) {
        panic!("a kernel wrote {} bytes before a buffer of {bytes} bytes", at - touched);
    }
}
