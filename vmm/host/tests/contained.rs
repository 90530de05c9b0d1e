//! Containment by trying: a process of its own puts itself under a thread's rules and then tries
//! what it may not do. docs/security.md says what the table says.
#![allow(clippy::disallowed_methods, reason = "it starts no program but itself")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::net::ToSocketAddrs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ftvmm_host::contain::calls::groups;
use ftvmm_host::contain::{Mode, Reach, Thread, User, configure, try_enter};
use ftvmm_host::folder::Folder;
use ftvmm_host::user_file;
use libc::c_long;

/// What [`child`] is to do; a name of a thread, a name of a deed, a folder.
const ORDER: &str = "FTVMM_TEST_CONTAINED";
/// The status of a process that made a call it may not make (docs/options.md).
const VIOLATION: i32 = 148;

/// Does `deed` in a process of its own, under the rules of `thread`.
fn tried(thread: &str, deed: &str, folder: &Path) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(ORDER, format!("{thread};{deed};{}", folder.display()))
        .output()
        .unwrap()
}

fn call(number: c_long, arguments: [usize; 6]) -> c_long {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: each deed names a call whose arguments are numbers or null, which the kernel checks.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

/// What a contained thread tries, with a folder that is held since before. True when the kernel let
/// it.
fn attempt(deed: &str, folder: &Path, held: &Folder) -> bool {
    let failed = |answer: c_long| answer < 0;
    match deed {
        "nothing" => true,
        "execve" => !failed(call(libc::SYS_execve, [0; 6])),
        "ptrace" => !failed(call(libc::SYS_ptrace, [0; 6])),
        "mount" => !failed(call(libc::SYS_mount, [0; 6])),
        "setuid" => !failed(call(libc::SYS_setuid, [0; 6])),
        "fork" => !failed(call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0, 0])),
        "kill another" => !failed(call(libc::SYS_tgkill, [1, 1, 0, 0, 0, 0])),
        "code" => {
            let rights = (libc::PROT_READ | libc::PROT_EXEC) as usize;
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
            !failed(call(libc::SYS_mmap, [0, 4096, rights, flags, usize::MAX, 0]))
        }
        "open a path" => !failed(call(libc::SYS_open, [0; 6])),
        "unlink a path" => !failed(call(libc::SYS_unlink, [0; 6])),
        "rename a path" => !failed(call(libc::SYS_rename, [0; 6])),
        "link a path" => !failed(call(libc::SYS_link, [0; 6])),
        "make a folder" => !failed(call(libc::SYS_mkdirat, [0; 6])),
        "write held" => held.create_new("report".as_ref()).is_ok(),
        "rename held" => held.rename("report".as_ref(), "other".as_ref()).is_ok(),
        "work held" => works(held).is_ok(),
        "look a name up" => {
            // Whatever comes of it: this machine may know no names.
            drop(("localhost", 0).to_socket_addrs());
            true
        }
        "open" => std::fs::read("/proc/version").is_ok(),
        "socket" => !failed(call(libc::SYS_socket, [libc::AF_UNIX as usize, 1, 0, 0, 0, 0])),
        "packets" => !failed(call(libc::SYS_socket, [libc::AF_PACKET as usize, 3, 0, 0, 0, 0])),
        "kvm" => !failed(call(libc::SYS_ioctl, [0, 0xae80, 0, 0, 0, 0])),
        "type" => !failed(call(libc::SYS_ioctl, [0, libc::TIOCSTI as usize, 0, 0, 0, 0])),
        "memory" => {
            let pages = vec![7u8; 64 << 20];
            std::hint::black_box(&pages).len() == 64 << 20
        }
        "thread" => std::thread::spawn(|| 7).join().unwrap() == 7,
        "contained thread" => {
            std::thread::spawn(|| try_enter(Thread::Incident).is_ok()).join().unwrap()
        }
        "write inside" => std::fs::write(folder.join("inside/new"), "x").is_ok(),
        "write outside" => std::fs::write(folder.join("new"), "x").is_ok(),
        "write outside from a thread" => {
            let path = folder.join("new");
            let written = Thread::Incident.start(move || std::fs::write(path, "x").is_ok());
            written.unwrap().join().unwrap()
        }
        "thread without descriptors" => {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: the limits are whole and outlive the call.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const none) }, 0);
            Thread::Incident.start(|| 7).unwrap().join().unwrap() == 7
        }
        "read outside" => std::fs::read(folder.join("secret")).is_ok(),
        other => panic!("what is {other}?"),
    }
}

