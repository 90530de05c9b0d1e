//! Which system calls each thread may make: a table, which docs/security.md repeats.
//!
//! A thread that is started by another inherits its filters and adds its own (seccomp(2)), so what
//! a thread may do includes what the threads that it starts may do ([`Thread::allowed`]).

use libc::c_long;

/// A thread of ftvmm, by what it does (ARCHITECTURE.md, "Threads and lock order").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Thread {
    /// The main thread, which runs the guest.
    Vcpu,
    /// epoll over tap, channel and timers.
    HostEvents,
    /// Reads standard input.
    Console,
    /// Writes what the guest prints.
    ConsoleOut,
    /// Writes messages.
    Stderr,
    /// Executes the guest's requests.
    Disk,
    /// Writes the log file.
    Recording,
    /// Claims a term at the witness.
    Witness,
    /// Writes an incident report.
    Incident,
    /// Sends the guest's state.
    Transfer,
    /// Waits for signals.
    Signals,
    /// Asks the run to end.
    Stop,
    /// Ends a process whose end takes too long.
    StopLimit,
    /// Accepts clients of the control socket.
    Control,
    /// Serves one of them.
    ControlClient,
    /// Hears a stranger at the channel until it has proved who it is.
    Handshake,
    /// Connects to the other host again.
    Connect,
    /// Speaks with an etcd.
    Etcd,
}

/// A system call, perhaps only with some arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number on x86-64.
    pub number: c_long,
    name: &'static str,
    /// With which arguments.
    pub only: Only,
}

/// With which arguments a call is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// With any.
    Any,
    /// When the low 32 bits of this argument are one of these.
    Among(u8, &'static [u32]),
    /// When this argument has none of these bits.
    Without(u8, u32),
    /// When this argument has all of these bits.
    With(u8, u32),
    /// When this argument, masked, is this value.
    Masked(u8, u32, u32),
    /// When this argument is this process's own id.
    OwnProcess(u8),
}

impl Call {
    /// Its name in syscalls(2).
    pub fn name(&self) -> &'static str {
        self.name.trim_start_matches("SYS_")
    }
}

macro_rules! calls {
    ($($number:ident $(if $only:expr)?),* $(,)?) => {
        &[$(Call {
            number: libc::$number,
            name: stringify!($number),
            only: calls!(@only $($only)?),
        }),*]
    };
    (@only $only:expr) => { $only };
    (@only) => { Only::Any };
}

/// Calls that serve one purpose.
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    /// What docs/security.md calls it.
    pub name: &'static str,
    /// The calls.
    pub calls: &'static [Call],
}

const PROT_EXEC: u32 = libc::PROT_EXEC as u32;
/// The ioctls of a terminal: its settings (tty_ioctl(4)), and who is in its foreground.
const TERMINAL: &[u32] = &[
    libc::TCGETS as u32,
    libc::TCSETS as u32,
    libc::TCSETSW as u32,
    libc::TCSETSF as u32,
    libc::TIOCGPGRP as u32,
    libc::TIOCGWINSZ as u32,
];
const PRCTL: &[u32] =
    &[libc::PR_SET_NAME as u32, libc::PR_SET_NO_NEW_PRIVS as u32, libc::PR_SET_VMA as u32];
const INTERNET: &[u32] = &[libc::AF_INET as u32, libc::AF_INET6 as u32];
/// A resolver asks over these too: nscd and the interfaces' addresses.
const RESOLVER: &[u32] =
    &[libc::AF_INET as u32, libc::AF_INET6 as u32, libc::AF_UNIX as u32, libc::AF_NETLINK as u32];

/// What Rust, the allocator and libc do in any thread: memory that is never executable, locks,
/// sleep, messages, the end.
const BASE: &Group = &Group {
    name: "base",
    calls: calls![
        SYS_futex, SYS_brk, SYS_mmap if Only::Without(2, PROT_EXEC),
        SYS_mprotect if Only::Without(2, PROT_EXEC), SYS_munmap, SYS_mremap, SYS_madvise,
        SYS_rt_sigprocmask, SYS_rt_sigaction, SYS_rt_sigreturn, SYS_sigaltstack,
        SYS_restart_syscall, SYS_sched_yield, SYS_sched_getaffinity, SYS_membarrier, SYS_getrandom,
        SYS_gettid, SYS_getpid, SYS_tgkill if Only::OwnProcess(0), SYS_clock_gettime,
        SYS_clock_nanosleep, SYS_nanosleep, SYS_set_robust_list, SYS_rseq,
        SYS_prctl if Only::Among(0, PRCTL), SYS_prlimit64 if Only::Masked(2, u32::MAX, 0),
        SYS_write, SYS_writev, SYS_close, SYS_poll, SYS_ppoll, SYS_fcntl,
        SYS_ioctl if Only::Among(1, TERMINAL), SYS_exit, SYS_exit_group,
    ],
};

