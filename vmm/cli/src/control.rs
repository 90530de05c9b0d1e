//! `ftvmm status|profile|attach|detach|switch|snapshot|stop`: what is asked of a running ftvmm
//! through its control socket.

use std::path::Path;
use std::time::Duration;

use ftvmm_runtime::control::{
    AttachProgress, ClientError, ControlRole, ControlWitness, SnapshotSummary, Status, request,
};
use serde_json::{Value, json};

use super::CommandError;
use super::args::{AttachArgs, ControlArgs, SnapshotArgs, StatusArgs};
use super::print::{print, print_line};

/// `ftvmm status`.
pub fn status(args: &StatusArgs) -> Result<(), CommandError> {
    print_status(args)?;
    while let Some(every_ms) = args.every {
        std::thread::sleep(Duration::from_millis(every_ms));
        if !args.json {
            print_line("")?;
        }
        match print_status(args) {
            // The run has ended, and its socket with it.
            Err(CommandError::Unanswered(_)) => return Ok(()),
            printed => printed?,
        }
    }
    Ok(())
}

fn print_status(args: &StatusArgs) -> Result<(), CommandError> {
    let body = ask(&args.control.control, "GET", "/status", None)?;
    let text = if args.json { format!("{body}\n") } else { describe(&understood(body)?) };
    print(text)
}

/// `ftvmm profile`.
pub fn profile(args: &ControlArgs) -> Result<(), CommandError> {
    print_line(ask(&args.control, "GET", "/profile", None)?)
}

/// `ftvmm attach`.
pub fn attach(args: &AttachArgs) -> Result<(), CommandError> {
    let body = json!({ "listen": args.listen });
    ask(&args.control.control, "PUT", "/attach", Some(&body)).map(|_| ())
}

/// `ftvmm snapshot`.
pub fn snapshot(args: &SnapshotArgs) -> Result<(), CommandError> {
    // The other process may stand elsewhere.
    let path = std::path::absolute(&args.file).map_err(|cause| CommandError::File {
        what: "snapshot",
        path: args.file.clone(),
        cause,
    })?;
    let body = json!({ "path": path });
    let answer = ask(&args.control.control, "PUT", "/snapshot", Some(&body))?;
    let SnapshotSummary { exit, bytes } = understood(answer)?;
    print_line(format_args!("{}: exit {exit}, {bytes} bytes", path.display()))
}

/// `ftvmm detach`, `switch` and `stop`, which say nothing but their name.
pub fn bare(args: &ControlArgs, path: &str) -> Result<(), CommandError> {
    ask(&args.control, "PUT", path, None).map(|_| ())
}

