//! The host's random number generator: the only place where host randomness is read.

/// `count` random bytes from the kernel's generator.
///
/// # Errors
/// When the kernel has none (getrandom(2)).
pub fn host_random_bytes(count: u64) -> Result<Vec<u8>, getrandom::Error> {
    let mut bytes = vec![0; count as usize];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}
