//! Whatever is wrong with what the user gave is said in one line, with the exit status that
//! decision 0024 gives it.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use ftvmm_guest_images::GuestKernel;
use ftvmm_tests::guest_run::{GuestLab, LabPool};
use ftvmm_tests::lab::Ended;
use libtest_mimic::{Arguments, Failed, Trial};

/// A kernel command line longer than Linux takes.
const LONG: &str = "long=$(head -c 3000 /dev/zero | tr '\\0' x)";
/// Runs what follows where /dev/kvm is another file, in a mount namespace of its own.
const ELSEWHERE: &str = "unshare -m sh -ec 'mount -t tmpfs none /tmp; ";

/// A mistake, made in the shell of a host.
struct Mistake {
    name: &'static str,
    /// `$GOOD` runs a guest; what follows adds to it.
    shell: &'static str,
    status: i32,
    /// What the line must say.
    says: &'static [&'static str],
}

const fn mistake(
    name: &'static str,
    shell: &'static str,
    status: i32,
    says: &'static [&'static str],
) -> Mistake {
    Mistake { name, shell, status, says }
}

const MISTAKES: &[Mistake] = &[
    mistake("no_arguments", "ftvmm", 2, &["--kernel", "--help"]),
    mistake("unknown_option", "$GOOD --colour red", 2, &["--colour"]),
    mistake("unknown_command", "ftvmm reply x.log", 2, &["reply"]),
    mistake(
        "answer_onto_a_full_disk",
        "ftvmm --help > /dev/full",
        1,
        &["standard output", "No space"],
    ),
    mistake("unknown_role", "$GOOD --role spare", 2, &["spare", "solo", "primary", "backup"]),
    mistake("primary_without_address", "$GOOD --role primary", 2, &["--listen"]),
    mistake("backup_without_address", "$GOOD --role backup", 2, &["--connect"]),
    mistake(
        "backup_that_records",
        "$GOOD --role backup --connect 127.0.0.1:7000 --witness file:/tmp/w --record /tmp/x",
        2,
        &["--record", "primary"],
    ),
    mistake(
        "unknown_witness",
        "$GOOD --role primary --listen 127.0.0.1:7000 --witness paper:x",
        2,
        &["paper:x", "file:PATH"],
    ),
    mistake(
        "no_address",
        "$GOOD --role primary --listen nowhere --witness file:/tmp/w",
        2,
        &["nowhere", "--listen"],
    ),
    mistake(
        "unknown_template",
        "$GOOD --cpu-template pentium",
        2,
        &["no CPU template 'pentium'", "'minimal'", "'sse4'", "'avx'"],
    ),
    mistake(
        "template_with_unknown_key",
        "printf 'name = \"t\"\ncolour = 1\n' > t.toml; $GOOD --cpu-template t.toml",
        2,
        &["'t.toml', line 2", "unknown field `colour`"],
    ),
    mistake(
        "template_leaf_out_of_range",
        "printf 'name = \"t\"\n[[cpuid]]\nleaf = 0x40000000\n' > t.toml; $GOOD --cpu-template \
         t.toml",
        2,
        &["'t.toml'", "CPUID leaf 0x40000000 is out of range"],
    ),
    mistake(
        "device_as_template",
        "$GOOD --cpu-template /dev/zero",
        2,
        &["no CPU template '/dev/zero'", "is a device, no regular file"],
    ),
    mistake("missing_kernel", "ftvmm --kernel /no/kernel", 2, &["/no/kernel", "No such file"]),
    mistake("directory_as_kernel", "ftvmm --kernel /dev", 2, &["'/dev'", "directory"]),
    mistake("text_as_kernel", "echo hello > t; ftvmm --kernel t", 2, &["'t' is no kernel"]),
    mistake("nothing_as_kernel", ": > e; ftvmm --kernel e", 2, &["'e' is no kernel"]),
    mistake("initramfs_as_kernel", "ftvmm --kernel $INITRD", 2, &["is no kernel"]),
    mistake(
        "cut_kernel",
        "head -c 500000 $KERNEL > cut; ftvmm --kernel cut",
        2,
        &["'cut' is cut off", "500000"],
    ),
    mistake(
        "missing_initramfs",
        "ftvmm --kernel $KERNEL --initrd /no/initrd",
        2,
        &["/no/initrd", "No such file"],
    ),
    mistake(
        "initramfs_too_big",
        "head -c 140000000 /dev/zero > big; ftvmm --kernel $KERNEL --initrd big",
        2,
        &["140000000 bytes does not fit", "--mem"],
    ),
    mistake("kernel_too_big", "ftvmm --kernel $STOCK --mem 32", 2, &["guest memory"]),
    mistake(
        "too_little_memory",
        "ftvmm --kernel $KERNEL --mem 16",
        2,
        &["--mem 16", "32 to 524288 MiB"],
    ),
    mistake(
        "too_much_memory",
        "ftvmm --kernel $KERNEL --mem 1000000",
        2,
        &["--mem 1000000", "32 to 524288 MiB"],
    ),
    mistake("memory_is_no_number", "ftvmm --kernel $KERNEL --mem lots", 2, &["--mem", "lots"]),
    mistake("long_command_line", "$GOOD --cmdline $LONG", 2, &["command line", "2048"]),
    mistake("missing_disk", "$GOOD --disk path=/no/d", 2, &["/no/d", "No such file"]),
    mistake("disk_without_path", "$GOOD --disk /no/d", 2, &["'/no/d'", "path=FILE"]),
    mistake("device_as_disk", "$GOOD --disk path=/dev/null", 2, &["/dev/null", "no regular file"]),
    mistake(
        "record_over_the_disk",
        "head -c 1048576 /dev/zero > d; ln -sf d l; $GOOD --disk path=d --record l --overwrite",
        2,
        &["--disk and --record name the same file", "'l'"],
    ),
    mistake(
        "record_over_the_kernel",
        "ftvmm --kernel $KERNEL --record $KERNEL",
        2,
        &["--kernel and --record name the same file"],
    ),
    mistake("record_over_a_file", "echo x > x; $GOOD --record x", 2, &["'x'", "--overwrite"]),
    mistake("record_into_a_pipe", "mkfifo p; $GOOD --record p", 2, &["'p' is a pipe"]),
    mistake("report_over_a_file", "echo x > y; $GOOD --report y", 2, &["'y'", "--overwrite"]),
    mistake("pipe_as_kernel", "mkfifo q; ftvmm --kernel q", 2, &["'q' is a pipe"]),
    mistake("endless_initramfs", "ftvmm --kernel $KERNEL --initrd /dev/zero", 2, &["is a device"]),
    mistake("pipe_as_recording", "mkfifo r; ftvmm replay r", 2, &["'r' is a pipe"]),
    mistake("pipe_to_look_into", "mkfifo s; ftvmm log stat s", 2, &["'s' is a pipe"]),
    mistake("listen_alone", "$GOOD --listen 127.0.0.1:7", 2, &["--listen does nothing", "solo"]),
    mistake(
        "more_memory_than_the_host_has",
        "ftvmm --kernel $KERNEL --mem 500000",
        2,
        &["a guest of 500000 MiB needs 500000 MiB", "--mem"],
    ),
    mistake(
        "twice_the_memory_for_a_recording",
        "ftvmm --kernel $KERNEL --mem 500000 --record m",
        2,
        &["twice its memory", "needs 1000000 MiB"],
    ),
    mistake("empty_disk", ": > e; $GOOD --disk path=e", 2, &["'e' has 0 bytes"]),
    mistake(
        "odd_disk",
        "head -c 1000 /dev/zero > o; $GOOD --disk path=o",
        2,
        &["'o' has 1000 bytes", "multiple of 512"],
    ),
    mistake(
        "unknown_force",
        "$GOOD --disk path=d,force=yes",
        2,
        &["'force=yes'", "incomplete, outdated, guest"],
    ),
    mistake(
        "damaged_disk_label",
        "head -c 1048576 /dev/zero > d; echo x > d.ftvmm; $GOOD --disk path=d",
        2,
        &["d.ftvmm' is damaged", "remove the label"],
    ),
    mistake("disk_error_without_disk", "$GOOD --disk-error failover", 2, &["--disk"]),
    mistake("missing_tap", "$GOOD --net tap=nope0", 2, &["no tap 'nope0'", "ip tuntap add"]),
    mistake("impossible_tap", "$GOOD --net tap=../../etc", 2, &["'../../etc'", "interface name"]),
    mistake("no_tap", "$GOOD --net eth0", 2, &["'eth0'", "tap=NAME"]),
    mistake("interface_that_is_no_tap", "$GOOD --net tap=lo", 2, &["tap 'lo'"]),
    mistake(
        "short_mac",
        "$GOOD --net tap=ftvm0,mac=52:54:00",
        2,
        &["'52:54:00' is no MAC address like"],
    ),
    mistake(
        "multicast_mac",
        "$GOOD --net tap=ftvm0,mac=01:00:5e:00:00:01",
        2,
        &["'01:00:5e:00:00:01'", "multicast"],
    ),
    mistake("record_to_nowhere", "$GOOD --record /no/r.log", 2, &["/no/r.log", "No such file"]),
    mistake("replay_of_nothing", "ftvmm replay /no/r.log", 2, &["/no/r.log", "No such file"]),
    mistake("until_is_no_number", "ftvmm replay x.log --until dawn", 2, &["dawn", "--until"]),
    mistake("no_kvm", "$ELSEWHERE mount -t tmpfs none /dev; $GOOD'", 2, &["/dev/kvm", "not exist"]),
    mistake(
        "no_permission_on_kvm",
        "$ELSEWHERE mknod -m 0 /tmp/kvm c 10 232; mount --bind /tmp/kvm /dev/kvm; \
         unshare -U $GOOD'",
        2,
        &["no permission on /dev/kvm"],
    ),
    mistake(
        "something_else_as_kvm",
        "$ELSEWHERE mount --bind /dev/null /dev/kvm; $GOOD'",
        2,
        &["KVM speaks API version"],
    ),
];