fn ask(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, CommandError> {
    let reply = request(socket, method, path, body)?;
    let body = reply.body.unwrap_or_default();
    if (200..300).contains(&reply.status) {
        return Ok(body);
    }
    let fault = body["fault_message"].as_str().unwrap_or("no reason given").to_owned();
    Err(match reply.status {
        400..409 => CommandError::Configuration(fault),
        _ => CommandError::Peer(fault),
    })
}

fn understood<T: serde::de::DeserializeOwned>(body: Value) -> Result<T, CommandError> {
    let strange =
        |e| CommandError::Peer(format!("the running ftvmm is another version: {e}; use --json"));
    serde_json::from_value(body).map_err(strange)
}

impl From<ClientError> for CommandError {
    fn from(error: ClientError) -> Self {
        Self::Unanswered(error.to_string())
    }
}

fn describe(status: &Status) -> String {
    let role = match status.role {
        ControlRole::Solo => "solo",
        ControlRole::Primary => "primary",
        ControlRole::Backup => "backup",
    };
    let protected = if status.protected { "protected" } else { "not protected" };
    let term = status.term.map(|term| format!(", term {term}")).unwrap_or_default();
    let mut text = format!("{role}, {protected} ({}{term})\n", status.state);
    let mut line = |name: &str, value: String| text += &format!("{name:<12} {value}\n");
    if let Some(peer) = status.peer {
        line("peer", peer.to_string());
    }
    if let Some(listen) = status.listen {
        line("listens at", listen.to_string());
    }
    line("exit", status.exit.to_string());
    if status.role == ControlRole::Primary && status.protected {
        line("backup", format!("{} exits behind", status.lag_exits));
    }
    if let Some(stuck_ms) = status.stuck_ms {
        line("processor", format!("held by this host for {:.1} s", stuck_ms as f64 / 1e3));
    }
    line("outputs", status.outputs.to_string());
    line("log", format!("{} bytes", status.log_bytes));
    line("take-overs", status.takeovers.to_string());
    line("divergences", status.divergences.to_string());
    if let Some(witness) = status.witness {
        let seen = match witness {
            ControlWitness::Common => "seen by both hosts",
            ControlWitness::Apart => "not the same on both hosts: a backup takes nothing over",
        };
        line("witness", seen.to_owned());
    }
    if let Some(link) = &status.link {
        let peer = match status.peer_link_up {
            Some(true) => "; the other host's: up",
            Some(false) => "; the other host's: down",
            None => "",
        };
        line("clients", format!("{link}{peer}"));
    }
    if status.console_dropped_bytes > 0 {
        let dropped = status.console_dropped_bytes;
        line("console", format!("{dropped} bytes dropped: nobody reads what the guest prints"));
    }
    line("up", format!("{:.1} s", status.uptime_ms as f64 / 1e3));
    if let Some(progress) = &status.attach {
        line("attaching", describe_progress(progress));
    }
    if let Some(last) = status.last_attach {
        line(
            "attached",
            format!(
                "in {:.1} s: {} bytes, {} iterations; the guest stood still for {:.1} ms, {:.2} of \
                 a copy of its memory",
                last.duration_ms as f64 / 1e3,
                last.bytes,
                last.rounds,
                last.stopped_us as f64 / 1e3,
                last.stopped_us as f64 / last.memory_copy_us as f64
            ),
        );
    }
    text
}

fn describe_progress(progress: &AttachProgress) -> String {
    const MIB: f64 = (1 << 20) as f64;
    let AttachProgress { phase, round, bytes, total_bytes, bytes_per_second } = progress;
    let left = total_bytes.saturating_sub(*bytes).checked_div(*bytes_per_second);
    let left = left.map(|seconds| format!(", about {seconds} s left")).unwrap_or_default();
    let [bytes, total, rate] = [*bytes, *total_bytes, *bytes_per_second].map(|b| b as f64 / MIB);
    format!("{phase}: {bytes:.1} of {total:.1} MiB, {rate:.1} MiB/s, iteration {round}{left}")
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex};

    use ftvmm_runtime::control::{ControlServer, Operator, Refused};

    use super::*;

    /// Notes what it is asked; a snapshot fails, a switch is not possible.
    #[derive(Default)]
    struct Noted(Mutex<Vec<String>>);

    impl Noted {
        fn note(&self, what: impl Into<String>) {
            self.0.lock().unwrap().push(what.into());
        }
    }

    impl Operator for Noted {
        fn status(&self) -> Status {
            Status { role: ControlRole::Backup, exit: 7, ..Status::default() }
        }

        fn attach(&self, listen: SocketAddr) -> Result<(), Refused> {
            self.note(format!("attach {listen}"));
            Ok(())
        }

        fn switch(&self) -> Result<(), Refused> {
            Err(Refused::not_now("no backup follows this host"))
        }

        fn snapshot(&self, path: &Path) -> Result<SnapshotSummary, Refused> {
            self.note(format!("snapshot {}", path.display()));
            Err(Refused::Failed { why: "the disk is full".into() })
        }

        fn stop(&self) -> Result<(), Refused> {
            self.note("stop");
            Ok(())
        }

        fn nmi(&self) -> Result<(), Refused> {
            self.note("nmi");
            Ok(())
        }
    }

    #[test]
    fn what_a_running_ftvmm_is_asked_and_what_its_refusal_means() {
        let folder = tempfile::tempdir().unwrap();
        let control = ControlArgs { control: folder.path().join("control") };
        let noted = Arc::new(Noted::default());
        let server = ControlServer::start(&control.control, noted.clone()).unwrap();
        let status = understood::<Status>(ask(&control.control, "GET", "/status", None).unwrap());
        assert_eq!(status.unwrap(), noted.status());
        let listen = "1.2.3.4:5".parse().unwrap();
        attach(&AttachArgs { control: control.clone(), listen }).unwrap();
        bare(&control, "/nmi").unwrap();
        bare(&control, "/stop").unwrap();
        let file = PathBuf::from("relative");
        let full = snapshot(&SnapshotArgs { file: file.clone(), control: control.clone() });
        let full = full.unwrap_err();
        assert!(matches!(&full, CommandError::Peer(why) if why == "the disk is full"), "{full}");
        let here = std::path::absolute(file).unwrap();
        let wanted = ["attach 1.2.3.4:5", "nmi", "stop", &format!("snapshot {}", here.display())];
        assert_eq!(*noted.0.lock().unwrap(), wanted);

        let refused = bare(&control, "/switch").unwrap_err();
        assert_eq!(refused.to_string(), "not possible now: no backup follows this host");
        assert!(matches!(refused, CommandError::Peer(_)), "the arguments were right");
        let unknown = bare(&control, "/nothing").unwrap_err();
        assert!(matches!(unknown, CommandError::Configuration(_)), "{unknown}");
        drop(server);
        let gone = bare(&control, "/stop").unwrap_err();
        assert!(matches!(gone, CommandError::Unanswered(_)), "{gone}");
    }

    #[test]
    fn a_status_of_another_version_points_to_json() {
        let error = understood::<Status>(json!({ "strange": 1 })).unwrap_err().to_string();
        assert!(error.contains("another version") && error.contains("--json"), "{error}");
    }

    #[test]
    fn a_status_is_told_in_words() {
        let status = Status {
            role: ControlRole::Primary,
            state: "Protected".into(),
            protected: true,
            term: Some(3),
            lag_exits: 12,
            attach: Some(AttachProgress {
                phase: "pages".into(),
                round: 2,
                bytes: 1 << 20,
                total_bytes: 3 << 20,
                bytes_per_second: 1 << 20,
            }),
            ..Status::default()
        };
        let text = describe(&status);
        for wanted in [
            "primary, protected (Protected, term 3)",
            "12 exits behind",
            "pages: 1.0 of 3.0 MiB, 1.0 MiB/s, iteration 2, about 2 s left",
        ] {
            assert!(text.contains(wanted), "{text}");
        }
    }
}
