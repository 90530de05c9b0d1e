//! One guest on a lab host: recorded, then replayed twice, by one script.

use std::fs;
use std::io;
use std::path::Path;

use ftvmm_guest_images::GuestKernel;

use super::{Case, Plan, StressError};
use crate::guest_run::{Finished, GUEST_ADDRESS, GuestLab, GuestRunError, TAP, cmdline};
use crate::lab::Ended;
use crate::replayed::difference;

/// Memory of a bare guest, the least `ftvmm` takes.
const BARE_MIB: &str = "32";
const LINUX_MIB: &str = "96";
/// Enough to unpack two kernels.
const CLOUD_MIB: &str = "512";
/// The disk on which a guest that resets counts.
const DISK_BYTES: usize = 4096;
/// `--max-input-delay` of a run without slices.
const NO_SLICES_MS: &str = "10000";
/// A run that has not ended by itself is asked to, and later made to.
const RUN_SECONDS_MAX: u32 = 120;

/// What the host runs; all in one because each command from outside costs more than a bare guest.
/// `$1` is the name of the case, `$2` the pause between typed characters in microseconds, `$3` whom
/// to ping; the rest is the recorded run.
const SCRIPT: &str = r#"
cd "$SHARE" || exit 1
name=$1; pause=$2; address=$3; shift 3
run() {
    out=$1; shift
    busybox timeout -k 5 "$LIMIT" "$@" --report "$out.json" >"$out.console" 2>"$out.errors"
    echo $? >"$out.status"
}
keys() {
    i=0
    while [ $i -lt 60 ]; do
        busybox usleep "$pause"; printf "k%s" "$i" || return
        i=$((i + 1))
    done 2>/dev/null
}
pinging=
if [ "$address" ]; then
    busybox ping -i 0.2 "$address" >/dev/null 2>&1 & pinging=$!
fi
if [ "$pause" = 0 ]; then
    run "$name-recorded" "$@" --record "$name.log" --overwrite </dev/null
else
    keys | run "$name-recorded" "$@" --record "$name.log" --overwrite
fi
[ -z "$pinging" ] || kill "$pinging"
for again in first second; do
    run "$name-$again" ftvmm replay "$name.log" </dev/null
done
"#;

/// A recording and its two replays.
#[derive(Debug)]
pub struct Trial {
    /// The run that wrote the log.
    pub recorded: Finished,
    /// The runs that read it.
    pub replayed: [Finished; 2],
}

impl Trial {
    /// Records the parts `kept` of `case` and replays them, as `name` in the shared folder. `more`
    /// is given to the recorded run.
    ///
    /// # Errors
    /// What the lab or the file system said; a guest that failed is no error.
    pub fn run(
        site: &GuestLab,
        case: &Case,
        kept: &[usize],
        name: &str,
        more: &[String],
    ) -> Result<Self, StressError> {
        let (command, pause_us, pinged) = prepare(site, case, kept, name, more)?;
        let share = site.inside("");
        let script = format!("SHARE={share} LIMIT={RUN_SECONDS_MAX}\n{SCRIPT}");
        let address = if pinged { GUEST_ADDRESS } else { "" };
        let pause = pause_us.to_string();
        let words = ["busybox", "sh", "-c", &script, "sh", name, &pause, address];
        let words = words.into_iter().map(str::to_owned).chain(command).chain(more.iter().cloned());
        // Three runs of a stock kernel may take longer than a lab may be silent, and print nothing
        // else.
        let console = |which| site.outside(format!("{name}-{which}.console"));
        let consoles = ["recorded", "first", "second"].map(console);
        let _heard: Vec<_> = consoles.iter().map(|console| site.lab.hear(console)).collect();
        let said = site.lab.host(0).run(&words.collect::<Vec<_>>()).map_err(GuestRunError::from)?;
        if !said.ended.success() {
            let said = String::from_utf8_lossy(&said.stderr).into_owned();
            return Err(StressError::Script { said });
        }
        let read = |which: &str| finished(site, &format!("{name}-{which}"));
        Ok(Self { recorded: read("recorded")?, replayed: [read("first")?, read("second")?] })
    }

