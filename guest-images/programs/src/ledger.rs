//! A database that is killed over and over: `ledger FILE` runs SQLite transactions for ever and
//! says which are committed; after a start it says what it found.
//!
//! Every byte it stores is a function of the transaction's number alone, so whoever knows the last
//! number that was committed knows what the file must hold.
//! Invariant: `LEDGER committed N` is printed after SQLite has returned from COMMIT with
//! `synchronous=EXTRA`, hence after the disk has said that everything is on it, the journal's
//! removal included (<https://sqlite.org/pragma.html#pragma_synchronous>; FULL may lose the last commit).

use std::io::Write;

use rusqlite::{Connection, params};

use crate::AppletError;
use crate::options::Options;
use crate::stream::{fill, mix};

/// Rows each transaction adds.
const ROWS_PER_TRANSACTION: u64 = 4;
/// Rows of so many transactions are kept; older ones are deleted, so that pages are used again.
const TRANSACTIONS_KEPT: u64 = 100;
/// Longest payload: some rows need overflow pages.
const PAYLOAD_BYTES_MAX: u64 = 6000;

/// The file holds something else than was committed.
#[derive(Debug, thiserror::Error)]
pub enum BadLedger {
    /// SQLite cannot use the file.
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    /// SQLite's own check.
    #[error("integrity_check: {report}")]
    Integrity {
        /// Its first line.
        report: String,
    },
    /// The rows are not those of the last transaction and the ones before.
    #[error("after transaction {transaction} row {row} is {found}")]
    Row {
        /// The last transaction the file knows.
        transaction: u64,
        /// The row concerned.
        row: u64,
        /// What was found instead.
        found: &'static str,
    },
}

/// A ledger in a file.
pub struct Ledger {
    database: Connection,
}

impl Ledger {
    /// Opens or makes the file. `journal` is SQLite's journal mode: `delete`, `wal`, ...
    ///
    /// # Errors
    /// What SQLite says.
    pub fn open(path: &str, journal: &str) -> Result<Self, BadLedger> {
        let database = Connection::open(path)?;
        database.pragma_update_and_check(None, "journal_mode", journal, |_| Ok(()))?;
        database.pragma_update(None, "synchronous", "EXTRA")?;
        database.execute_batch(
            "CREATE TABLE IF NOT EXISTS row (id INTEGER PRIMARY KEY, payload BLOB NOT NULL);
             CREATE TABLE IF NOT EXISTS head (one INTEGER PRIMARY KEY, last INTEGER NOT NULL);
             INSERT OR IGNORE INTO head VALUES (1, 0);",
        )?;
        Ok(Self { database })
    }

    /// Number of the last committed transaction, after SQLite's check and the comparison of every
    /// row.
    ///
    /// # Errors
    /// [`BadLedger`], with the first thing that is wrong.
    pub fn verify(&self) -> Result<u64, BadLedger> {
        let report: String =
            self.database.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        if report != "ok" {
            return Err(BadLedger::Integrity { report });
        }
        let head = "SELECT last FROM head";
        let transaction: u64 = self.database.query_row(head, [], |row| row.get(0))?;
        let wrong = |row, found| BadLedger::Row { transaction, row, found };
        let mut expected = rows(transaction.saturating_sub(TRANSACTIONS_KEPT) + 1).start;
        let mut statement = self.database.prepare("SELECT id, payload FROM row ORDER BY id")?;
        let mut found = statement.query([])?;
        while let Some(row) = found.next()? {
            let id: u64 = row.get(0)?;
            if id != expected {
                return Err(wrong(expected, "missing"));
            }
            if row.get_ref(1)?.as_blob().ok() != Some(&payload(id)) {
                return Err(wrong(id, "of other content"));
            }
            expected += 1;
        }
        let end = rows(transaction + 1).start;
        if expected != end {
            return Err(wrong(expected, if expected < end { "missing" } else { "too many" }));
        }
        Ok(transaction)
    }

