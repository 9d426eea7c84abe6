//! How a trainer process ends, as a number the kubelet reports.

use serde::{Deserialize, Serialize};

/// The exit status of the trainer, in the spirit of `sysexits.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum ExitCode {
    /// The work is done and verified.
    Success = 0,
    /// The dataset or the base model's files are unusable; the user must change them.
    BadData = 65,
    /// A store or hub cannot be reached; the same attempt may work later.
    StoreUnavailable = 69,
    /// A defect of the trainer.
    Internal = 70,
    /// The device has too little memory for the plan.
    OutOfMemory = 71,
    /// The device of the plan is not there or does not work; another node may have one that does.
    DeviceUnavailable = 72,
    /// The run was told to stop and saved a checkpoint; it resumes when started again.
    Interrupted = 75,
    /// Another rank is gone or the rendezvous failed.
    PeerLost = 76,
    /// A store refuses the credentials.
    PermissionDenied = 77,
    /// The configuration cannot be carried out.
    BadConfiguration = 78,
}

impl ExitCode {
    /// All codes, in numeric order.
    pub const ALL: [Self; 10] = [
        Self::Success,
        Self::BadData,
        Self::StoreUnavailable,
        Self::Internal,
        Self::OutOfMemory,
        Self::DeviceUnavailable,
        Self::Interrupted,
        Self::PeerLost,
        Self::PermissionDenied,
        Self::BadConfiguration,
    ];

    /// Returns the process exit status.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Finds the meaning of a process exit status; `None` for a number the contract does not use.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|exit_code| i32::from(exit_code.code()) == code)
    }

    /// Returns whether starting the same attempt again, unchanged, can succeed.
    pub const fn is_retryable(self) -> bool {
        match self {
            Self::StoreUnavailable
            | Self::DeviceUnavailable
            | Self::Interrupted
            | Self::PeerLost => true,
            Self::Success
            | Self::BadData
            | Self::Internal
            | Self::OutOfMemory
            | Self::PermissionDenied
            | Self::BadConfiguration => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ExitCode;

    #[test]
    fn every_code_survives_the_trip_through_a_number() {
        for exit_code in ExitCode::ALL {
            assert_eq!(ExitCode::from_code(i32::from(exit_code.code())), Some(exit_code));
        }
        assert_eq!(ExitCode::from_code(137), None);
    }
}
