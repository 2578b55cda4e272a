//! Memory: what a large change has used goes back to the system.

/// Tells glibc how to keep free memory. By default each thread that allocates at the same time as another gets an
/// arena of its own, which keeps what was free in it; and once a large block was freed, blocks of its size come out of
/// arenas too. After a map of 10,000 nodes that was 70 MiB. The packet path does not allocate, so two arenas do.
pub(super) fn prepare() {
    // SAFETY: the calls take plain numbers, and any thread may make them at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 * 1024);
    }
}

/// Gives back to the system what is free. glibc keeps it otherwise, between what is in use: after the start
/// with 10,000 peers a fifth of all. Takes some milliseconds, on a thread of its own.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    drop(tokio::task::spawn_blocking(|| {
        // SAFETY: the call takes a plain number, and any thread may make it at any time.
        unsafe { libc::malloc_trim(0) };
    }));
}
