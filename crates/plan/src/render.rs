//! Prints a plan for people.

use std::fmt::Write;

use super::{
    choices::Choice,
    fallbacks,
    run_plan::RunPlan,
    sizing::ACCELERATOR_EFFICIENCY,
    units::{bytes, duration},
};

/// Returns the plan as aligned lines.
pub fn text(plan: &RunPlan) -> String {
    let mut text = String::new();
    let mut line = |line: String| {
        text.push_str(line.trim_end());
        text.push('\n');
    };
    line(format!("Plan of {}", plan.run_config.run_id));
    if let Some(found) = &plan.already_published {
        line(format!(
            "Already published by run {} from the same inputs: nothing would be trained",
            found.run_id
        ));
    }
    for decision in &plan.decisions {
        line(row(decision));
    }
    if !plan.rejected.is_empty() {
        line("\nAlternatives not chosen".to_owned());
        plan.rejected.iter().for_each(|decision| line(row(decision)));
    }
    line("\nMemory".to_owned());
    for (name, size) in plan.memory.terms().into_iter().filter(|(_, size)| *size > 0) {
        line(format!("  {name:<27}{:>10}", bytes(size)));
    }
    let place = &plan.place;
    let limit =
        plan.memory_limit.map(|limit| format!("  of {} {place}", bytes(limit))).unwrap_or_default();
    let each = if plan.run_config.parallelism.world_size > 1 { " of each rank" } else { "" };
    line(format!("  {:<27}{:>10}{limit}", format!("peak{each}"), bytes(plan.memory.total())));
    if let Some(fallbacks) = fallbacks::describe(&plan.run_config, &plan.fallbacks) {
        line(format!("  {:<27}{fallbacks}", "if memory runs out"));
    }
    if plan.memory.mapped_weights > 0 {
        line(format!(
            "  {:<27}{:>10}  memory-mapped, reclaimable",
            "weights, mapped",
            bytes(plan.memory.mapped_weights)
        ));
    }
    if let Some(sent) = plan.run_config.predicted_sent_bytes {
        line(format!("\nNetwork\n  {:<27}{:>10}  by each rank", "sent in a step", bytes(sent)));
    }
    if let Some(seconds) = plan.seconds {
        line(format!(
            "\nTime  about {} {place}, at {:.0} % of its peak FLOPS",
            duration(seconds),
            plan.efficiency * 100.0
        ));
    }
    if !plan.accelerators.is_empty() {
        let percent = ACCELERATOR_EFFICIENCY * 100.0;
        line(format!("\nOther accelerators (at {percent:.0} % of the stated speed)"));
    }
    for estimate in &plan.accelerators {
        let mut verdict = if estimate.shortfall_bytes == 0 {
            format!("fits, about {}", duration(estimate.seconds))
        } else {
            format!("{} short", bytes(estimate.shortfall_bytes))
        };
        if let Some(cost) = estimate.cost.filter(|_| estimate.shortfall_bytes == 0) {
            let _ = write!(verdict, ", costs {cost:.2}");
        }
        if let Some(ranks) = estimate.ranks {
            let _ = write!(verdict, ", {ranks} ranks would hold it");
        }
        line(format!("  {:<27}{:>10}  {verdict}", estimate.name, bytes(estimate.needed_bytes)));
    }
    if !plan.warnings.is_empty() {
        line("\nWarnings".to_owned());
        plan.warnings.iter().for_each(|warning| line(format!("  {warning}")));
    }
    text
}

fn row(decision: &Choice) -> String {
    let Choice { field, value, reason } = decision;
    format!("  {field:<27}{value:<14}  {reason}")
}