    /// Commits transaction number `transaction`, the one after the last.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn commit(&mut self, transaction: u64) -> Result<(), BadLedger> {
        let change = self.database.transaction()?;
        for id in rows(transaction) {
            change.execute("INSERT INTO row VALUES (?, ?)", params![id, payload(id)])?;
        }
        if let Some(old) = transaction.checked_sub(TRANSACTIONS_KEPT) {
            change.execute("DELETE FROM row WHERE id < ?", [rows(old + 1).start])?;
        }
        change.execute("UPDATE head SET last = ?", [transaction])?;
        Ok(change.commit()?)
    }
}

/// The rows a transaction adds; the first transaction is 1.
fn rows(transaction: u64) -> std::ops::Range<u64> {
    let end = transaction * ROWS_PER_TRANSACTION;
    end - ROWS_PER_TRANSACTION..end
}

/// What row `id` holds.
fn payload(id: u64) -> Vec<u8> {
    let length_bytes = mix(id) % PAYLOAD_BYTES_MAX;
    let mut bytes = vec![0; length_bytes as usize];
    fill(id, 0, &mut bytes);
    bytes
}

/// `ledger FILE`; with `--check` it verifies and ends, with `--count N` it ends after N
/// transactions.
pub(crate) fn main(options: &Options) -> Result<(), AppletError> {
    let wanted = "the database's file";
    let path: String = options
        .position(0, wanted)?
        .ok_or_else(|| AppletError::Usage { argument: String::new(), wanted })?;
    let journal: String = options.named("--journal", "delete".into(), "a journal mode")?;
    let count: u64 = options.named("--count", u64::MAX, "a number of transactions")?;
    let mut ledger = Ledger::open(&path, &journal)?;
    let found = ledger.verify()?;
    say(&format!("LEDGER found {found}, integrity ok"))?;
    if options.flag("--check") {
        return Ok(());
    }
    for transaction in found + 1..=found.saturating_add(count) {
        ledger.commit(transaction)?;
        say(&format!("LEDGER committed {transaction}"))?;
    }
    ledger.verify()?;
    say("LEDGER done, integrity ok")
}

/// One write for each line: on a console every byte costs an exit, but a line is never torn by us.
fn say(line: &str) -> Result<(), AppletError> {
    let mut output = std::io::stdout().lock();
    output.write_all(format!("{line}\n").as_bytes()).map_err(AppletError::io("standard output"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_transactions(path: &str, transactions: u64) -> Ledger {
        let mut ledger = Ledger::open(path, "delete").unwrap();
        (1..=transactions).for_each(|number| ledger.commit(number).unwrap());
        ledger
    }

    #[test]
    fn a_ledger_holds_what_was_committed_when_opened_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(with_transactions(path, 3).verify().unwrap(), 3);
        let mut again = Ledger::open(path, "wal").unwrap();
        for transaction in 4..=TRANSACTIONS_KEPT + 20 {
            again.commit(transaction).unwrap();
        }
        assert_eq!(again.verify().unwrap(), TRANSACTIONS_KEPT + 20);
    }

    #[test]
    fn whatever_is_changed_is_noticed() {
        for (change, expected) in [
            ("UPDATE row SET payload = x'00' WHERE id = 9", "row 9 is of other content"),
            ("DELETE FROM row WHERE id = 5", "row 5 is missing"),
            ("DELETE FROM row WHERE id = 0", "row 0 is missing"),
            ("DELETE FROM row WHERE id = 11", "row 11 is missing"),
            ("UPDATE head SET last = 4", "row 12 is missing"),
            ("UPDATE head SET last = 2", "row 12 is too many"),
        ] {
            let ledger = with_transactions(":memory:", 3);
            ledger.database.execute_batch(change).unwrap();
            let error = ledger.verify().unwrap_err().to_string();
            assert!(error.contains(expected), "{change}: {error}");
        }
    }
}
