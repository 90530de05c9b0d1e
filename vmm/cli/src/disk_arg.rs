//! `--disk path=FILE[,label=FILE][,force=WHY]`.

use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::str::FromStr;

use ftvmm_host::disk::label_beside;
use ftvmm_replication::Force;

/// See the module documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskArg {
    /// The image.
    pub path: PathBuf,
    /// Its label, if not the file beside it.
    pub label: Option<PathBuf>,
    /// What is overruled.
    pub force: Vec<Force>,
}

impl DiskArg {
    /// Where its label lies; `None` for a block device that has none.
    pub fn label_file(&self) -> Option<PathBuf> {
        let is_device =
            || std::fs::metadata(&self.path).is_ok_and(|facts| facts.file_type().is_block_device());
        match &self.label {
            Some(label) => Some(label.clone()),
            // No file is made beside a device: it would not outlive a reboot.
            None if is_device() => None,
            None => Some(label_beside(&self.path)),
        }
    }
}

impl FromStr for DiskArg {
    type Err = String;

    /// The options stand behind the path, which may have commas of its own.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is not path=FILE[,label=FILE][,force=WHY]");
        let mut rest = text.strip_prefix("path=").ok_or_else(bad)?;
        let mut disk = Self::default();
        while let Some((before, option)) = rest.rsplit_once(',') {
            if let Some(word) = option.strip_prefix("force=") {
                disk.force.push(force(word)?);
            } else if let Some(path) = option.strip_prefix("label=") {
                if path.is_empty() || disk.label.replace(path.into()).is_some() {
                    return Err(bad());
                }
            } else {
                break;
            }
            rest = before;
        }
        if rest.is_empty() {
            return Err(bad());
        }
        disk.path = rest.into();
        Ok(disk)
    }
}

fn force(word: &str) -> Result<Force, String> {
    Force::ALL.into_iter().find(|force| force.name() == word).ok_or_else(|| {
        let names = Force::ALL.map(Force::name).join(", ");
        format!("'force={word}' is none of {names}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_and_what_is_known_of_it() {
        let read = |text: &str| text.parse::<DiskArg>();
        let plain = |path: &str| DiskArg { path: path.into(), ..DiskArg::default() };
        assert_eq!(read("path=a.img"), Ok(plain("a.img")));
        assert_eq!(read("path=a,b.img"), Ok(plain("a,b.img")));
        let full = DiskArg {
            path: "a,b".into(),
            label: Some("l".into()),
            force: vec![Force::Outdated, Force::Guest],
        };
        assert_eq!(read("path=a,b,force=guest,label=l,force=outdated"), Ok(full));
        for bad in ["disk.img", "path=", "path=,force=guest", "path=a,label="] {
            assert!(read(bad).unwrap_err().contains("path=FILE"), "{bad}");
        }
        let error = read("path=a,force=yes").unwrap_err();
        assert!(error.contains("'force=yes' is none of incomplete, outdated, guest"), "{error}");
    }
}
