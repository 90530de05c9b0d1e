//! The multi-call guest program: `httpd …` through a link of that name, or `ftguest httpd …`.

use std::path::Path;
use std::process::ExitCode;

use ftvmm_guest_programs::{AppletError, run, usage};

fn main() -> ExitCode {
    let mut words: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    if words.first().is_some_and(|name| Path::new(name).ends_with("ftguest")) {
        words.remove(0);
    }
    let Some((name, arguments)) = words.split_first() else {
        eprint!("{}", usage());
        return ExitCode::from(2);
    };
    let name = Path::new(name).file_name().map(|n| n.to_string_lossy().into_owned());
    let name = name.unwrap_or_default();
    match run(&name, arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ (AppletError::Unknown { .. } | AppletError::Usage { .. })) => {
            eprintln!("{error}\n{}", usage());
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}
