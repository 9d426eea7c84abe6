//! What was measured beside the peer, as a table and a picture in docs/bench for each kind of CPU.

use std::fmt::Write;

use anyhow::{Context, Result};

use crate::{
    bench::{kind, plot},
    tools::shell,
};

const HEADER: &str = "name,rounds,our_tokens_per_second,speed_ratio,memory_ratio";

/// One configuration, beside the peer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Measured {
    /// Method, type, shape and what else was set.
    pub name: String,
    /// Rounds of each.
    pub rounds: usize,
    /// Ours, the median of rounds.
    pub tokens_per_second: f64,
    /// Ours by the peer's, the median of rounds.
    pub speed: f64,
    /// The peer's peak of anonymous memory by ours, the median of rounds.
    pub memory: f64,
}

/// Writes the table and the picture of this kind of CPU anew, with one line replaced or added.
pub(crate) fn publish(measured: &Measured) -> Result<()> {
    let kind = kind::here()?;
    let path = shell::root().join(format!("docs/bench/{kind}.csv"));
    let before = std::fs::read_to_string(&path).unwrap_or_default();
    let mut table = parse(&before).with_context(|| path.display().to_string())?;
    table.retain(|other| other.name != measured.name);
    table.push(measured.clone());
    table.sort_by(|one, other| one.name.cmp(&other.name));
    std::fs::write(&path, render(&table))?;
    let bars: Vec<plot::Bars> = table
        .iter()
        .map(|line| plot::Bars { name: line.name.clone(), values: [line.speed, line.memory] })
        .collect();
    let picture = plot::bars("times transformers + PEFT (1 is equal)", ["speed", "memory"], &bars);
    std::fs::write(path.with_extension("svg"), picture)?;
    println!("docs/bench/{kind}.csv and .svg: {}", measured.name);
    Ok(())
}

fn parse(text: &str) -> Result<Vec<Measured>> {
    text.lines().skip(1).map(parse_line).collect()
}

fn parse_line(line: &str) -> Result<Measured> {
    let cells: Vec<&str> = line.split(',').collect();
    let [name, rounds, tokens_per_second, speed, memory] = cells[..] else {
        anyhow::bail!("{line:?} has not 5 cells");
    };
    let number = |cell: &str| cell.parse::<f64>().with_context(|| format!("{cell:?} in {line:?}"));
    Ok(Measured {
        name: name.to_owned(),
        rounds: rounds.parse().with_context(|| format!("{rounds:?} in {line:?}"))?,
        tokens_per_second: number(tokens_per_second)?,
        speed: number(speed)?,
        memory: number(memory)?,
    })
}

fn render(table: &[Measured]) -> String {
    let mut text = format!("{HEADER}\n");
    for Measured { name, rounds, tokens_per_second, speed, memory } in table {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name},{rounds},{tokens_per_second:.0},{speed:.2},{memory:.2}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Measured, parse, render};

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let table = vec![Measured {
            name: "lora-bf16-4x256".to_owned(),
            rounds: 5,
            tokens_per_second: 431.0,
            speed: 2.25,
            memory: 5.5,
        }];
        assert_eq!(parse(&render(&table)).unwrap(), table);
        assert!(parse("name\na,b\n").unwrap_err().to_string().contains("5 cells"));
    }
}
