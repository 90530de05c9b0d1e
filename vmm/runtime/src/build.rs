//! Which build of the program this is.

use ftvmm_replication::BuildId;

/// Its name: version and digest of the sources (`vmm/runtime/build.rs`).
pub const NAME: &str = env!("FTVMM_BUILD_ID");

/// The same, as files and messages have it.
#[expect(clippy::missing_panics_doc, reason = "a test sees to it that the name is one")]
#[expect(clippy::expect_used, reason = "a test sees to it that the name is one")]
pub fn own() -> BuildId {
    NAME.try_into().expect("vmm/runtime/build.rs makes a build's name")
}

/// What to say of something that another build made; `None` when this one did.
pub fn difference(maker: &BuildId) -> Option<String> {
    (*maker != own()).then(|| format!("made by build {maker}, this is build {NAME}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_the_version_and_a_digest() {
        let name = own().to_string();
        let (version, digest) = name.split_once('+').unwrap();
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
        assert_eq!(digest.len(), 16);
        assert!(u64::from_str_radix(digest, 16).is_ok_and(|digest| digest != 0), "{digest}");
    }

    #[test]
    fn only_another_build_is_named() {
        assert_eq!(difference(&own()), None);
        let other = "0.0.1+0123456789abcdef".try_into().unwrap();
        let text = format!("made by build 0.0.1+0123456789abcdef, this is build {NAME}");
        assert_eq!(difference(&other), Some(text));
    }
}
