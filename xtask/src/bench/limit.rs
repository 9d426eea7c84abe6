//! What this machine could do at most: the speed of its matrix products, as a preflight measures it.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};
use finetune_contract::{
    DatasetSource, MachineFacts, ModelFacts, ModelSource, ObjectUri, OutputTarget, PreflightConfig,
    PreflightReport, RunId, TrainerArgs, TrainerCommand,
};

use crate::{build::Binaries, fixtures::dataset, tools::shell};

/// The machine and the model trained on it.
pub(crate) struct Limit {
    /// The machine, measured.
    pub machine: MachineFacts,
    /// The model's parameters.
    pub parameters: u64,
}

impl Limit {
    /// Returns the positions per second of a trainer that did nothing but matrix products, if
    /// their speed is known.
    ///
    /// # Source
    /// Two operations per parameter and position forward, two for the gradient of the input, two
    /// for that of the weights (Kaplan et al. 2020, section 2.1); a frozen weight needs no
    /// gradient, a recomputed block a second forward. Attention and adapters are left out.
    pub(crate) fn tokens_per_second(
        &self,
        gflops: Option<f64>,
        is_frozen: bool,
        recomputes: bool,
    ) -> Option<f64> {
        let passes = 2 + u32::from(!is_frozen) + u32::from(recomputes);
        Some(gflops? * 1e9 / (2.0 * f64::from(passes) * self.parameters as f64))
    }

    /// Describes what the machine is.
    pub(crate) fn describe(&self) -> String {
        let gflops = |speed: Option<f64>| {
            speed.map_or("not measured".to_owned(), |speed| format!("{speed:.0} GFLOP/s"))
        };
        let MachineFacts { cpu, cores, fp32_gflops, bf16_gflops, .. } = &self.machine;
        format!(
            "{cpu}, {cores} cores; matrix products {} in bf16, {} in fp32",
            gflops(*bf16_gflops),
            gflops(*fp32_gflops)
        )
    }
}

/// Measures, by a preflight of a run that will not be.
pub(crate) fn measure(binaries: &Binaries, model: &Path) -> Result<Limit> {
    let directory = shell::root().join("target/bench-preflight");
    std::fs::create_dir_all(&directory)?;
    let config = PreflightConfig {
        measure_machine: true,
        ..PreflightConfig::of(
            RunId("bench".to_owned()),
            ModelSource::of(ObjectUri::of_path(model)?),
            DatasetSource::of(ObjectUri::of_path(&dataset::files()?.train)?),
            OutputTarget::of(ObjectUri::of_path(&directory.join("output"))?),
        )
    };
    let [config_file, report_file] =
        ["config.json", "report.json"].map(|name| directory.join(name));
    std::fs::write(&config_file, finetune_contract::render(&config))?;
    let mut preflight = Command::new(&binaries.trainer);
    let work_dir = directory.join("work");
    let args = TrainerArgs::new(TrainerCommand::Preflight, config_file, &report_file, work_dir);
    preflight.args(args.to_args());
    // What it prints is for the command line, which is not between us here.
    shell::output(&mut preflight)?;
    let report: PreflightReport = finetune_contract::parse(&std::fs::read_to_string(report_file)?)?;
    let machine = report.machine.context("the preflight did not measure the machine")?;
    let model: ModelFacts = report.model.context("the preflight did not read the model")?;
    Ok(Limit { machine, parameters: model.parameters })
}
