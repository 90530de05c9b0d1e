//! `tidy.toml`: the breaches that are let pass, each with its reason.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use serde::Deserialize;

use super::{Breach, Rule};

const HEAD: &str = "\
# Known breaches of the house rules, and why each is let pass. The list only shrinks:
# `cargo xtask tidy` fails for a breach that is not here, for one that has grown, and for an entry
# that nothing needs any more. `cargo xtask tidy --write` drops and lowers what it can; with
# `--reason TEXT` it lists what is new.
";

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    /// The largest amount that passes; 1 when absent.
    most: Option<usize>,
    reason: String,
}

impl Exception {
    fn most(&self) -> usize {
        self.most.unwrap_or(1)
    }
}

/// The whole list: by rule's name, then by subject.
#[derive(Debug, PartialEq, Eq)]
pub struct Exceptions(BTreeMap<String, BTreeMap<String, Exception>>);

fn file() -> PathBuf {
    crate::cargo::workspace().join("tidy.toml")
}

impl Exceptions {
    /// Reads `tidy.toml`.
    pub fn read() -> Result<Self, Box<dyn Error>> {
        let text = fs::read_to_string(file()).map_err(|error| format!("tidy.toml: {error}"))?;
        Self::parse(&text).map_err(|error| format!("tidy.toml: {error}").into())
    }

    fn parse(text: &str) -> Result<Self, Box<dyn Error>> {
        let tables: BTreeMap<String, BTreeMap<String, Exception>> = toml::from_str(text)?;
        if let Some(name) = tables.keys().find(|name| Rule::ALL.iter().all(|r| r.name() != *name)) {
            return Err(format!("there is no rule {name:?}").into());
        }
        let mut entries = tables.values().flatten();
        if let Some((subject, _)) = entries.find(|(_, entry)| entry.reason.trim().is_empty()) {
            return Err(format!("{subject:?} has no reason").into());
        }
        Ok(Self(tables))
    }

    /// Writes `tidy.toml`.
    pub fn write(&self) -> std::io::Result<()> {
        fs::write(file(), self.text())
    }

    fn text(&self) -> String {
        let mut text = HEAD.to_owned();
        for rule in Rule::ALL {
            let Some(entries) = self.0.get(rule.name()).filter(|entries| !entries.is_empty())
            else {
                continue;
            };
            let _ = write!(text, "\n# {}.\n[{}]\n", rule.text(), rule.name());
            for (subject, Exception { most, reason }) in entries {
                let most = most.map(|most| format!("most = {most}, ")).unwrap_or_default();
                let _ = writeln!(text, "{subject:?} = {{ {most}reason = {reason:?} }}");
            }
        }
        text
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }

    fn get(&self, breach: &Breach) -> Option<&Exception> {
        self.0.get(breach.rule.name())?.get(&breach.subject)
    }

    /// What the list does not cover, and what it has too much of.
    pub fn faults(&self, breaches: &[Breach]) -> Vec<String> {
        let mut faults = Vec::new();
        for breach in breaches {
            match self.get(breach) {
                None => faults.push(breach.to_string()),
                Some(known) if breach.amount > known.most() => {
                    faults.push(format!("{breach}\n    more than tidy.toml's {}", known.most()));
                }
                Some(_) => {}
            }
        }
        for (rule, entries) in &self.0 {
            let is_needed = |subject: &String| {
                breaches.iter().any(|b| b.rule.name() == rule && b.subject == *subject)
            };
            let idle = entries.keys().filter(|subject| !is_needed(subject));
            faults.extend(idle.map(|subject| {
                format!("{rule}: {subject}\n    is mended: cargo xtask tidy --write drops it")
            }));
        }
        faults
    }

    /// Drops what is not needed and lowers what can be; with a reason lists what is new.
    pub fn renew(&mut self, breaches: &[Breach], reason: Option<&str>) {
        let mut renewed = BTreeMap::<String, BTreeMap<String, Exception>>::new();
        for breach in breaches {
            let known = self.get(breach);
            let most = match (known, reason) {
                (Some(known), None) => breach.amount.min(known.most()),
                (_, Some(_)) => breach.amount,
                (None, None) => continue,
            };
            let reason = known.map(|known| known.reason.clone()).or(reason.map(str::to_owned));
            let Some(reason) = reason else { continue };
            let entry = Exception { most: (most > 1).then_some(most), reason };
            let of_rule = renewed.entry(breach.rule.name().to_owned()).or_default();
            of_rule.insert(breach.subject.clone(), entry);
        }
        self.0 = renewed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "[columns]\n\"a.rs\" = { most = 7, reason = \"a table\" }\n\
                        [circles]\n\"vmm/src: a, b\" = { reason = \"one machine in two files\" }\n";

    fn breach(rule: Rule, subject: &str, amount: usize) -> Breach {
        Breach { rule, subject: subject.to_owned(), amount, place: String::new() }
    }

    fn known() -> [Breach; 2] {
        [breach(Rule::Columns, "a.rs", 7), breach(Rule::Circle, "vmm/src: a, b", 1)]
    }

    #[test]
    fn listed_breaches_pass_and_no_others() {
        let list = Exceptions::parse(LIST).unwrap();
        assert_eq!(list.faults(&known()), [""; 0]);
        assert_eq!(
            list.faults(&[&known()[..], &[breach(Rule::Path, "x.md", 1)]].concat()).len(),
            1
        );
    }

    #[test]
    fn a_breach_that_grew_fails_and_so_does_an_entry_nothing_needs() {
        let list = Exceptions::parse(LIST).unwrap();
        let [columns, circle] = known();
        let grown = Breach { amount: 8, ..columns.clone() };
        let faults = list.faults(&[grown, circle]);
        assert!(faults.len() == 1 && faults[0].contains("more than"), "{faults:?}");
        let faults = list.faults(&[columns]);
        assert!(faults.len() == 1 && faults[0].contains("is mended"), "{faults:?}");
    }

    #[test]
    fn renewing_lowers_and_drops_and_adds_only_with_a_reason() {
        let new = [breach(Rule::Columns, "a.rs", 3), breach(Rule::FileLines, "b.rs", 600)];
        let mut list = Exceptions::parse(LIST).unwrap();
        list.renew(&new, None);
        assert_eq!(list.text().matches(" = { ").count(), 1);
        assert!(list.text().contains("\"a.rs\" = { most = 3, reason = \"a table\" }"));
        list.renew(&new, Some("moved"));
        assert!(list.text().contains("\"b.rs\" = { most = 600, reason = \"moved\" }"));
        assert_eq!(Exceptions::parse(&list.text()).unwrap(), list);
        assert_eq!(list.faults(&new), [""; 0]);
    }

    #[test]
    fn renewing_does_not_raise_a_number_without_a_reason() {
        let grown = [breach(Rule::Columns, "a.rs", 9)];
        let mut list = Exceptions::parse(LIST).unwrap();
        list.renew(&grown, None);
        assert_eq!(list.faults(&grown).len(), 1);
    }

    #[test]
    fn a_rule_nobody_knows_and_an_empty_reason_are_refused() {
        assert!(Exceptions::parse("[colums]\n\"a\" = { reason = \"x\" }").is_err());
        assert!(Exceptions::parse("[columns]\n\"a\" = { reason = \" \" }").is_err());
    }
}
