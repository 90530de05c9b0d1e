//! The control socket does what docs/openapi.yaml says, all of it and nothing else.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex};

use ftvmm_runtime::control::{
    AttachProgress, AttachSummary, ControlRole, ControlServer, Operator, ROUTES, Refused, Reply,
    SnapshotSummary, Status, request,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.yaml");

/// A run that notes what it is asked and answers as it is told.
#[derive(Default)]
struct Noted {
    asked: Mutex<Vec<String>>,
    refusal: Mutex<Option<Refused>>,
    status: Mutex<Status>,
    /// A snapshot waits here twice: when it has begun, and before it ends.
    gate: Option<Barrier>,
}

impl Noted {
    fn note(&self, what: String) -> Result<(), Refused> {
        self.asked.lock().unwrap().push(what);
        self.refusal.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

impl Operator for Noted {
    fn status(&self) -> Status {
        self.status.lock().unwrap().clone()
    }

    fn attach(&self, listen: SocketAddr) -> Result<(), Refused> {
        self.note(format!("attach {listen}"))
    }

    fn detach(&self) -> Result<(), Refused> {
        self.note("detach".into())
    }

    fn switch(&self) -> Result<(), Refused> {
        self.note("switch".into())
    }

    fn snapshot(&self, path: &Path) -> Result<SnapshotSummary, Refused> {
        self.note(format!("snapshot {}", path.display()))?;
        if let Some(gate) = &self.gate {
            gate.wait();
            gate.wait();
        }
        Ok(SnapshotSummary { exit: 7, bytes: 4096 })
    }

    fn nmi(&self) -> Result<(), Refused> {
        self.note("nmi".into())
    }

    fn stop(&self) -> Result<(), Refused> {
        self.note("stop".into())
    }
}

/// A run that can only be looked at and stopped.
struct Least;

impl Operator for Least {
    fn status(&self) -> Status {
        Status { state: "Running".into(), ..Status::default() }
    }

    fn stop(&self) -> Result<(), Refused> {
        Ok(())
    }
}

struct Served {
    socket: PathBuf,
    server: ControlServer,
    _folder: TempDir,
}

fn serve(run: Arc<dyn Operator>) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control");
    let server = ControlServer::start(&socket, run).unwrap();
    Served { socket, server, _folder: folder }
}

impl Served {
    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        request(&self.socket, method, path, body).unwrap()
    }

    /// Sends `text` as it is and returns everything that comes back.
    fn send(&self, text: &str) -> String {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

struct Document(Value);

/// One method of one path.
struct Operation<'a> {
    method: String,
    path: &'a str,
    described: &'a Value,
}

impl Document {
    fn read() -> Self {
        Self(serde_saphyr::from_str(&std::fs::read_to_string(DOCUMENT).unwrap()).unwrap())
    }

    fn operations(&self) -> impl Iterator<Item = Operation<'_>> {
        self.0["paths"].as_object().unwrap().iter().flat_map(|(path, methods)| {
            methods.as_object().unwrap().iter().map(move |(method, described)| Operation {
                method: method.to_uppercase(),
                path,
                described,
            })
        })
    }

    /// What `$ref` stands for.
    fn follow<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value["$ref"].as_str() {
            Some(to) => self.0.pointer(to.trim_start_matches('#')).unwrap(),
            None => value,
        }
    }

    /// Why `instance` is not what `schema` says.
    fn difference(&self, schema: &Value, instance: &Value) -> Option<String> {
        let mut whole = schema.clone();
        whole["components"] = self.0["components"].clone();
        let validator = jsonschema::draft202012::new(&whole).unwrap();
        validator.validate(instance).err().map(|error| error.to_string())
    }

    fn check(&self, operation: &Operation<'_>, reply: &Reply) {
        let Operation { method, path, described } = operation;
        let documented = &described["responses"][reply.status.to_string()];
        assert!(!documented.is_null(), "{method} {path}: undocumented {reply:?}");
        let schema = &self.follow(documented)["content"]["application/json"]["schema"];
        match &reply.body {
            None => assert!(schema.is_null(), "{method} {path}: {} without a body", reply.status),
            Some(body) => {
                assert!(!schema.is_null(), "{method} {path}: {} with a body", reply.status);
                let difference = self.difference(schema, body);
                assert_eq!(difference, None, "{method} {path}: {body}");
            }
        }
    }

    fn body_schema<'a>(&'a self, operation: &Operation<'a>) -> &'a Value {
        let body = self.follow(&operation.described["requestBody"]);
        &body["content"]["application/json"]["schema"]
    }

    /// A body as the document has it, made of the examples of its fields.
    fn good_body(&self, operation: &Operation<'_>) -> Value {
        let mut body = json!({});
        let schema = self.follow(self.body_schema(operation));
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            body[name] = field["examples"][0].clone();
        }
        body
    }
}

