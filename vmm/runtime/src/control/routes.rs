//! What is answered at which path.

use std::net::SocketAddr;
use std::path::PathBuf;

use ftvmm_host::profile;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Operator;
use super::http::{Request, Response};
use super::operator::Refused;

/// What is said, if anything.
type Served = Result<Option<Value>, Fault>;

/// A method and a path, and what they do.
pub struct Route {
    /// `GET` or `PUT`.
    pub method: &'static str,
    /// The path, without parameters.
    pub path: &'static str,
    serve: fn(&dyn Operator, &[u8]) -> Served,
}

/// Everything that is answered.
pub const ROUTES: &[Route] = &[
    Route { method: "GET", path: "/status", serve: |run, _| said(&run.status()) },
    Route { method: "GET", path: "/profile", serve: |_, _| profile_so_far() },
    Route { method: "GET", path: "/version", serve: |_, _| said(&version()) },
    Route {
        method: "PUT",
        path: "/attach",
        serve: |run, body| {
            let AttachRequest { listen } = parse(body)?;
            done(run.attach(listen))
        },
    },
    Route { method: "PUT", path: "/detach", serve: |run, body| bare(body, || run.detach()) },
    Route { method: "PUT", path: "/switch", serve: |run, body| bare(body, || run.switch()) },
    Route {
        method: "PUT",
        path: "/snapshot",
        serve: |run, body| {
            let SnapshotRequest { path } = parse(body)?;
            said(&run.snapshot(&path)?)
        },
    },
    Route { method: "PUT", path: "/nmi", serve: |run, body| bare(body, || run.nmi()) },
    Route { method: "PUT", path: "/stop", serve: |run, body| bare(body, || run.stop()) },
];

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct AttachRequest {
    listen: SocketAddr,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotRequest {
    path: PathBuf,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct NoFields {}

/// What is answered instead, with `fault_message`, Firecracker's name for it.
struct Fault {
    status: u16,
    message: String,
    allow: Option<String>,
}

impl From<Refused> for Fault {
    fn from(refused: Refused) -> Self {
        let status = match refused {
            Refused::BadArgument { .. } => 400,
            Refused::NotNow { .. } => 409,
            Refused::Failed { .. } => 500,
        };
        Self { status, message: refused.to_string(), allow: None }
    }
}

/// Does what a request asks for.
pub fn answer(run: &dyn Operator, request: &Request) -> Response {
    let served = route(request).and_then(|route| (route.serve)(run, &request.body));
    match served {
        Ok(None) => Response { status: 204, body: None, allow: None },
        Ok(Some(body)) => Response { status: 200, body: Some(format!("{body}\n")), allow: None },
        Err(Fault { status, message, allow }) => Response { allow, ..fault(status, &message) },
    }
}

/// An answer that says what is wrong.
pub fn fault(status: u16, message: &str) -> Response {
    let body = json!({ "fault_message": message });
    Response { status, body: Some(format!("{body}\n")), allow: None }
}

fn route(request: &Request) -> Result<&'static Route, Fault> {
    let Request { method, path, .. } = request;
    let there: Vec<&Route> = ROUTES.iter().filter(|route| route.path == path).collect();
    let right = there.iter().find(|route| route.method == method);
    let allowed: Vec<&str> = there.iter().map(|route| route.method).collect();
    match (right, allowed.as_slice()) {
        (Some(route), _) => Ok(route),
        (None, []) => {
            let known: Vec<&str> = ROUTES.iter().map(|route| route.path).collect();
            let message = format!("there is no {path}; there are {}", known.join(", "));
            Err(Fault { status: 404, message, allow: None })
        }
        (None, allowed) => {
            let allow = allowed.join(", ");
            let message = format!("{path} is for {allow}, not for {method}");
            Err(Fault { status: 405, message, allow: Some(allow) })
        }
    }
}

fn profile_so_far() -> Served {
    match profile::so_far() {
        Some(profile) => said(&profile),
        None => Err(Refused::NotNow { why: "the run has no --profile".into() }.into()),
    }
}

fn version() -> Value {
    json!({ "ftvmm_version": env!("CARGO_PKG_VERSION") })
}

fn said(what: &impl Serialize) -> Served {
    let unsayable =
        |e: serde_json::Error| Fault { status: 500, message: e.to_string(), allow: None };
    serde_json::to_value(what).map(Some).map_err(unsayable)
}

fn done(result: Result<(), Refused>) -> Served {
    Ok(result.map(|()| None)?)
}

/// A request that says nothing but its path.
fn bare(body: &[u8], act: impl FnOnce() -> Result<(), Refused>) -> Served {
    if !body.is_empty() {
        let NoFields {} = parse(body)?;
    }
    done(act())
}

/// An object with known fields. serde would also take their values in a list.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    let is_list = body.trim_ascii_start().first() == Some(&b'[');
    let parsed = match is_list {
        true => Err("it is a list, not an object".to_owned()),
        false => serde_json::from_slice(body).map_err(|e| e.to_string()),
    };
    let bad = |why| Fault {
        status: 400,
        message: format!("the body cannot be used: {why}"),
        allow: None,
    };
    parsed.map_err(bad)
}
