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

/// As [`host_random_bytes`], of a number that is known.
///
/// # Errors
/// When the kernel has none (getrandom(2)).
pub fn host_random<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}
