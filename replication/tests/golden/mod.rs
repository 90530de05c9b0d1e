//! Golden bytes: what an encoding made of an example when its version was raised last.
//!
//! A file of them is named `NAME-vVERSION`. Bytes that change under a version that does not are a
//! format that nobody can tell from the one before it, so they fail, and renewing them is only
//! possible under a new version.

#![allow(dead_code, unused_macros, reason = "each test takes what it needs of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// With this in the environment, golden bytes of a version that has none are written.
const RENEW: &str = "FTVMM_RENEW_GOLDEN";

/// The golden bytes of one encoding.
pub struct Golden {
    /// The folder they are in.
    pub folder: PathBuf,
    /// What is encoded.
    pub name: &'static str,
    /// `txt`, or `bin` for a file of the format itself.
    pub extension: &'static str,
    /// The version of the encoding.
    pub version: u32,
    /// Where that is written, as "X in FILE".
    pub constant: &'static str,
    /// The package whose tests renew them.
    pub package: &'static str,
}

impl Golden {
    /// The bytes of the file.
    ///
    /// # Panics
    /// When the file is missing, and is not to be written now; and when `now`, what the code makes
    /// today, is something else.
    pub fn check(&self, now: &[u8]) -> Vec<u8> {
        // Two tests may ask for the same file.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path();
        if !path.exists() && std::env::var_os(RENEW).is_some() {
            self.renew(&path, now);
        }
        let golden = fs::read(&path).ok();
        if let Err(problem) = self.verdict(golden.as_deref(), now) {
            panic!("{problem}");
        }
        golden.unwrap_or_default()
    }

    /// Checks named examples, which make a file of text.
    ///
    /// # Panics
    /// As [`Self::check`].
    pub fn check_examples(&self, examples: &[(String, Vec<u8>)]) {
        self.check(render(examples).as_bytes());
    }

    fn path(&self) -> PathBuf {
        self.folder.join(format!("{}-v{}.{}", self.name, self.version, self.extension))
    }

    fn renew(&self, path: &Path, now: &[u8]) {
        let older = format!("{}-v", self.name);
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&older) {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        fs::create_dir_all(&self.folder).unwrap();
        fs::write(path, now).unwrap();
    }

    /// What is wrong with what the code makes now.
    fn verdict(&self, golden: Option<&[u8]>, now: &[u8]) -> Result<(), String> {
        let Self { name, version, constant, package, .. } = self;
        let renew = format!("renew the golden bytes by {RENEW}=1 cargo test -p {package}");
        match golden {
            Some(golden) if golden == now => Ok(()),
            Some(golden) => {
                let place = difference(golden, now);
                Err(format!(
                    "the encoding changed: raise {constant}, then {renew} (in {name}: {place})"
                ))
            }
            None => {
                Err(format!("there are no golden bytes of version {version} of {name}: {renew}"))
            }
        }
    }
}

/// Where two contents part: in which example of a text, or at which byte.
fn difference(golden: &[u8], now: &[u8]) -> String {
    let same = golden.iter().zip(now).take_while(|(golden, now)| golden == now).count();
    let before = std::str::from_utf8(&now[..same]).unwrap_or_default();
    match before.lines().rfind(|line| line.ends_with(':')) {
        Some(example) => format!("example {}", example.trim_end_matches(':')),
        None => format!("byte {same}"),
    }
}

/// Every example as its name and a colon, then lines of hexadecimal.
fn render(examples: &[(String, Vec<u8>)]) -> String {
    let mut text = String::new();
    for (name, bytes) in examples {
        text.push_str(&format!("{name}:\n"));
        for line in bytes.chunks(32) {
            let digits: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
            text.push_str(&format!("  {digits}\n"));
        }
    }
    text
}

/// Samples of an enum, one or more of every variant. A variant without a sample does not compile.
macro_rules! every {
    ($type:ty { $($pattern:pat => $sample:expr,)* }) => {{
        // No arm for the rest: this is what a new variant fails at.
        fn is_listed(sample: &$type) {
            match sample { $($pattern => {})* }
        }
        let samples: Vec<$type> = vec![$({
            let sample = $sample;
            assert!(matches!(sample, $pattern), "{sample:?} is not {}", stringify!($pattern));
            sample
        },)*];
        samples.iter().for_each(is_listed);
        samples
    }};
}
#[allow(unused_imports, reason = "each test takes what it needs")]
pub(crate) use every;

mod tests {
    use super::*;

    fn golden() -> Golden {
        Golden {
            folder: PathBuf::new(),
            name: "things",
            extension: "txt",
            version: 3,
            constant: "THING_VERSION in things.rs",
            package: "things",
        }
    }

    #[test]
    fn a_change_under_the_same_version_is_told() {
        let examples = |second: u8| {
            render(&[("one".into(), vec![1; 40]), ("two".into(), vec![2, second])]).into_bytes()
        };
        let (before, after) = (examples(7), examples(8));
        assert_eq!(golden().verdict(Some(&before), &before), Ok(()));
        assert_eq!(
            golden().verdict(Some(&before), &after).unwrap_err(),
            "the encoding changed: raise THING_VERSION in things.rs, then renew the golden bytes \
             by FTVMM_RENEW_GOLDEN=1 cargo test -p things (in things: example two)"
        );
        let longer = [&before[..], &b"three:\n"[..]].concat();
        assert!(golden().verdict(Some(&before), &longer).is_err(), "one that was not there");
    }

    #[test]
    fn a_version_without_golden_bytes_is_told() {
        assert_eq!(
            golden().verdict(None, &[]).unwrap_err(),
            "there are no golden bytes of version 3 of things: renew the golden bytes by \
             FTVMM_RENEW_GOLDEN=1 cargo test -p things"
        );
    }
}
