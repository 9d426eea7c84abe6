//! Which rank this process is, and the address of the rendezvous, from torch's environment
//! variables.

use std::time::Duration;

use finetune_contract::{
    FailureReason, Parallelism, Strategy,
    process::environment::{JOB_COMPLETION_INDEX, MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE},
};

use crate::{failure::Failure, store::Environment};

/// The network interface for data between ranks; the variable is gloo's.
const INTERFACE: &str = "GLOO_SOCKET_IFNAME";

/// The identity of this rank, and the address of rank 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankInfo {
    /// This rank, from 0.
    pub rank: u32,
    /// The number of ranks.
    pub world_size: u32,
    /// The host name or address of rank 0.
    pub master_address: String,
    /// The port on which rank 0 listens.
    pub master_port: u16,
    /// The network interface for data between ranks; if absent, the one of this machine's host
    /// name.
    pub interface: Option<String>,
}

/// How long ranks wait for each other.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For all ranks to reach the rendezvous. Pods start minutes apart if an image must be pulled.
    pub rendezvous: Duration,
    /// For all ranks to complete one collective. The death of a rank aborts it at once; this is for
    /// a rank that lives and does not join, and must outlast the slowest upload of a checkpoint.
    pub collective: Duration,
    /// For the next heartbeat of a rank.
    pub heartbeat: Duration,
    /// For the main thread to exit by itself after another rank was lost.
    pub grace: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            rendezvous: Duration::from_mins(10),
            collective: Duration::from_mins(30),
            heartbeat: Duration::from_secs(30),
            grace: Duration::from_secs(3),
        }
    }
}

impl RankInfo {
    /// Reads the rank of this process; `None` if the run has only one rank.
    ///
    /// # Errors
    /// A [`Failure`] that names the variable that is missing or inconsistent with the run.
    pub fn read(
        parallelism: Parallelism,
        environment: &Environment,
    ) -> Result<Option<Self>, Failure> {
        let Parallelism { world_size, strategy, .. } = parallelism;
        if world_size == 0 || (strategy == Strategy::None && world_size != 1) {
            return Err(invalid(format!(
                "parallelism.worldSize is {world_size} with strategy {strategy:?}: several ranks need ddp, zero1, zero2 or zero3, and \
                 worldSize must be at least 1"
            )));
        }
        if world_size == 1 {
            return Ok(None);
        }
        let number = |name: &str| -> Result<Option<u32>, Failure> {
            let Some(text) = environment.plain(name) else { return Ok(None) };
            let number = text.parse().map_err(|_| {
                invalid(format!("the variable {name} is {text:?}, must be an integer from 0"))
            })?;
            Ok(Some(number))
        };
        let missing = |name: &str, meaning: &str| {
            invalid(format!(
                "the run has {world_size} ranks, but the variable {name} is not set: set it to {meaning}, \
                 or start the run with `finetune run --ranks {world_size}`"
            ))
        };
        if let Some(found) = number(WORLD_SIZE)?.filter(|found| *found != world_size) {
            return Err(invalid(format!(
                "the variable {WORLD_SIZE} is {found}, but the run was planned for {world_size} ranks: start that many"
            )));
        }
        let rank = match number(RANK)? {
            Some(rank) => Some(rank),
            None => number(JOB_COMPLETION_INDEX)?,
        };
        let rank = rank.ok_or_else(|| missing(RANK, "this process's number, from 0"))?;
        if rank >= world_size {
            return Err(invalid(format!(
                "the variable {RANK} is {rank}, must be below the run's {world_size} ranks"
            )));
        }
        let master_address = environment
            .plain(MASTER_ADDR)
            .ok_or_else(|| missing(MASTER_ADDR, "a name or address of rank 0"))?;
        let master_port =
            number(MASTER_PORT)?.ok_or_else(|| missing(MASTER_PORT, "a free port of rank 0"))?;
        let master_port =
            u16::try_from(master_port).ok().filter(|port| *port > 0).ok_or_else(|| {
                invalid(format!(
                    "the variable {MASTER_PORT} is {master_port}, must be from 1 to 65535"
                ))
            })?;
        Ok(Some(Self {
            rank,
            world_size,
            master_address: master_address.to_owned(),
            master_port,
            interface: environment.plain(INTERFACE).map(str::to_owned),
        }))
    }

    /// Reports whether all ranks are on this machine, which then need no host name.
    pub fn is_local(&self) -> bool {
        ["127.0.0.1", "::1", "localhost"].contains(&self.master_address.as_str())
    }
}

fn invalid(message: String) -> Failure {
    Failure::new(FailureReason::InvalidConfiguration, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(world_size: u32, pairs: &[(&str, &str)]) -> Result<Option<RankInfo>, String> {
        let strategy = if world_size == 1 { Strategy::None } else { Strategy::Ddp };
        let environment = Environment::from_pairs(pairs.iter().copied());
        RankInfo::read(Parallelism { world_size, strategy, ..Parallelism::SINGLE }, &environment)
            .map_err(|failure| failure.message)
    }

    #[test]
    fn one_rank_needs_no_variables() {
        assert_eq!(read(1, &[]), Ok(None));
    }

    #[test]
    fn the_index_of_an_indexed_job_is_the_rank() {
        let rendezvous = [("MASTER_ADDR", "run-0.run"), ("MASTER_PORT", "29500")];
        let info = read(2, &[&[("JOB_COMPLETION_INDEX", "1")], &rendezvous[..]].concat());
        assert_eq!(info.unwrap().unwrap().rank, 1);
        let info =
            read(2, &[&[("RANK", "0"), ("JOB_COMPLETION_INDEX", "1")], &rendezvous[..]].concat());
        assert_eq!(info.unwrap().unwrap().rank, 0);
    }

    #[test]
    fn errors_name_the_variable() {
        let refusal = |pairs: &[(&str, &str)]| read(2, pairs).unwrap_err();
        insta::assert_snapshot!(refusal(&[]), @"the run has 2 ranks, but the variable RANK is not set: set it to this process's number, from 0, or start the run with `finetune run --ranks 2`");
        insta::assert_snapshot!(refusal(&[("RANK", "2")]), @"the variable RANK is 2, must be below the run's 2 ranks");
        insta::assert_snapshot!(refusal(&[("RANK", "first")]), @r#"the variable RANK is "first", must be an integer from 0"#);
        insta::assert_snapshot!(refusal(&[("WORLD_SIZE", "4")]), @"the variable WORLD_SIZE is 4, but the run was planned for 2 ranks: start that many");
        insta::assert_snapshot!(refusal(&[("RANK", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "0")]), @"the variable MASTER_PORT is 0, must be from 1 to 65535");
    }
}