/// All that is done with files in a folder that is held.
fn works(held: &Folder) -> std::io::Result<()> {
    let [first, second, third] = ["first", "second", "third"].map(std::ffi::OsStr::new);
    held.replace(first, b"x")?;
    held.replace(first, b"xy")?;
    held.rename(first, second)?;
    held.link(second, third)?;
    held.remove(second)?;
    held.sync()?;
    let other = std::io::Error::other::<user_file::FileError>;
    let read = user_file::read_in("file", held, third, 2, "").map_err(other)?;
    user_file::create_in("file", held, second, false).map_err(other)?;
    let names = held.names()?;
    let ours = names.iter().filter(|name| [first, second, third].contains(&name.as_os_str()));
    let is_right = (read.as_slice(), ours.count(), held.facts(third)?.st_size) == (b"xy", 2, 2);
    is_right.then_some(()).ok_or_else(|| std::io::Error::other("not what was written"))
}

#[test]
#[ignore = "a part of the other tests, in a process of its own"]
fn child() {
    let order = std::env::var(ORDER).unwrap();
    let [name, deed, folder] = order.split(';').collect::<Vec<_>>().try_into().unwrap();
    let folder = PathBuf::from(folder);
    let mut held = Folder::open(&folder).unwrap();
    if name == "landlock only" {
        let [inside, moved] = ["inside", "moved"].map(|name| folder.join(name));
        held = Folder::open(&inside).unwrap();
        let reach = Reach { folders: vec![inside.clone()], ..Reach::default() };
        configure(Mode::Off, Some(&reach)).unwrap();
        if deed == "work held" {
            std::fs::rename(inside, moved).unwrap();
        }
        try_enter(Thread::Recording).unwrap();
    } else {
        configure(Mode::On, None).unwrap();
        let thread = Thread::ALL.into_iter().find(|thread| thread.name() == name).unwrap();
        try_enter(thread).unwrap();
    }
    let worked = attempt(deed, &folder, &held);
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(if worked { 0 } else { 1 }) }
}