/// Reading from what is open.
const READ: &Group = &Group { name: "read", calls: calls![SYS_read, SYS_readv] };

/// Waiting for signals (sigwaitinfo(2)).
const SIGNALS: &Group = &Group { name: "signals", calls: calls![SYS_rt_sigtimedwait] };

/// Starting a thread of this process, under a filter of its own. clone3's arguments are in memory,
/// where a filter cannot see them: it fails with ENOSYS, and libc takes clone.
const SPAWN: &Group = &Group {
    name: "threads",
    calls: calls![
        SYS_clone if Only::With(0, libc::CLONE_THREAD as u32), SYS_clone3, SYS_set_tid_address,
        SYS_seccomp, SYS_landlock_restrict_self, SYS_dup, SYS_fcntl,
    ],
};

/// Waking and timing the other threads.
const WAKE: &Group = &Group {
    name: "events",
    calls: calls![
        SYS_epoll_wait,
        SYS_epoll_pwait,
        SYS_epoll_ctl,
        SYS_timerfd_settime,
        SYS_timerfd_gettime,
        SYS_eventfd2,
    ],
};

/// The bytes of an open file.
const FILE_DATA: &Group = &Group {
    name: "file data",
    calls: calls![
        SYS_pread64, SYS_pwrite64, SYS_preadv, SYS_pwritev, SYS_lseek, SYS_fallocate,
        SYS_ftruncate, SYS_fsync, SYS_fdatasync, SYS_fstat, SYS_statx, SYS_newfstatat, SYS_flock,
        SYS_fadvise64, SYS_ioctl if Only::Among(1, DISCARDS),
    ],
};
/// BLKDISCARD, BLKGETSIZE64, BLKZEROOUT (linux/fs.h).
const DISCARDS: &[u32] = &[0x1277, 0x8008_1272, 0x127f];

/// Opening a file and making one, relative to a folder that is held; Landlock says where. What a
/// backtrace asks to find this program.
const OPEN: &Group =
    &Group { name: "open", calls: calls![SYS_openat, SYS_fchmod, SYS_getcwd, SYS_readlink] };

/// The names in a folder, through its descriptor (decision 0039): no path is changed.
const FOLDERS: &Group = &Group {
    name: "folders",
    calls: calls![SYS_unlinkat, SYS_renameat, SYS_linkat, SYS_getdents64],
};

/// The channel: connections over IP.
const NETWORK: &Group = &Group {
    name: "network",
    calls: calls![
        SYS_socket if Only::Among(0, INTERNET), SYS_connect, SYS_bind, SYS_listen, SYS_accept4,
        SYS_accept, SYS_shutdown, SYS_sendto, SYS_recvfrom, SYS_sendmsg, SYS_recvmsg,
        SYS_getsockname, SYS_getpeername, SYS_getsockopt, SYS_setsockopt,
        SYS_ioctl if Only::Among(1, LINKS),
    ],
};
/// SIOCGIFFLAGS, FIONBIO, FIONREAD, SIOCOUTQ.
const LINKS: &[u32] = &[0x8913, 0x5421, 0x541b, 0x5411];

/// A connection that is there.
const CONNECTION: &Group = &Group {
    name: "connection",
    calls: calls![
        SYS_accept4, SYS_shutdown, SYS_sendto, SYS_recvfrom, SYS_sendmsg, SYS_recvmsg,
        SYS_getsockname, SYS_getpeername, SYS_getsockopt, SYS_setsockopt,
        SYS_ioctl if Only::Among(1, LINKS),
    ],
};

/// A tap that was deleted and made again is opened again.
const TAP: &Group = &Group { name: "tap", calls: calls![SYS_ioctl if Only::Among(1, TUN)] };
/// TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ (linux/if_tun.h).
const TUN: &[u32] = &[0x4004_54ca, 0x4004_54d0, 0x4004_54d8];

/// A client of a server by its name.
const RESOLVE: &Group = &Group {
    name: "names",
    calls: calls![
        SYS_socket if Only::Among(0, RESOLVER), SYS_socketpair if Only::Among(0, RESOLVER),
        SYS_epoll_create1, SYS_uname, SYS_sendmmsg, SYS_recvmmsg,
    ],
};

/// KVM's own ioctls, all of type 0xAE (linux/kvm.h, KVMIO).
const KVM: &Group =
    &Group { name: "KVM", calls: calls![SYS_ioctl if Only::Masked(1, 0xff00, 0xae00)] };

