//! Loss curves, as a picture and as one line of text.

use std::fmt::Write;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const MARGIN: f64 = 56.0;
const COLORS: [&str; 2] = ["#2563eb", "#dc2626"];

/// A named curve of (step, value).
pub(crate) struct Curve {
    /// Its name.
    pub name: &'static str,
    /// Its points, by step.
    pub points: Vec<(f64, f64)>,
}

/// Draws curves over a common step axis.
pub(crate) fn svg(title: &str, curves: &[Curve]) -> String {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let last_step = all().map(|point| point.0).fold(1.0, f64::max);
    let highest = all().map(|point| point.1).fold(f64::MIN_POSITIVE, f64::max) * 1.05;
    let x = |step: f64| MARGIN + step / last_step * (WIDTH - 1.5 * MARGIN);
    let y = |value: f64| HEIGHT - MARGIN - value / highest * (HEIGHT - 2.0 * MARGIN);
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="{MARGIN}" y="28" font-size="15" font-weight="bold">{title}</text>
"#
    );
    for tick in 0..=4 {
        let part = f64::from(tick) / 4.0;
        let (value, step) = (highest * part, last_step * part);
        let (at_y, at_x) = (y(value), x(step));
        // Writing to a String cannot fail.
        let _ = writeln!(
            svg,
            r##"<line x1="{MARGIN}" x2="{:.1}" y1="{at_y:.1}" y2="{at_y:.1}" stroke="#e5e7eb"/><text x="{:.1}" y="{:.1}" text-anchor="end" fill="#4b5563">{value:.2}</text><text x="{at_x:.1}" y="{:.1}" text-anchor="middle" fill="#4b5563">{step:.0}</text>"##,
            WIDTH - MARGIN / 2.0,
            MARGIN - 6.0,
            at_y + 4.0,
            HEIGHT - MARGIN + 18.0,
        );
    }
    let _ = writeln!(
        svg,
        r##"<text x="{:.1}" y="{:.1}" text-anchor="middle" fill="#4b5563">optimizer step</text>"##,
        WIDTH / 2.0,
        HEIGHT - 14.0
    );
    for (index, curve) in curves.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        let points: Vec<String> = curve
            .points
            .iter()
            .map(|&(step, value)| format!("{:.1},{:.1}", x(step), y(value)))
            .collect();
        let _ = writeln!(
            svg,
            r#"<polyline points="{}" fill="none" stroke="{color}" stroke-width="2"/>"#,
            points.join(" ")
        );
        let at = WIDTH - 190.0;
        let line = 26.0 + 18.0 * index as f64;
        let _ = writeln!(
            svg,
            r#"<line x1="{at}" x2="{:.1}" y1="{line}" y2="{line}" stroke="{color}" stroke-width="3"/><text x="{:.1}" y="{:.1}">{}</text>"#,
            at + 24.0,
            at + 30.0,
            line + 4.0,
            curve.name
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Some values of one kind each, side by side.
pub(crate) struct Bars {
    /// What they are of.
    pub name: String,
    /// One of each kind.
    pub values: [f64; 2],
}

/// Draws bars below each other, with the names of their kinds.
pub(crate) fn bars(title: &str, kinds: [&str; 2], bars: &[Bars]) -> String {
    const LEFT: f64 = 230.0;
    const ROW: f64 = 44.0;
    let height = MARGIN + ROW * bars.len() as f64 + 16.0;
    let most = bars.iter().flat_map(|bar| bar.values).fold(1.0, f64::max);
    let width = |value: f64| value / most * (WIDTH - LEFT - MARGIN);
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="16" y="24" font-size="15" font-weight="bold">{title}</text>
"#
    );
    for (index, kind) in kinds.iter().enumerate() {
        let _ = writeln!(
            svg,
            r#"<text x="{:.0}" y="42" fill="{}">{kind}</text>"#,
            LEFT + 80.0 * index as f64,
            COLORS[index]
        );
    }
    for (row, bar) in bars.iter().enumerate() {
        let top = MARGIN + ROW * row as f64;
        let _ = writeln!(
            svg,
            r##"<text x="{:.0}" y="{:.0}" text-anchor="end" fill="#111827">{}</text>"##,
            LEFT - 8.0,
            top + 20.0,
            bar.name
        );
        for (index, &value) in bar.values.iter().enumerate() {
            let y = top + 16.0 * index as f64;
            let _ = writeln!(
                svg,
                r##"<rect x="{LEFT}" y="{y:.0}" width="{:.1}" height="14" fill="{}"/><text x="{:.1}" y="{:.0}" fill="#4b5563">{value:.2}</text>"##,
                width(value),
                COLORS[index],
                LEFT + width(value) + 6.0,
                y + 11.0
            );
        }
    }
    let one = LEFT + width(1.0);
    let _ = writeln!(
        svg,
        r##"<line x1="{one:.1}" x2="{one:.1}" y1="{:.0}" y2="{:.0}" stroke="#111827" stroke-dasharray="3 3"/>"##,
        MARGIN - 6.0,
        height - 10.0
    );
    svg + "</svg>\n"
}

/// Draws values as one line of blocks.
pub(crate) fn sparkline(values: &[f64]) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let highest = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    values.iter().map(|value| BLOCKS[((value / highest * 7.99) as usize).min(7)]).collect()
}
