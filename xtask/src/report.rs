//! The report of a run on this machine, made to be sent to the project: docs/report.md.
//!
//! It says what the machine is and what came out on it, and nothing of who or where it is: no host
//! name, no address, no user, no path.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use ftvmm_tests::lab::{Backend, choose_backend};
use ftvmm_tests::{Program, built, clock};
use serde::Serialize;
use serde_json::Value;

/// Of the file; another number when a field changes its meaning.
const VERSION: u32 = 1;
const FOLDER: &str = "out/reports";
/// KVM's kernel modules.
const MODULES: &[&str] = &["kvm", "kvm_amd", "kvm_intel"];
/// What /proc/cpuinfo says of a CPU's identity.
const CPU_FACTS: &[&str] =
    &["vendor_id", "cpu family", "model", "model name", "stepping", "microcode"];

/// Everything in the file.
#[derive(Debug, Serialize)]
pub struct MachineReport {
    version: u32,
    command: &'static str,
    unix_seconds: u64,
    commit: String,
    machine: Machine,
    backend: &'static str,
    backend_because: String,
    doctor: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    bench: Option<Bench>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    steps: Vec<Step>,
}

/// The figures of a bench, and how they are shown.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Bench {
    /// As they were measured.
    pub figures: Value,
    /// A table of them, in Markdown.
    #[serde(skip)]
    pub table: String,
    /// What it was measured on.
    #[serde(skip)]
    pub subtitle: String,
}

/// What the machine is.
#[derive(Debug, Serialize)]
struct Machine {
    /// Of [`CPU_FACTS`], those that are known.
    cpu: BTreeMap<String, String>,
    cpus: usize,
    memory_mib: u64,
    system: String,
    kernel: String,
    /// Parameters of each of KVM's modules that is loaded.
    kvm: BTreeMap<String, BTreeMap<String, String>>,
}

/// A step of the tests.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// Its name, as `--only` takes it.
    pub name: String,
    /// How long it took.
    pub seconds: f64,
    /// Tests that passed; a step without tests is one itself.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
}

impl MachineReport {
    /// Asks this machine and its `ftvmm doctor`.
    ///
    /// # Errors
    /// When the doctor does not answer.
    pub fn new(command: &'static str, ftvmm: &Path) -> Result<Self, Box<dyn Error>> {
        let (backend, backend_because) = choose_backend(ftvmm)?;
        // Status 1 only repeats `"suitable": false`.
        let said = built(ftvmm).args(["doctor", "--json"]).output()?;
        let doctor: Value = serde_json::from_slice(&said.stdout)
            .map_err(|error| format!("{} doctor --json: {error}", ftvmm.display()))?;
        Ok(Self {
            version: VERSION,
            command,
            unix_seconds: clock::since_epoch().as_secs(),
            commit: commit(),
            machine: Machine::this(),
            backend: match backend {
                Backend::Lab => "lab",
                Backend::Local => "local",
            },
            backend_because,
            doctor,
            bench: None,
            steps: Vec::new(),
        })
    }

    /// With the figures of a bench.
    pub fn with_bench(self, bench: Bench) -> Self {
        Self { bench: Some(bench), ..self }
    }

    /// With the steps of the tests.
    pub fn with_steps(self, steps: Vec<Step>) -> Self {
        Self { steps, ..self }
    }

    /// Writes it as JSON and to be read, says where.
    ///
    /// # Errors
    /// What the file system said.
    pub fn write(&self) -> Result<(), Box<dyn Error>> {
        let folder = Path::new(FOLDER);
        fs::create_dir_all(folder)?;
        let name = format!("{}-{}", self.command, self.unix_seconds);
        let path = |kind: &str| folder.join(format!("{name}.{kind}"));
        let secrets = secrets();
        fs::write(path("json"), without(&serde_json::to_string_pretty(self)?, &secrets) + "\n")?;
        fs::write(path("md"), without(&self.markdown(), &secrets))?;
        println!("report to send in (docs/report.md): {}", path("json").display());
        Ok(())
    }

    fn markdown(&self) -> String {
        let Machine { cpu, cpus, memory_mib, system, kernel, kvm } = &self.machine;
        let model = cpu.get("model name").map_or("an unknown CPU", String::as_str);
        let parameters = kvm.iter().map(|(module, parameters)| {
            let all: Vec<String> = parameters.iter().map(|(n, v)| format!("{n}={v}")).collect();
            format!("- `{module}`: {}\n", all.join(" "))
        });
        let mut text = format!(
            "# `cargo xtask {}` at {}\n\n{cpus} × {model}, {memory_mib} MiB; {system}, Linux \
             {kernel}\n\n\
             Hosts: {}, because: {}\n\n{}\n",
            self.command,
            self.commit,
            self.backend,
            self.backend_because,
            parameters.collect::<String>(),
        );
        text += "| check | verdict | what was found |\n|---|---|---|\n";
        for check in self.doctor["checks"].as_array().into_iter().flatten() {
            let [name, verdict, detail] =
                ["name", "verdict", "detail"].map(|key| check[key].as_str().unwrap_or_default());
            text += &format!("| {name} | {verdict} | {} |\n", detail.replace('|', "\\|"));
        }
        if let Some(bench) = &self.bench {
            text += &format!("\n{}\n{}\n", bench.table, bench.subtitle);
        }
        if !self.steps.is_empty() {
            text += "\n| step | seconds | passed | failed |\n|---|---:|---:|---:|\n";
            for Step { name, seconds, passed, failed } in &self.steps {
                text += &format!("| {name} | {seconds:.0} | {passed} | {failed} |\n");
            }
        }
        text
    }
}

