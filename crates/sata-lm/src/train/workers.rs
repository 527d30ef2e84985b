//! Threads that each compute whole items of work, whose results are taken in the items' order.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::error::TrainError;

/// Threads.
#[derive(Debug)]
pub struct Workers {
    /// Pools of one thread: what is parallel within an item stays on the item's thread.
    single: Vec<ThreadPool>,
    /// One pool of as many threads, for what is spread over all.
    all: ThreadPool,
}

/// What is next to be taken, and what came before its turn.
struct Queue<T, S> {
    next: usize,
    early: BTreeMap<usize, T>,
    take: S,
}

impl Workers {
    /// So many threads.
    ///
    /// # Errors
    /// 0 threads, or when the system has none to give.
    pub fn new(threads: usize) -> Result<Self, TrainError> {
        if threads == 0 {
            return Err(TrainError::unfit("0 threads: there must be at least 1"));
        }
        let pool = |n| {
            ThreadPoolBuilder::new()
                .num_threads(n)
                .build()
                .map_err(|error| TrainError::unfit(format!("{threads} threads: {error}")))
        };
        let single = (0..threads).map(|_| pool(1)).collect::<Result<_, _>>()?;
        Ok(Workers { single, all: pool(threads)? })
    }

    /// Runs what is parallel in itself over all threads.
    pub fn together<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.all.install(work)
    }

    /// Computes items 0 … `items`, each on one thread, and hands the results to `take` in that
    /// order, whoever finishes first.
    ///
    /// # Errors
    /// That of the first item in order that failed; nothing after it is taken.
    pub fn in_order<T: Send>(
        &self,
        items: usize,
        work: impl Fn(usize) -> Result<T, TrainError> + Sync,
        take: impl FnMut(usize, T) + Send,
    ) -> Result<(), TrainError> {
        let queue = Mutex::new(Queue { next: 0, early: BTreeMap::new(), take });
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let run = || -> Result<(), (usize, TrainError)> {
            while !failed.load(Ordering::Relaxed) {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                let result = work(item).map_err(|error| {
                    failed.store(true, Ordering::Relaxed);
                    (item, error)
                })?;
                let mut queue = queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let queue = &mut *queue;
                queue.early.insert(item, result);
                while let Some(result) = queue.early.remove(&queue.next) {
                    (queue.take)(queue.next, result);
                    queue.next += 1;
                }
            }
            Ok(())
        };
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                self.single.iter().map(|pool| scope.spawn(|| pool.install(run))).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        let mut first: Option<(usize, TrainError)> = None;
        for result in results {
            match result {
                Ok(Ok(())) => {}
                Ok(Err((item, error))) => {
                    if first.as_ref().is_none_or(|(earlier, _)| item < *earlier) {
                        first = Some((item, error));
                    }
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        first.map_or(Ok(()), |(_, error)| Err(error))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_come_in_order_whoever_finishes_first() {
        let workers = Workers::new(3).unwrap();
        let mut order = vec![];
        let work = |i: usize| {
            std::thread::sleep(Duration::from_millis((7 * i as u64) % 5));
            assert_eq!(rayon::current_num_threads(), 1);
            Ok(i * i)
        };
        workers.in_order(20, work, |i, square| order.push((i, square))).unwrap();
        assert_eq!(order, (0..20).map(|i| (i, i * i)).collect::<Vec<_>>());
        assert_eq!(workers.together(rayon::current_num_threads), 3);
    }

    #[test]
    fn the_first_failure_stops_the_rest() {
        let workers = Workers::new(2).unwrap();
        let mut taken = vec![];
        let work = |i: usize| {
            if i >= 3 { Err(TrainError::unfit(format!("item {i}"))) } else { Ok(i) }
        };
        let error = workers.in_order(1000, work, |_, i| taken.push(i)).unwrap_err();
        assert_eq!(error.to_string(), "item 3");
        assert_eq!(taken, [0, 1, 2]);
        assert!(Workers::new(0).is_err());
    }
}
