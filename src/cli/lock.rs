//! One run at a time: a second `finetune run` with the same output or work directory waits for the
//! first, and then finds what it left.
//!
//! The kernel gives a lock up when the last process that holds it ends, however it ends, so none is
//! ever stale.

use std::{
    fs::{self, File, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    path::Path,
    process::Stdio,
};

use sha2::{Digest, Sha256};

use super::{display, failure::Failure};

/// The locks of a run.
#[derive(Debug)]
pub(super) struct Locks {
    _work_dir: File,
    output: File,
}

impl Locks {
    /// Takes the locks of a work directory and of an output, and says for whom it waits.
    ///
    /// The lock of an output is a file of `locks`, a directory of this machine: an output may be a
    /// bucket, and nothing of ours should lie beside a result.
    pub(super) fn take(work_dir: &Path, locks: &Path, output: &str) -> Result<Self, Failure> {
        let name = Sha256::digest(output.trim_end_matches('/').as_bytes());
        let name: String = name.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        let waiting = |what: &str| format!("the same {what}");
        Ok(Self {
            _work_dir: take(&work_dir.join("run.lock"), &waiting("work directory"))?,
            output: take(&locks.join(name), &waiting(&format!("output, {output}")))?,
        })
    }

    /// Returns the output's lock as the standard input of a trainer, which nobody reads: should this
    /// command be killed, the lock stays taken until its trainer has ended, too.
    pub(super) fn for_trainer(&self) -> Stdio {
        self.output.try_clone().map_or_else(|_| Stdio::null(), Stdio::from)
    }
}

/// Takes one lock; waits for whoever has it.
fn take(path: &Path, what: &str) -> Result<File, Failure> {
    let cannot = |error: std::io::Error| {
        Failure::configuration(format!("cannot lock {}: {error}", path.display()))
    };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(cannot)?;
    }
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let mut file = options.open(path).map_err(cannot)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            display::note(&format!(
                "waiting for another `finetune run` with {what} (process {})",
                holder.trim()
            ));
            file.lock().map_err(cannot)?;
        }
        Err(TryLockError::Error(error)) => return Err(cannot(error)),
    }
    // Only for people: nobody decides by what is written there.
    let _ = file.set_len(0).and_then(|()| file.rewind());
    let _ = writeln!(file, "{}", std::process::id());
    Ok(file)
}
