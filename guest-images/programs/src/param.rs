//! Parameters for the test guest on the kernel command line.
//!
//! A parameter is `name=value` between blanks; double quotes keep blanks together, as the kernel's
//! own `next_arg` (lib/cmdline.c) has it: `name="a b"` or `"name=a b"`. The last one of a name
//! wins.
//!
//! `ftguest.run` is a shell script. Where a caller cannot pass quotes, it may be written without
//! blanks: `,` separates commands and `:` separates words, as in
//! `ftguest.run=selfcheck:20,reboot:-f`.

use std::fs;

use crate::AppletError;
use crate::options::Options;

/// The parameter that holds what init runs.
pub const SCRIPT: &str = "ftguest.run";

const COMMAND_LINE: &str = "/proc/cmdline";

/// A parameter as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its text without the quotes.
    pub text: String,
    /// Whether any of it was in quotes.
    pub quoted: bool,
}

/// Finds the last parameter of this name.
pub fn parameter(command_line: &str, name: &str) -> Option<Parameter> {
    let with_name = |word: Parameter| {
        let text = word.text.strip_prefix(name)?.strip_prefix('=')?.to_owned();
        Some(Parameter { text, quoted: word.quoted })
    };
    words(command_line).into_iter().rev().find_map(with_name)
}

fn words(command_line: &str) -> Vec<Parameter> {
    let mut words = Vec::new();
    let mut word = Parameter { text: String::new(), quoted: false };
    let mut inside = false;
    for character in command_line.chars().chain([' ']) {
        match character {
            '"' => {
                inside = !inside;
                word.quoted = true;
            }
            blank if blank.is_whitespace() && !inside => {
                words.push(word);
                word = Parameter { text: String::new(), quoted: false };
            }
            other => word.text.push(other),
        }
    }
    words
}

/// The value that an applet or init should use for `name`.
pub fn value(command_line: &str, name: &str) -> Option<String> {
    let Parameter { text, quoted } = parameter(command_line, name)?;
    let compact = name == SCRIPT && !quoted;
    Some(if compact { text.replace(',', ";").replace(':', " ") } else { text })
}

pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let name: String = options.position(0, "a parameter's name")?.unwrap_or_default();
    let command_line = fs::read_to_string(COMMAND_LINE).map_err(AppletError::io(COMMAND_LINE))?;
    let default = options.position(1, "a default")?;
    let found = value(&command_line, &name).or(default);
    println!("{}", found.ok_or(AppletError::NoParameter { name })?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "console=ttyS0 ftguest.ip=10.0.0.1/8 ftguest.run=\"selfcheck 5; a:b,c\" x\n";

    #[test]
    fn a_plain_value_is_the_text_after_the_name() {
        assert_eq!(value(LINE, "ftguest.ip").as_deref(), Some("10.0.0.1/8"));
        assert_eq!(value(LINE, "console").as_deref(), Some("ttyS0"));
    }

    #[test]
    fn neither_a_prefix_nor_a_flag_is_a_parameter() {
        for absent in ["ftguest", "ip", "x", "ftguest.i"] {
            assert_eq!(value(LINE, absent), None, "{absent}");
        }
    }

    #[test]
    fn a_quoted_script_is_kept_as_it_is() {
        assert_eq!(value(LINE, SCRIPT).as_deref(), Some("selfcheck 5; a:b,c"));
        assert_eq!(value("\"ftguest.run=a b\"", SCRIPT).as_deref(), Some("a b"));
    }

    #[test]
    fn a_bare_script_gets_its_blanks_and_semicolons() {
        let line = "ftguest.run=selfcheck:5,reboot:-f";
        assert_eq!(value(line, SCRIPT).as_deref(), Some("selfcheck 5;reboot -f"));
    }

    #[test]
    fn the_last_of_a_name_wins() {
        assert_eq!(value("a=1 b=2 a=3", "a").as_deref(), Some("3"));
    }
}