impl Machine {
    fn this() -> Self {
        let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let memory = file("/proc/meminfo");
        let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let memory = memory.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        let system = file("/etc/os-release");
        let system = system.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
        let modules = MODULES.iter().filter_map(|module| {
            let folder = Path::new("/sys/module").join(module).join("parameters");
            Some(((*module).to_owned(), parameters(&folder)?))
        });
        Self {
            cpu: cpu_facts(&file("/proc/cpuinfo")),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory.unwrap_or(0) / 1024,
            system: system.unwrap_or_default().trim_matches('"').to_owned(),
            kernel: file("/proc/sys/kernel/osrelease").trim().to_owned(),
            kvm: modules.collect(),
        }
    }
}

/// What was built, as git describes it.
pub fn commit() -> String {
    let said = Program::Git.command().ok().and_then(|mut git| {
        let said = git.args(["describe", "--always", "--dirty"]).output().ok()?;
        Some(String::from_utf8_lossy(&said.stdout).trim().to_owned())
    });
    said.unwrap_or_default()
}

/// The first CPU's.
fn cpu_facts(cpuinfo: &str) -> BTreeMap<String, String> {
    let first = cpuinfo.lines().take_while(|line| !line.is_empty());
    let facts = first.filter_map(|line| line.split_once(':'));
    let facts = facts.map(|(name, value)| (name.trim(), value.trim()));
    let facts = facts.filter(|(name, _)| CPU_FACTS.contains(name));
    facts.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// A module's parameters; those that root may not read either are left out.
fn parameters(folder: &Path) -> Option<BTreeMap<String, String>> {
    let files = fs::read_dir(folder).ok()?.flatten();
    let value = |path: PathBuf| Some(fs::read_to_string(path).ok()?.trim().to_owned());
    let parameter = |file: fs::DirEntry| {
        Some((file.file_name().to_string_lossy().into_owned(), value(file.path())?))
    };
    Some(files.filter_map(parameter).collect())
}

/// Words that would tell whose machine it is, and what stands for them.
fn secrets() -> Vec<(String, &'static str)> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let here = std::env::current_dir().unwrap_or_default().display().to_string();
    vec![
        (here, "<checkout>"),
        (variable("HOME"), "<home>"),
        (host.trim().to_owned(), "<host>"),
        (variable("SUDO_USER"), "<user>"),
        (variable("USER"), "<user>"),
    ]
}

/// The text without the words; one so short or so common that it stands in other words tells
/// nothing.
fn without(text: &str, secrets: &[(String, &str)]) -> String {
    /// Names of users and hosts that a machine has before anybody names them.
    const COMMON: &[&str] = &["root", "localhost", "debian"];
    let tells = |word: &str| word.len() > 2 && !COMMON.contains(&word);
    secrets
        .iter()
        .filter(|(word, _)| tells(word))
        .fold(text.to_owned(), |text, (word, instead)| text.replace(word, instead))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_machine_it_is_is_not_told() {
        let secrets = [
            ("/home/ann/ftvmm".to_owned(), "<checkout>"),
            ("/home/ann".to_owned(), "<home>"),
            ("build-7.example".to_owned(), "<host>"),
            ("root".to_owned(), "<user>"),
            (String::new(), "<user>"),
        ];
        let text = "/home/ann/ftvmm/target, /home/ann/x on build-7.example, by root";
        let wanted = "<checkout>/target, <home>/x on <host>, by root";
        assert_eq!(without(text, &secrets), wanted);
    }

    #[test]
    fn the_first_cpu_says_what_it_is() {
        let text = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t\t: 1\nmodel name\t: EPYC\n\
                    flags\t: svm\n\nprocessor\t: 1\nvendor_id\t: Other\n";
        let facts = cpu_facts(text);
        assert_eq!(facts["vendor_id"], "AuthenticAMD");
        assert_eq!(facts["model name"], "EPYC");
        assert_eq!(facts.len(), 3, "{facts:?}");
    }

    #[test]
    fn this_machine_is_described() {
        let machine = Machine::this();
        assert!(machine.memory_mib > 0 && machine.cpus > 0, "{machine:?}");
        assert!(!machine.kernel.is_empty() && !machine.cpu.is_empty(), "{machine:?}");
    }

    #[test]
    fn a_reader_sees_checks_and_steps_and_the_document_names_every_field() {
        let step = Step { name: "unit".into(), seconds: 12.4, passed: 3, failed: 1 };
        let doctor = serde_json::json!({"suitable": false, "checks": [
            {"name": "HLT exit", "verdict": "fail", "detail": "a|b"}]});
        let report = MachineReport {
            version: VERSION,
            command: "test",
            unix_seconds: 1,
            commit: "abc".into(),
            machine: Machine::this(),
            backend: "lab",
            backend_because: "no svm".into(),
            doctor,
            bench: None,
            steps: vec![step],
        };
        let text = report.markdown();
        assert!(text.contains("| HLT exit | fail | a\\|b |"), "{text}");
        assert!(text.contains("| unit | 12 | 3 | 1 |"), "{text}");

        let document = include_str!("../../docs/report.md");
        let json = serde_json::to_value(&report).unwrap();
        let fields = [&json, &json["machine"], &json["steps"][0]].map(|v| v.as_object().unwrap());
        for field in fields.into_iter().flat_map(|object| object.keys()) {
            assert!(document.contains(&format!("`{field}`")), "docs/report.md lacks {field}");
        }
        assert!(document.contains("`bench`"));
    }
}
