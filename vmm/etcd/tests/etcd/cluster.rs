//! etcd servers of Debian's package on loopback, as the tests need them.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, GetOptions};
use ftvmm_etcd::{Address, Credentials, EtcdWitness};
use ftvmm_host_programs::Program;
use ftvmm_replication::witness::{WitnessError, WitnessStore};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::proxy::PeerNet;

/// Looks at a server that starts; each takes at least [`PAUSE`].
const LOOKS: usize = 600;
const PAUSE: Duration = Duration::from_millis(50);

/// A port of loopback that nobody has.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What the servers are started with besides their places.
#[derive(Clone, Default)]
pub struct Options {
    /// Whether clients speak TLS.
    pub is_tls: bool,
    /// Further words of the command line.
    pub words: Vec<String>,
}

/// One server.
struct Server {
    name: String,
    client_port: u16,
    peer_port: u16,
    process: Option<Child>,
}

/// A cluster; its servers end with it.
pub struct Cluster {
    folder: tempfile::TempDir,
    servers: Vec<Server>,
    net: PeerNet,
    options: Options,
}

impl Cluster {
    /// Starts `count` members.
    pub fn start(count: usize) -> Self {
        Self::start_with(count, Options::default())
    }

    /// Starts members with options of their own. The caller waits for them.
    pub fn start_with(count: usize, options: Options) -> Self {
        let server = |number: usize| Server {
            name: format!("m{number}"),
            client_port: free_port(),
            peer_port: free_port(),
            process: None,
        };
        let servers: Vec<_> = (0..count).map(server).collect();
        let ports: Vec<_> = servers.iter().map(|server| server.peer_port).collect();
        let net = PeerNet::new(&ports);
        let folder = tempfile::tempdir().unwrap();
        let mut cluster = Self { folder, servers, net, options };
        (0..count).for_each(|number| cluster.start_member(number));
        if !cluster.options.is_tls {
            cluster.wait();
        }
        cluster
    }

    /// Starts a member, for the first time or again with its data.
    pub fn start_member(&mut self, number: usize) {
        let peers: Vec<_> = (0..self.servers.len())
            .map(|at| format!("{}=http://127.0.0.1:{}", self.servers[at].name, self.net.port(at)))
            .collect();
        let server = &mut self.servers[number];
        let scheme = if self.options.is_tls { "https" } else { "http" };
        let client = format!("{scheme}://127.0.0.1:{}", server.client_port);
        let log = File::create(self.folder.path().join(format!("{}.log", server.name))).unwrap();
        // It ends with the thread of its test, however that ends.
        let mut command = Program::Setpriv.command().unwrap();
        command.args(["--pdeathsig", "KILL"]).arg(Program::Etcd.path().unwrap());
        command.args(["--name", &server.name, "--data-dir"]);
        command.arg(self.folder.path().join(&server.name));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &format!("http://127.0.0.1:{}", server.peer_port)]);
        let advertised = format!("http://127.0.0.1:{}", self.net.port(number));
        command.args(["--initial-advertise-peer-urls", &advertised]);
        command.args(["--initial-cluster", &peers.join(",")]);
        let token = self.folder.path().display().to_string();
        command.args(["--initial-cluster-token", &token, "--initial-cluster-state", "new"]);
        command.args(["--heartbeat-interval", "50", "--election-timeout", "500"]);
        command.args(&self.options.words);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        server.process = Some(command.spawn().unwrap());
    }

    /// Waits until the members have a leader.
    pub fn wait(&self) {
        for _ in 0..LOOKS {
            // Opening asks each on its own; reading asks for most of them.
            let opened = self.open();
            if opened
                .is_ok_and(|mut store| store.silent_members().is_empty() && store.read().is_ok())
            {
                return;
            }
            thread::sleep(PAUSE);
        }
        panic!("no cluster came up: {}", self.logs());
    }

    fn logs(&self) -> String {
        let files = fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let logs = files.filter(|path: &PathBuf| path.is_file());
        logs.map(|path| fs::read_to_string(path).unwrap_or_default()).collect()
    }

    /// A member's port for clients.
    pub fn client_port(&self, number: usize) -> u16 {
        self.servers[number].client_port
    }

    /// A member's address.
    pub fn url(&self, number: usize) -> String {
        let scheme = if self.options.is_tls { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.client_port(number))
    }

    /// The cluster's address.
    pub fn address(&self) -> Address {
        let urls: Vec<_> = (0..self.servers.len()).map(|number| self.url(number)).collect();
        format!("{}/test/vm", urls.join(",")).parse().unwrap()
    }

    /// A witness that knows all members.
    pub fn open(&self) -> Result<EtcdWitness, WitnessError> {
        EtcdWitness::open(self.address(), &Credentials::default())
    }

    /// A witness that knows only what is at this port.
    pub fn open_port(&self, port: u16) -> Result<EtcdWitness, WitnessError> {
        let address = format!("http://127.0.0.1:{port}/test/vm").parse().unwrap();
        EtcdWitness::open(address, &Credentials::default())
    }

    /// Kills a member, as a loss of its machine does.
    pub fn kill(&mut self, number: usize) {
        if let Some(mut process) = self.servers[number].process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Sends a member's process a signal.
    pub fn signal(&self, number: usize, signal: Signal) {
        let process = self.servers[number].process.as_ref().unwrap();
        kill(Pid::from_raw(i32::try_from(process.id()).unwrap()), signal).unwrap();
    }

    /// Cuts a member off from the others; its clients still reach it.
    pub fn cut(&self, number: usize) {
        let id = self.etcd(number, async |client| client.status().await.unwrap());
        self.net.cut(number, id.header().unwrap().member_id());
    }

    /// Joins all members again.
    pub fn join(&self) {
        self.net.join();
    }

    /// The number of the member that leads.
    pub fn leader(&self) -> usize {
        let ask = |number| self.etcd(number, async |client| client.status().await.unwrap());
        let leader = ask(0).leader();
        let is_leader = |number: &usize| ask(*number).header().unwrap().member_id() == leader;
        (0..self.servers.len()).find(is_leader).unwrap()
    }

    /// Asks one member as any client of etcd could.
    pub fn etcd<T>(&self, number: usize, ask: impl AsyncFnOnce(&mut Client) -> T) -> T {
        self.etcd_as(number, None, ask)
    }

    /// Asks as a user.
    pub fn etcd_as<T>(
        &self,
        number: usize,
        options: Option<ConnectOptions>,
        ask: impl AsyncFnOnce(&mut Client) -> T,
    ) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut client = Client::connect([self.url(number)], options).await.unwrap();
            ask(&mut client).await
        })
    }

    /// What a member has at a key by itself, without asking the others.
    pub fn held_by(&self, number: usize, key: &str) -> String {
        let alone = GetOptions::new().with_serializable();
        let said = self.etcd(number, async |client| client.get(key, Some(alone)).await.unwrap());
        said.kvs().first().map(|kv| kv.value_str().unwrap().to_owned()).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        (0..self.servers.len()).for_each(|number| self.kill(number));
    }
}
