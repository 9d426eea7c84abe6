//! Which rank this process is, and where to meet the others: read from torch's variables.

use std::time::Duration;

use finetune_contract::{
    FailureReason, Parallelism, Strategy,
    process::environment::{JOB_COMPLETION_INDEX, MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE},
};

use crate::{failure::Failure, store::Environment};

/// The network interface for data between ranks; gloo's own variable.
const INTERFACE: &str = "GLOO_SOCKET_IFNAME";

/// One rank's place among all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// This rank, from 0.
    pub rank: u32,
    /// How many there are.
    pub world_size: u32,
    /// A name or address of rank 0.
    pub master_address: String,
    /// Where rank 0 listens.
    pub master_port: u16,
    /// The interface for data between ranks; by this machine's name if absent.
    pub interface: Option<String>,
}

/// How long ranks wait for each other.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For all to come to the rendezvous. Pods start minutes apart when an image must be pulled.
    pub rendezvous: Duration,
    /// For all to come to one collective. A peer's death ends it at once; this is for one that
    /// lives and does not come, and must outlast the slowest upload of a checkpoint.
    pub collective: Duration,
    /// Without a sign of life.
    pub silence: Duration,
    /// For the main thread to end by itself after another rank is known to be lost.
    pub grace: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            rendezvous: Duration::from_mins(10),
            collective: Duration::from_mins(30),
            silence: Duration::from_secs(30),
            grace: Duration::from_secs(3),
        }
    }
}

impl Place {
    /// Reads the place of a run's rank; `None` if the run has only one.
    ///
    /// # Errors
    /// A [`Failure`] that names the variable that is missing or contradicts the run.
    pub fn read(
        parallelism: Parallelism,
        environment: &Environment,
    ) -> Result<Option<Self>, Failure> {
        let Parallelism { world_size, strategy, .. } = parallelism;
        if world_size == 0 || (strategy == Strategy::None && world_size != 1) {
            return Err(invalid(format!(
                "parallelism.worldSize is {world_size} with strategy {strategy:?}: several ranks need ddp, zero1, zero2 or zero3, and \
                 there is at least one"
            )));
        }
        if world_size == 1 {
            return Ok(None);
        }
        let number = |name: &str| -> Result<Option<u32>, Failure> {
            let Some(text) = environment.plain(name) else { return Ok(None) };
            let number = text.parse().map_err(|_| {
                invalid(format!("the variable {name} is {text:?}, must be a whole number from 0"))
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

    /// Tells whether all ranks are on this machine, which then need not know its name.
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

    fn read(world_size: u32, pairs: &[(&str, &str)]) -> Result<Option<Place>, String> {
        let strategy = if world_size == 1 { Strategy::None } else { Strategy::Ddp };
        let environment = Environment::from_pairs(pairs.iter().copied());
        Place::read(Parallelism { world_size, strategy, ..Parallelism::SINGLE }, &environment)
            .map_err(|failure| failure.message)
    }

    #[test]
    fn one_rank_needs_no_variables() {
        assert_eq!(read(1, &[]), Ok(None));
    }

    #[test]
    fn an_indexed_job_says_the_rank_too() {
        let meet = [("MASTER_ADDR", "run-0.run"), ("MASTER_PORT", "29500")];
        let place = read(2, &[&[("JOB_COMPLETION_INDEX", "1")], &meet[..]].concat());
        assert_eq!(place.unwrap().unwrap().rank, 1);
        let place = read(2, &[&[("RANK", "0"), ("JOB_COMPLETION_INDEX", "1")], &meet[..]].concat());
        assert_eq!(place.unwrap().unwrap().rank, 0);
    }

    #[test]
    fn says_which_variable_is_wrong() {
        let refusal = |pairs: &[(&str, &str)]| read(2, pairs).unwrap_err();
        insta::assert_snapshot!(refusal(&[]), @"the run has 2 ranks, but the variable RANK is not set: set it to this process's number, from 0, or start the run with `finetune run --ranks 2`");
        insta::assert_snapshot!(refusal(&[("RANK", "2")]), @"the variable RANK is 2, must be below the run's 2 ranks");
        insta::assert_snapshot!(refusal(&[("RANK", "first")]), @r#"the variable RANK is "first", must be a whole number from 0"#);
        insta::assert_snapshot!(refusal(&[("WORLD_SIZE", "4")]), @"the variable WORLD_SIZE is 4, but the run was planned for 2 ranks: start that many");
        insta::assert_snapshot!(refusal(&[("RANK", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "0")]), @"the variable MASTER_PORT is 0, must be from 1 to 65535");
    }
}