/// Replaces the names a mistake uses by what they stand for, as quotes inside quotes would need.
fn script(site: &GuestLab, shell: &str) -> String {
    let image = |path: &Path| site.inside(path.file_name().unwrap_or_default());
    let good = site.boot(&[]).join(" ");
    let names = [
        ("$GOOD", good.as_str()),
        ("$KERNEL", &image(&site.guest.kernel)),
        ("$INITRD", &image(&site.guest.initramfs)),
        ("$STOCK", &image(&site.guest.boot_files(GuestKernel::Cloud)[0])),
        ("$ELSEWHERE", ELSEWHERE),
        ("$LONG", LONG),
    ];
    let script =
        names.iter().fold(shell.to_owned(), |text, (name, value)| text.replace(name, value));
    format!("cd /tmp; {script}")
}

fn check(site: &GuestLab, mistake: &Mistake) -> Result<(), Failed> {
    let script = script(site, mistake.shell);
    let output = site.lab.host(0).run(&["sh", "-c", &script])?;
    let said = String::from_utf8_lossy(&output.stderr);
    println!("{}: {}", mistake.name, said.trim_end());
    let mut wrong = Vec::new();
    if output.ended != Ended::Status(mistake.status) {
        wrong.push(format!("ended with {:?}, wanted status {}", output.ended, mistake.status));
    }
    if !said.starts_with("ftvmm: ") || said.lines().count() != 1 {
        wrong.push("not one line that begins with 'ftvmm: '".to_owned());
    }
    let missing = mistake.says.iter().filter(|word| !said.contains(**word));
    wrong.extend(missing.map(|word| format!("does not say {word:?}")));
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Failed::from(format!("{}\n{script}\n{said}", wrong.join("; "))))
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bad_input");
    let pool = Arc::new(LabPool::new(folder));
    let trial = |mistake: &'static Mistake| {
        let pool = Arc::clone(&pool);
        Trial::test(mistake.name, move || pool.with(|site| check(site, mistake))?)
    };
    let conclusion = libtest_mimic::run(&arguments, MISTAKES.iter().map(trial).collect());
    drop(pool);
    conclusion.exit_code()
}