fn refused(thread: Thread, deed: &str) {
    let output = tried(thread.name(), deed, Path::new("/"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(VIOLATION), "{} {deed}: {said}", thread.name());
    let says = format!("ftvmm: thread '{}' made system call ", thread.name());
    assert!(said.contains(&says), "{} {deed}: {said}", thread.name());
}

fn allowed(thread: Thread, deed: &str) {
    let output = tried(thread.name(), deed, Path::new("/"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{} {deed}: {said}", thread.name());
}

#[test]
fn no_thread_may_do_what_none_needs() {
    for thread in Thread::ALL {
        for deed in ["execve", "ptrace", "mount", "setuid", "fork", "kill another", "code", "type"]
        {
            refused(thread, deed);
        }
        for deed in
            ["open a path", "unlink a path", "rename a path", "link a path", "make a folder"]
        {
            refused(thread, deed);
        }
        for deed in ["nothing", "memory"] {
            allowed(thread, deed);
        }
    }
}

#[test]
fn a_thread_may_do_what_it_is_for_and_not_what_others_are_for() {
    for thread in [Thread::Stderr, Thread::ConsoleOut, Thread::StopLimit, Thread::Recording] {
        for deed in ["open", "socket", "kvm"] {
            refused(thread, deed);
        }
        // libc starts a thread with all signals blocked, and a blocked SIGSYS ends the process
        // before the handler can say why.
        let output = tried(thread.name(), "thread", Path::new("/"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{}", thread.name());
    }
    for thread in [Thread::HostEvents, Thread::Disk, Thread::ControlClient, Thread::Witness] {
        for deed in ["socket", "packets", "kvm"] {
            refused(thread, deed);
        }
        allowed(thread, "open");
    }
    refused(Thread::Vcpu, "packets");
    allowed(Thread::Etcd, "look a name up");
    for thread in Thread::ALL.into_iter().filter(|thread| !thread.starts().is_empty()) {
        allowed(thread, "thread");
        allowed(thread, "contained thread");
    }
}

#[test]
fn who_writes_files_does_it_in_a_folder_that_is_held_and_a_report_is_only_made() {
    for thread in [Thread::Vcpu, Thread::Disk, Thread::Witness, Thread::ControlClient] {
        let folder = tempfile::tempdir().unwrap();
        let output = tried(thread.name(), "work held", folder.path());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{}: {said}", thread.name());
        assert_eq!(std::fs::read(folder.path().join("third")).unwrap(), b"xy");
    }
    let folder = tempfile::tempdir().unwrap();
    let incident = Thread::Incident.name();
    for (deed, status) in [("write held", 0), ("rename held", VIOLATION)] {
        let output = tried(incident, deed, folder.path());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{deed}: {said}");
    }
}

#[test]
fn a_violation_names_the_call() {
    let output = tried("stderr", "ptrace", Path::new("/"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let says = format!("system call {}, which its seccomp filter", libc::SYS_ptrace);
    assert!(said.contains(&says), "{said}");
}

#[test]
fn what_a_thread_starts_it_may_do_itself() {
    for thread in Thread::ALL {
        let own = thread.allowed();
        for child in thread.starts() {
            for group in child.allowed() {
                assert!(own.contains(&group), "{thread:?} starts {child:?}: {}", group.name);
            }
        }
    }
}

#[test]
fn files_outside_the_folders_cannot_be_reached() {
    if ftvmm_host::contain::landlock_here().starts_with("no") {
        eprintln!("not tried: this kernel has no Landlock");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("inside")).unwrap();
    std::fs::write(folder.path().join("secret"), "x").unwrap();
    for (deed, status) in [
        ("write inside", 0),
        ("write outside", 1),
        ("read outside", 1),
        ("write outside from a thread", 1),
        ("thread without descriptors", 0),
        ("work held", 0),
    ] {
        let output = tried("landlock only", deed, folder.path());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{deed}: {said}");
    }
}

#[test]
#[ignore = "a part of the other tests, in a process of its own"]
fn child_becomes_a_user() {
    User::parse("12345:12346").unwrap().become_it().unwrap();
    let status = std::thread::spawn(|| std::fs::read_to_string("/proc/thread-self/status"));
    for text in [status.join().unwrap(), std::fs::read_to_string("/proc/thread-self/status")] {
        let text = text.unwrap();
        for line in [
            "Uid:\t12345\t12345\t12345\t12345",
            "Gid:\t12346\t12346\t12346\t12346",
            "CapEff:\t0000000000000000",
            "CapPrm:\t0000000000000000",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
    User::parse("12347:12347").unwrap().become_it().unwrap_err();
}

#[test]
fn another_user_is_another_one_for_ever() {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("not tried: this needs root");
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_becomes_a_user", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The two tables of docs/security.md, from the table of the code.
fn tables() -> String {
    let names = |calls: &[ftvmm_host::contain::calls::Call]| {
        let mut names: Vec<_> = calls.iter().map(|call| call.name()).collect();
        names.dedup();
        names.join(", ")
    };
    let mut text = String::from("| thread | groups |\n| --- | --- |\n");
    for thread in Thread::ALL {
        let own: Vec<_> = thread.own().iter().map(|group| group.name).collect();
        let inherited: Vec<_> = thread.allowed().iter().map(|group| group.name).collect();
        let inherited: Vec<_> = inherited.into_iter().filter(|name| !own.contains(name)).collect();
        let more = match inherited.as_slice() {
            [] => String::new(),
            more => format!("; for the threads it starts: {}", more.join(", ")),
        };
        text += &format!("| `{}` | {}{more} |\n", thread.name(), own.join(", "));
    }
    text += "\n| group | system calls |\n| --- | --- |\n";
    for group in groups() {
        text += &format!("| {} | {} |\n", group.name, names(group.calls));
    }
    text
}

#[test]
fn the_document_says_what_each_thread_may_do() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/security.md");
    let document = std::fs::read_to_string(path).unwrap();
    assert!(document.contains(&tables()), "docs/security.md should have:\n{}", tables());
}
