//! Leaves out what a failure does not need.

/// Reduces `parts` as long as `fails` says so, first in large chunks, then one by one (Zeller's
/// ddmin without its subsets); a part that stays cannot be left out alone. `fails` may be wrong
/// where a failure is random: then more stays than must.
///
/// # Errors
/// What `fails` answered.
pub fn minimise<E>(
    mut parts: Vec<usize>,
    mut fails: impl FnMut(&[usize]) -> Result<bool, E>,
) -> Result<Vec<usize>, E> {
    let mut chunk = parts.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        let before = parts.len();
        while at < parts.len() {
            let end = (at + chunk).min(parts.len());
            let fewer = [&parts[..at], &parts[end..]].concat();
            if fails(&fewer)? {
                parts = fewer;
            } else {
                at = end;
            }
        }
        let again = chunk == 1 && parts.len() < before;
        chunk = if again { 1 } else { chunk / 2 };
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn minimised(count: usize, needed: &[usize]) -> (Vec<usize>, usize) {
        let mut runs = 0;
        let left = minimise((0..count).collect(), |kept| {
            runs += 1;
            Ok::<_, Infallible>(needed.iter().all(|part| kept.contains(part)))
        });
        (left.unwrap(), runs)
    }

    #[test]
    fn what_is_needed_stays_and_nothing_else() {
        for needed in [&[][..], &[0], &[19], &[3, 4], &[2, 9, 17]] {
            let (left, runs) = minimised(20, needed);
            assert_eq!(left, needed);
            assert!(runs < 60, "{runs} runs for {needed:?}");
        }
    }

    #[test]
    fn an_error_ends_it() {
        assert_eq!(minimise(vec![1, 2], |_| Err("no")), Err("no"));
    }
}
