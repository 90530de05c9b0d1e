//! The result as bars: one panel per question, one colour per mode, one dot per round.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::MODES;
use super::summary::{Figure, Summary, Value, short, significant};

const SIZE: (u32, u32) = (1200, 760);
const HEADER: u32 = 108;
const PANEL_MARGIN: u32 = 14;
const AXIS_WIDTH: u32 = 58;
const AXIS_HEIGHT: u32 = 26;
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(0x22, 0x2b, 0x36);
const FAINT: RGBColor = RGBColor(0x6b, 0x75, 0x80);
const GRID: RGBColor = RGBColor(0xe3, 0xe7, 0xeb);
/// In the order of [`MODES`]; told apart in grey and by colour-blind eyes too.
const COLOURS: [RGBColor; MODES.len()] = [
    RGBColor(0x9a, 0xa5, 0xb1),
    RGBColor(0x4c, 0x9f, 0xd8),
    RGBColor(0x1b, 0x4f, 0x8a),
    RGBColor(0xe0, 0x9f, 0x3e),
];
/// Room above the highest bar for its labels, as a factor.
const HEADROOM: f64 = 1.22;
/// Bar and gap, in fractions of the width a group has.
const BAR: f64 = 0.2;
const GAP: f64 = 0.02;
const DOT: i32 = 3;

/// What is drawn together, with one unit.
struct Panel {
    title: &'static str,
    unit: &'static str,
    /// Name of the figure and what stands below its group.
    groups: &'static [(&'static str, &'static str)],
}

const PANELS: [Panel; 6] = [
    Panel {
        title: "UDP echo, round trip",
        unit: "ms",
        groups: &[("UDP echo p50", "p50"), ("UDP echo p90", "p90"), ("UDP echo p99", "p99")],
    },
    Panel {
        title: "HTTP request with its own connection",
        unit: "ms",
        groups: &[
            ("HTTP request p50", "p50"),
            ("HTTP request p90", "p90"),
            ("HTTP request p99", "p99"),
        ],
    },
    Panel { title: "Long download", unit: "MB/s", groups: &[("download", "median")] },
    Panel { title: "Boot until it serves", unit: "s", groups: &[("boot", "median")] },
    Panel { title: "Exits of the virtual CPU", unit: "1/s", groups: &[("exits", "median")] },
    Panel { title: "Log sent to the backup", unit: "kB/s", groups: &[("log", "median")] },
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn text(size: u32, colour: RGBColor, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour).pos(Pos::new(horizontal, vertical))
}

/// Draws all panels to an SVG file.
///
/// # Errors
/// When the file cannot be written.
pub fn draw(summary: &Summary, path: &Path) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(HEADER);
    header(summary, &head)?;
    for (panel, area) in PANELS.iter().zip(body.split_evenly((2, 3))) {
        let figures = panel.groups.iter().filter_map(|(name, label)| {
            let wanted = |figure: &&Figure| figure.name == *name && figure.unit == panel.unit;
            Some((*label, summary.figures.iter().find(wanted)?))
        });
        draw_panel(panel, &figures.collect::<Vec<_>>(), &area)?;
    }
    root.present()?;
    Ok(())
}

fn header(summary: &Summary, area: &Area) -> Result<(), Box<dyn Error>> {
    let left = |size, colour| text(size, colour, HPos::Left, VPos::Center);
    area.draw_text("What lockstep costs", &left(24, INK), (24, 26))?;
    area.draw_text(&summary.subtitle(), &left(13, FAINT), (24, 52))?;
    area.draw_text(&summary.place(), &left(13, FAINT), (24, 70))?;
    let mut x = 24;
    for (mode, colour) in MODES.iter().zip(COLOURS) {
        area.draw(&Rectangle::new([(x, 86), (x + 14, 100)], colour.filled()))?;
        area.draw_text(mode.title, &left(14, INK), (x + 20, 93))?;
        x += 40 + 8 * i32::try_from(mode.title.len())?;
    }
    area.draw(&Circle::new((x + 7, 93), DOT, INK.stroke_width(1)))?;
    area.draw_text("one round", &left(14, INK), (x + 20, 93))?;
    area.draw_text("×N", &left(13, FAINT), (x + 124, 93))?;
    area.draw_text("times solo", &left(14, INK), (x + 150, 93))?;
    Ok(())
}