/// Every field present.
fn full_status() -> Status {
    Status {
        role: ControlRole::Primary,
        state: "Protected".into(),
        protected: true,
        term: Some(3),
        peer: Some(([10, 0, 0, 2], 7700).into()),
        listen: Some(([10, 0, 0, 1], 7700).into()),
        exit: u64::MAX,
        takeover_us: Some(40_000),
        attach: Some(AttachProgress { phase: "pages".into(), ..AttachProgress::default() }),
        last_attach: Some(AttachSummary::default()),
        ..Status::default()
    }
}

#[test]
fn every_operation_answers_as_documented() {
    let document = Document::read();
    ftvmm_host::profile::begin();
    drop(ftvmm_host::profile::enter(ftvmm_host::profile::Phase::Log));
    let run = Arc::new(Noted::default());
    let served = serve(run.clone());
    for status in [full_status(), Least.status()] {
        *run.status.lock().unwrap() = status;
        for operation in document.operations() {
            let Operation { method, path, described } = &operation;
            if described["requestBody"].is_null() {
                let reply = served.ask(method, path, None);
                assert_eq!(reply.status, 200, "{method} {path}: {reply:?}");
                document.check(&operation, &reply);
                continue;
            }
            let good = document.good_body(&operation);
            for refusal in [
                None,
                Some(Refused::not_now("there is no backup")),
                Some(Refused::BadArgument { why: "no".into() }),
                Some(Refused::Failed { why: "the disk is full".into() }),
            ] {
                *run.refusal.lock().unwrap() = refusal.clone();
                let reply = served.ask(method, path, Some(&good));
                match refusal {
                    None => assert!(reply.status < 300, "{method} {path}: {reply:?}"),
                    Some(refusal) => {
                        let body = reply.body.as_ref().unwrap();
                        assert_eq!(body["fault_message"], json!(refusal.to_string()));
                    }
                }
                document.check(&operation, &reply);
            }
        }
    }
    let asked: BTreeSet<String> = run.asked.lock().unwrap().iter().cloned().collect();
    let expected = [
        "attach 127.0.0.1:7700",
        "detach",
        "nmi",
        "snapshot /var/lib/ftvmm/guest.snapshot",
        "stop",
        "switch",
    ];
    assert_eq!(asked, expected.map(str::to_owned).into());
}

/// A body the schema refuses is refused, with 400, and nothing is done.
#[test]
fn bad_bodies_are_refused_as_the_schema_refuses_them() {
    let document = Document::read();
    let run = Arc::new(Noted::default());
    let served = serve(run.clone());
    for operation in document.operations() {
        if operation.described["requestBody"].is_null() {
            continue;
        }
        let good = document.good_body(&operation);
        let mut bad = vec![json!([]), json!("text"), json!(null), json!(7)];
        bad.push(json!(good.as_object().unwrap().values().collect::<Vec<_>>()));
        let mut unknown = good.clone();
        unknown["unknown_field"] = json!(1);
        bad.push(unknown);
        for name in good.as_object().unwrap().keys() {
            for wrong in [json!(7), json!(null), json!({})] {
                let mut body = good.clone();
                body[name] = wrong;
                bad.push(body);
            }
            let mut missing = good.clone();
            missing.as_object_mut().unwrap().remove(name);
            bad.push(missing);
        }
        if !good["listen"].is_null() {
            bad.push(json!({ "listen": "somewhere" }));
        }
        let schema = document.body_schema(&operation);
        assert_eq!(document.difference(schema, &good), None);
        for body in &bad {
            let Operation { method, path, .. } = &operation;
            assert!(document.difference(schema, body).is_some(), "{path}: {body} is right");
            let reply = served.ask(method, path, Some(body));
            assert_eq!(reply.status, 400, "{path}: {body}");
            document.check(&operation, &reply);
        }
        let Operation { method, path, .. } = operation;
        let cut = format!("{method} {path} HTTP/1.1\r\nContent-Length: 1\r\n\r\n{{");
        assert!(served.send(&cut).starts_with("HTTP/1.1 400 "));
    }
    assert_eq!(*run.asked.lock().unwrap(), Vec::<String>::new());
}

