//! Threads: rayon's current pool with the feature `threads`, the caller's thread without.

#[cfg(feature = "threads")]
std::thread_local! {
    static ALONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `work` on the caller's thread alone: for less work than waking others takes.
pub(crate) fn alone<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(feature = "threads")]
    {
        // As it was, also after a panic.
        struct Back(bool);
        impl Drop for Back {
            fn drop(&mut self) {
                ALONE.set(self.0);
            }
        }
        let _back = Back(ALONE.replace(true));
        work()
    }
    #[cfg(not(feature = "threads"))]
    work()
}

/// Threads that work is spread over.
pub(crate) fn threads() -> usize {
    #[cfg(feature = "threads")]
    return if ALONE.get() { 1 } else { rayon::current_num_threads() };
    #[cfg(not(feature = "threads"))]
    return 1;
}

/// Calls `f` on every item, on several threads where there are several items and threads, and
/// folds what it returns.
pub(crate) fn map_reduce<I: Send, R: Send>(
    items: &mut [I],
    identity: R,
    f: impl Fn(&mut I) -> R + Sync,
    combine: impl Fn(R, R) -> R + Sync,
) -> R {
    #[cfg(feature = "threads")]
    if items.len() > 1 && threads() > 1 {
        use rayon::prelude::*;
        let parts: Vec<R> = items.par_iter_mut().with_max_len(1).map(&f).collect();
        return parts.into_iter().fold(identity, combine);
    }
    items.iter_mut().map(f).fold(identity, combine)
}

/// Calls `f` on every item, on several threads where there are several items and threads.
pub(crate) fn for_each<I: Send>(items: &mut [I], f: impl Fn(&mut I) + Sync) {
    map_reduce(items, (), f, |(), ()| ());
}