fn draw_panel(
    panel: &Panel,
    groups: &[(&str, &Figure)],
    area: &Area,
) -> Result<(), Box<dyn Error>> {
    let values = || groups.iter().flat_map(|(_, figure)| &figure.modes);
    let seen = values().flat_map(|value| value.rounds.iter().copied().chain(value.value));
    let highest = seen.fold(0.0, f64::max);
    let top = if highest > 0.0 { highest * HEADROOM } else { 1.0 };
    let area = area.margin(PANEL_MARGIN, PANEL_MARGIN, PANEL_MARGIN, PANEL_MARGIN);
    let title = format!("{} [{}]", panel.title, panel.unit);
    let area = area.titled(&title, text(16, INK, HPos::Left, VPos::Top))?;
    let mut chart = ChartBuilder::on(&area)
        .y_label_area_size(AXIS_WIDTH)
        .x_label_area_size(AXIS_HEIGHT)
        .build_cartesian_2d(0.0..groups.len() as f64, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(FAINT)
        .y_labels(6)
        .y_label_formatter(&|y| tick(*y))
        .label_style((FONT, 12).into_font().color(&FAINT))
        .draw()?;
    for (number, (label, figure)) in groups.iter().enumerate() {
        let width = MODES.len() as f64 * (BAR + GAP) - GAP;
        let start = number as f64 + (1.0 - width) / 2.0;
        for (index, (value, colour)) in figure.modes.iter().zip(COLOURS).enumerate() {
            let left = start + index as f64 * (BAR + GAP);
            chart.draw_series([Rectangle::new(
                [(left, 0.0), (left + BAR, value.value.unwrap_or(0.0))],
                colour.filled(),
            )])?;
            let middle = left + BAR / 2.0;
            let count = value.rounds.len() as f64;
            for (round, &y) in value.rounds.iter().enumerate() {
                let x = left + BAR * (round as f64 + 1.0) / (count + 1.0);
                let dot = |style: ShapeStyle| Circle::new((x, y), DOT, style);
                chart.draw_series([dot(WHITE.filled()), dot(INK.stroke_width(1))])?;
            }
            let above = value.rounds.iter().copied().chain(value.value).fold(0.0, f64::max);
            let single = groups.len() == 1;
            for (line, (words, size, colour)) in labels(value, index, single).iter().enumerate() {
                let (x, y) = chart.backend_coord(&(middle, above));
                let style = text(*size, *colour, HPos::Center, VPos::Bottom);
                let origin = area.get_base_pixel();
                let line = i32::try_from(line)?;
                area.draw_text(words, &style, (x - origin.0, y - origin.1 - 6 - 13 * line))?;
            }
        }
        let (x, y) = chart.backend_coord(&(number as f64 + 0.5, 0.0));
        let origin = area.get_base_pixel();
        let style = text(13, INK, HPos::Center, VPos::Top);
        area.draw_text(label, &style, (x - origin.0, y - origin.1 + 7))?;
    }
    Ok(())
}

/// What stands above a bar, from the bottom up: the ratio where it says something, and the value
/// where there is room.
fn labels(value: &Value, index: usize, single: bool) -> Vec<(String, u32, RGBColor)> {
    let Some(number) = value.value else {
        return vec![("none".to_owned(), 12, FAINT)];
    };
    let mut lines = Vec::new();
    if let Some(ratio) = value.ratio_to_solo.filter(|_| index > 0) {
        lines.push((format!("×{}", significant(ratio, 2)), 11, FAINT));
    }
    if single || index == 0 {
        lines.push((short(number), 12, INK));
    }
    lines
}

/// A label of the axis: no more digits than it needs.
fn tick(y: f64) -> String {
    let text = short(y);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}