impl Thread {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::Vcpu,
        Self::HostEvents,
        Self::Console,
        Self::ConsoleOut,
        Self::Stderr,
        Self::Disk,
        Self::Recording,
        Self::Witness,
        Self::Incident,
        Self::Transfer,
        Self::Signals,
        Self::Stop,
        Self::StopLimit,
        Self::Control,
        Self::ControlClient,
        Self::Handshake,
        Self::Connect,
        Self::Etcd,
    ];

    /// What the kernel and messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "main (vCPU)",
            Self::HostEvents => "host-events",
            Self::Console => "console",
            Self::ConsoleOut => "console-out",
            Self::Stderr => "stderr",
            Self::Disk => "disk",
            Self::Recording => "recording",
            Self::Witness => "witness",
            Self::Incident => "incident",
            Self::Transfer => "transfer",
            Self::Signals => "signals",
            Self::Stop => "stop",
            Self::StopLimit => "stop-limit",
            Self::Control => "control",
            Self::ControlClient => "control-client",
            Self::Handshake => "handshake",
            Self::Connect => "connect",
            Self::Etcd => "etcd",
        }
    }

    /// What it does itself. A thread that steps the peer performs the effects too: it sends, and
    /// starts the threads of claims, reports and transfers.
    pub fn own(self) -> &'static [&'static Group] {
        match self {
            Self::Vcpu => {
                &[BASE, READ, SPAWN, WAKE, NETWORK, FILE_DATA, OPEN, FOLDERS, SIGNALS, KVM]
            }
            Self::HostEvents => &[BASE, READ, SPAWN, WAKE, NETWORK, TAP, FILE_DATA, OPEN],
            Self::Disk | Self::Witness | Self::ControlClient => {
                &[BASE, READ, SPAWN, WAKE, NETWORK, FILE_DATA, OPEN, FOLDERS]
            }
            Self::Transfer => &[BASE, READ, SPAWN, WAKE, NETWORK, FILE_DATA],
            Self::Stop => &[BASE, READ, SPAWN, WAKE, NETWORK],
            Self::Console => &[BASE, READ, WAKE],
            Self::ConsoleOut | Self::Stderr | Self::StopLimit => &[BASE],
            Self::Recording => &[BASE, FILE_DATA],
            Self::Incident => &[BASE, FILE_DATA, OPEN],
            Self::Signals => &[BASE, SPAWN, SIGNALS],
            Self::Control => &[BASE, SPAWN, CONNECTION],
            Self::Handshake => &[BASE, READ, WAKE, CONNECTION],
            Self::Connect => &[BASE, READ, NETWORK],
            Self::Etcd => &[BASE, READ, SPAWN, WAKE, NETWORK, RESOLVE, FILE_DATA, OPEN],
        }
    }

    /// The threads that it starts.
    pub fn starts(self) -> &'static [Self] {
        match self {
            Self::Vcpu => &[Self::Witness, Self::Incident, Self::Transfer, Self::Handshake],
            Self::HostEvents => {
                &[Self::Witness, Self::Incident, Self::Transfer, Self::Handshake, Self::Connect]
            }
            Self::Disk | Self::Witness | Self::Transfer | Self::Stop | Self::ControlClient => {
                &[Self::Witness, Self::Incident, Self::Transfer]
            }
            Self::Signals => &[Self::Stop],
            Self::Control => &[Self::ControlClient],
            _ => &[],
        }
    }

    /// The groups of calls that it may make: its own and those of the threads that it starts.
    pub fn allowed(self) -> Vec<&'static Group> {
        let (mut seen, mut open) = (vec![self], vec![self]);
        let mut groups: Vec<&'static Group> = Vec::new();
        while let Some(thread) = open.pop() {
            for group in thread.own() {
                if !groups.contains(group) {
                    groups.push(group);
                }
            }
            for child in thread.starts() {
                if !seen.contains(child) {
                    seen.push(*child);
                    open.push(*child);
                }
            }
        }
        groups
    }

    /// The calls that it may make, the same one perhaps more than once with other arguments.
    pub fn calls(self) -> impl Iterator<Item = &'static Call> {
        // What installs the filters is allowed in every thread that installs one: a child's
        // filter comes on top of its parent's.
        self.allowed().into_iter().flat_map(|group| group.calls)
    }
}

/// All groups, for the document.
pub fn groups() -> Vec<&'static Group> {
    let mut all: Vec<&'static Group> = Vec::new();
    for group in Thread::ALL.iter().flat_map(|thread| thread.own()) {
        if !all.contains(group) {
            all.push(group);
        }
    }
    all
}