#[test]
fn nothing_is_answered_but_what_is_documented() {
    let document = Document::read();
    let documented: BTreeSet<(String, String)> =
        document.operations().map(|o| (o.method, o.path.to_owned())).collect();
    let routes = ROUTES.iter().map(|route| (route.method.to_owned(), route.path.to_owned()));
    assert_eq!(documented, routes.collect());

    let run = Arc::new(Noted::default());
    let served = serve(run.clone());
    let fault = document.0.pointer("/components/schemas/Fault").unwrap();
    let expect = |reply: Reply, status: u16, what: &str| {
        assert_eq!(reply.status, status, "{what}");
        assert_eq!(document.difference(fault, &reply.body.unwrap()), None, "{what}");
    };
    for (method, path) in &documented {
        for other in ["GET", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "BREW"] {
            if other != method {
                expect(served.ask(other, path, None), 405, &format!("{other} {path}"));
            }
        }
        for other in [format!("{path}/"), format!("{path}?x=1"), format!("/x{path}")] {
            expect(served.ask(method, &other, None), 404, &other);
        }
    }
    expect(served.ask("GET", "/", None), 404, "/");
    let refused = served.send("POST /stop HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(refused.contains("\r\nAllow: PUT\r\n"), "{refused}");
    assert!(served.send("nonsense\r\n\r\n").starts_with("HTTP/1.1 400 "));
    assert_eq!(*run.asked.lock().unwrap(), Vec::<String>::new());
}

#[test]
fn a_run_without_a_pair_refuses_what_needs_one() {
    let document = Document::read();
    let served = serve(Arc::new(Least));
    for operation in document.operations() {
        let has_body = !operation.described["requestBody"].is_null();
        let body = has_body.then(|| document.good_body(&operation));
        let reply = served.ask(&operation.method, operation.path, body.as_ref());
        let refused =
            matches!(operation.path, "/attach" | "/detach" | "/nmi" | "/switch" | "/snapshot");
        // Another test of this process may have begun one.
        if operation.path != "/profile" {
            assert_eq!(reply.status == 409, refused, "{}: {reply:?}", operation.path);
        }
        document.check(&operation, &reply);
    }
}

#[test]
fn a_snapshot_that_takes_long_keeps_nobody_waiting() {
    let run = Arc::new(Noted { gate: Some(Barrier::new(2)), ..Noted::default() });
    let served = serve(run.clone());
    let gate = run.gate.as_ref().unwrap();
    std::thread::scope(|scope| {
        let snapshot = scope.spawn(|| served.ask("PUT", "/snapshot", Some(&json!({"path": "/f"}))));
        gate.wait();
        assert_eq!(served.ask("GET", "/status", None).status, 200);
        assert!(!snapshot.is_finished());
        gate.wait();
        assert_eq!(snapshot.join().unwrap().body, Some(json!({"exit": 7, "bytes": 4096})));
    });
}

#[test]
fn a_connection_serves_many_requests() {
    let served = serve(Arc::new(Least));
    let one = "GET /version HTTP/1.1\r\n\r\n";
    let answer = served.send(&one.repeat(3));
    assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 3, "{answer}");
}

/// The one who asked for the end hears that it comes, although the socket closes.
#[test]
fn whoever_is_being_answered_at_the_end_gets_the_answer() {
    let run = Arc::new(Noted { gate: Some(Barrier::new(2)), ..Noted::default() });
    let Served { socket, server, _folder } = serve(run.clone());
    let gate = run.gate.as_ref().unwrap();
    let theirs = socket.clone();
    let asks = std::thread::spawn(move || {
        request(&theirs, "PUT", "/snapshot", Some(&json!({"path": "/f"}))).unwrap()
    });
    gate.wait();
    let ends = std::thread::spawn(move || drop(server));
    while socket.exists() {
        std::thread::yield_now();
    }
    gate.wait();
    ends.join().unwrap();
    assert_eq!(asks.join().unwrap().status, 200);
}
