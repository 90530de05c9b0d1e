//! The few argument shapes the applets share: positions, `--flag`, `--name value`.

use std::str::FromStr;

use crate::AppletError;

/// The arguments of one applet.
pub struct Options {
    words: Vec<String>,
}

impl Options {
    /// Takes the words after the applet's name.
    pub fn new(words: &[String]) -> Self {
        Self { words: words.to_vec() }
    }

    /// Whether `--name` was given.
    pub fn flag(&self, name: &str) -> bool {
        self.words.iter().any(|word| word == name)
    }

    /// The word after `--name`, or `default`.
    ///
    /// # Errors
    /// The word is missing or does not parse.
    pub fn named<T: FromStr>(
        &self,
        name: &str,
        default: T,
        wanted: &'static str,
    ) -> Result<T, AppletError> {
        match self.words.iter().position(|word| word == name) {
            None => Ok(default),
            Some(at) => parse(self.words.get(at + 1).map_or("", String::as_str), wanted),
        }
    }

    /// The word at `index` when there is one, parsed.
    ///
    /// # Errors
    /// The word does not parse.
    pub fn position<T: FromStr>(
        &self,
        index: usize,
        wanted: &'static str,
    ) -> Result<Option<T>, AppletError> {
        self.words.get(index).map(|word| parse(word, wanted)).transpose()
    }
}

fn parse<T: FromStr>(word: &str, wanted: &'static str) -> Result<T, AppletError> {
    word.parse().map_err(|_| AppletError::Usage { argument: word.to_owned(), wanted })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Options {
        Options::new(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn named_values_flags_and_positions_are_found() {
        let given = options("12 --port 8080 --detach");
        assert_eq!(given.position(0, "a number").unwrap(), Some(12));
        assert_eq!(given.position::<u64>(9, "a number").unwrap(), None);
        assert_eq!(given.named("--port", 80u16, "a port").unwrap(), 8080);
        assert_eq!(given.named("--other", 80u16, "a port").unwrap(), 80);
        assert!(given.flag("--detach"));
    }

    #[test]
    fn a_missing_or_wrong_value_is_a_usage_error() {
        for line in ["--port", "--port seven", "--port 70000"] {
            let refused = options(line).named("--port", 80u16, "a port");
            assert!(matches!(refused, Err(AppletError::Usage { .. })), "{line}");
        }
    }
}