    /// What differs; `None` when all three runs are equal and the guest came to its own end.
    pub fn difference(&self) -> Option<String> {
        let end = self.recorded.report.as_ref().and_then(|report| report.end.as_deref());
        let by_itself = end.is_some_and(|end| matches!(end, "guest_reset" | "guest_power_off"));
        if self.recorded.ended.success() && !by_itself {
            return Some(format!("the guest did not come to its own end: {end:?}"));
        }
        let both = ["first", "second"].into_iter().zip(&self.replayed);
        let found = both.filter_map(|(which, replayed)| {
            difference(&self.recorded, replayed).map(|what| format!("{which} replay: {what}"))
        });
        let found: Vec<String> = found.collect();
        (!found.is_empty()).then(|| found.join("\n"))
    }
}

/// Files whose names begin with that of the case, in the shared folder.
pub fn files(site: &GuestLab, name: &str) -> io::Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(site.lab.share())? {
        let path = entry?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let rest = file.strip_prefix(name);
        if rest.is_some_and(|rest| rest.starts_with(['-', '.'])) {
            found.push(path);
        }
    }
    Ok(found)
}

fn prepare(
    site: &GuestLab,
    case: &Case,
    kept: &[usize],
    name: &str,
    more: &[String],
) -> Result<(Vec<String>, u32, bool), StressError> {
    Ok(match &case.plan {
        Plan::Bare { guest, typing_pause_us } => {
            let file = format!("{name}.elf");
            site.write(&file, &guest.image(kept)?)?;
            // Slices early in one case, late in the other; none where one would carry a fault to
            // the replay.
            let delay_ms = match more {
                [] => ["1", "5"][(case.number % 2) as usize],
                _ => NO_SLICES_MS,
            };
            let elf = site.inside(&file);
            let words = [
                "ftvmm",
                "--kernel",
                &elf,
                "--mem",
                BARE_MIB,
                "--max-input-delay",
                delay_ms,
                "--on-reset",
                "end",
            ];
            (words.map(str::to_owned).to_vec(), *typing_pause_us, false)
        }
        Plan::Linux(guest) => {
            let line = cmdline(&guest.script(kept));
            let tap = format!("tap={TAP}");
            let net = ["--net", tap.as_str()];
            let fixed = ["--cmdline", &line, "--mem", LINUX_MIB];
            let net = if guest.pinged { &net[..] } else { &[] };
            let words = [&fixed, net].concat();
            let command = if guest.resets.is_some() {
                let file = format!("{name}.disk");
                site.write(&file, &[0; DISK_BYTES])?;
                let disk = format!("path={}", site.inside(&file));
                site.power_on(GuestKernel::Tiny, &[&words[..], &["--disk", &disk]].concat())
            } else {
                site.boot(&words)
            };
            (command, 0, guest.pinged)
        }
        Plan::Cloud(guest) => {
            let line = cmdline(&guest.script(kept));
            let initramfs = guest.starts_another().then(|| site.kexec_initramfs()).transpose()?;
            let mut words = vec!["--cmdline", &line, "--mem", CLOUD_MIB];
            if let Some(initramfs) = &initramfs {
                words.extend(["--initrd", initramfs]);
            }
            (site.boot_kernel(GuestKernel::Cloud, &words), 0, false)
        }
    })
}

fn finished(site: &GuestLab, out: &str) -> Result<Finished, StressError> {
    let read = |kind: &str| {
        let path = site.outside(format!("{out}.{kind}"));
        fs::read(&path).map_err(|source| StressError::Io { path, source })
    };
    let text =
        |kind: &str| Ok::<_, StressError>(String::from_utf8_lossy(&read(kind)?).into_owned());
    let status = text("status")?.trim().parse().unwrap_or(i32::MAX);
    Ok(Finished {
        ended: Ended::Status(status),
        console: read("console")?,
        errors: text("errors")?,
        // A run that failed leaves none.
        report: read("json").ok().and_then(|text| serde_json::from_slice(&text).ok()),
    })
}

/// Copies what a case left, and the images it needs, into `folder`.
///
/// # Errors
/// What the file system said.
pub fn keep(site: &GuestLab, folder: &Path, name: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for path in files(site, name)? {
        fs::copy(&path, folder.join(path.file_name().unwrap_or_default()))?;
    }
    Ok(())
}
