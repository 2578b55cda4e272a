//! Charts as SVG: bars for implementations side by side, lines for what grows.
//!
//! Each is one file without scripts or fonts of its own. Colours follow the reader's light or dark
//! theme by a media query, which also works where the file is an `<img>` of a README.

use std::fmt::Write as _;

use crate::case::{Chart, ChartKind, Implementation, short};
use crate::report::{Measured, Report, number};

const WIDTH: f64 = 800.0;
const MARGIN: f64 = 16.0;
const STYLE: &str = "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:#1f2933}\
.title{font-size:15px;font-weight:600}.group{font-weight:600}.muted{fill:#6b7785}\
.axis{stroke:#9aa5b1}.grid{stroke:#9aa5b1;stroke-opacity:.25}\
.whisker{stroke:#1f2933;stroke-opacity:.75;fill:none}\
@media(prefers-color-scheme:dark){text{fill:#e4e7eb}.muted{fill:#9aa5b1}\
.whisker{stroke:#e4e7eb}}";
/// Ours in teal; peers in colours that step back.
const OURS: [&str; 2] = ["#0d9488", "#5eb8ae"];
const PEERS: [&str; 6] = [
    "#8896a5", "#b08968", "#7c83c9", "#c0849b", "#97a97c", "#a3a3a3",
];
/// Lines that are told apart by what is done, not by whom.
const LINES: [&str; 6] = [
    "#0d9488", "#7c83c9", "#d08a4e", "#c0698b", "#6f9a3e", "#8896a5",
];

/// Draws `chart` of the report's results. None if there is nothing to draw.
pub fn svg(report: &Report, chart: &Chart) -> Option<String> {
    let of = |case: &str| -> Vec<&Measured> {
        let results = report.results.iter();
        results
            .filter(|r| {
                r.metric == chart.metric && r.id.case == case && r.id.suite == chart.suite()
            })
            .collect()
    };
    let (cases, draw): (_, fn(&mut Canvas, &[Group<'_>])) = match &chart.kind {
        ChartKind::Bars(cases) => (cases, bars),
        ChartKind::Lines(cases) => (cases, lines),
    };
    let groups: Vec<Group<'_>> = cases
        .iter()
        .map(|(case, label)| Group {
            label,
            results: of(case),
        })
        .filter(|group| !group.results.is_empty())
        .collect();
    let unit = &groups.first()?.results.first()?.unit;
    let mut canvas = Canvas {
        body: String::new(),
        y: MARGIN + 12.0,
    };
    let title = format!("{}: {unit}", chart.title);
    canvas.text(MARGIN, canvas.y, "title", "start", &title);
    canvas.y += 20.0;
    draw(&mut canvas, &groups);
    canvas.y += 22.0;
    let day = report.started.split('T').next().unwrap_or_default();
    let foot = format!("{day}, {}", report.host.line());
    canvas.text(MARGIN, canvas.y, "muted", "start", &foot);
    canvas.y += 17.0;
    let runs = report.rounds;
    let foot = format!("Median of {runs} runs; whiskers from the least to the most.");
    canvas.text(MARGIN, canvas.y, "muted", "start", &foot);
    Some(canvas.finish(&title))
}

/// What belongs together: the results of one case.
struct Group<'a> {
    label: &'a str,
    results: Vec<&'a Measured>,
}

struct Canvas {
    body: String,
    /// Where the next thing goes.
    y: f64,
}

impl Canvas {
    fn text(&mut self, x: f64, y: f64, class: &str, anchor: &str, text: &str) {
        let text = escape(text);
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" class="{class}" text-anchor="{anchor}">{text}</text>"#
        );
    }

    fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let _ = writeln!(
            self.body,
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        );
    }

    fn finish(self, title: &str) -> String {
        let height = self.y + MARGIN;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
             width=\"{WIDTH}\" height=\"{height:.0}\" role=\"img\">\n<title>{}</title>\n\
             <style>{STYLE}</style>\n{}</svg>\n",
            escape(title),
            self.body
        )
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// About how wide a text of 12 px is: no font can be measured here.
fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * 6.6
}

fn bars(canvas: &mut Canvas, groups: &[Group<'_>]) {
    let mut implementations: Vec<&Implementation> = Vec::new();
    for result in groups.iter().flat_map(|g| &g.results) {
        if !implementations.contains(&&result.id.implementation) {
            implementations.push(&result.id.implementation);
        }
    }
    let color = |implementation: &Implementation| {
        let alike = implementations
            .iter()
            .filter(|i| i.ours == implementation.ours);
        let index = alike.take_while(|i| **i != implementation).count();
        let palette: &[&str] = if implementation.ours { &OURS } else { &PEERS };
        palette[index % palette.len()]
    };
    let name = |i: &Implementation| format!("{} {}", i.name, i.version).trim_end().to_owned();
    let widest = implementations.iter().map(|i| text_width(&name(i)));
    let left = MARGIN + widest.fold(0.0, f64::max) + 10.0;
    let all = groups.iter().flat_map(|g| &g.results);
    let most = all.map(|r| r.summary.max).fold(0.0, f64::max).max(1e-12);
    // Room for the number behind the longest bar.
    let scale = (WIDTH - MARGIN - 130.0 - left) / most;
    for group in groups {
        canvas.y += 12.0;
        canvas.text(MARGIN, canvas.y, "group", "start", group.label);
        canvas.y += 8.0;
        for result in &group.results {
            let (s, i) = (&result.summary, &result.id.implementation);
            let y = canvas.y;
            let _ = writeln!(
                canvas.body,
                r#"<rect x="{left:.1}" y="{y:.1}" width="{:.1}" height="16" rx="2" fill="{}"/>"#,
                (s.median * scale).max(1.0),
                color(i)
            );
            canvas.text(left - 8.0, y + 12.0, "", "end", &name(i));
            let (from, to, middle) = (left + s.min * scale, left + s.max * scale, y + 8.0);
            if to - from > 1.0 {
                canvas.line("whisker", (from, middle), (to, middle));
                canvas.line("whisker", (from, middle - 3.0), (from, middle + 3.0));
                canvas.line("whisker", (to, middle - 3.0), (to, middle + 3.0));
            }
            let ratio = result
                .ratio
                .as_ref()
                .map(|r| format!("  {}x", number(r.summary.median)));
            let value = format!("{}{}", number(s.median), ratio.unwrap_or_default());
            canvas.text(
                to.max(left + s.median * scale) + 8.0,
                y + 12.0,
                "",
                "start",
                &value,
            );
            canvas.y += 21.0;
        }
        canvas.y += 6.0;
    }
}

/// Ticks from 0 to at least `most`, a handful of them, at round numbers.
fn ticks(most: f64) -> Vec<f64> {
    let rough = most.max(1e-12) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    let count = (most / step).ceil() as usize;
    (0..=count.max(1)).map(|i| i as f64 * step).collect()
}

fn lines(canvas: &mut Canvas, groups: &[Group<'_>]) {
    const HEIGHT: f64 = 260.0;
    let all = || groups.iter().flat_map(|g| &g.results);
    let at = |r: &Measured| r.id.at.as_ref().map_or(0, |at| at.value);
    let mut stops: Vec<u64> = all().map(|r| at(r)).collect();
    stops.sort_unstable();
    stops.dedup();
    let (Some(&least), Some(&most)) = (stops.first(), stops.last()) else {
        return;
    };
    let ticks = ticks(all().map(|r| r.summary.max).fold(0.0, f64::max));
    let top = ticks.last().copied().unwrap_or(1.0);

    // One line per case and implementation; the legend stands above.
    let mut series: Vec<(String, Vec<&Measured>)> = Vec::new();
    let several = all().any(|r| all().any(|o| o.id.implementation != r.id.implementation));
    for group in groups {
        for result in &group.results {
            let name = match several {
                true => format!("{}, {}", group.label, result.id.implementation.name),
                false => group.label.to_owned(),
            };
            match series.iter_mut().find(|(n, _)| *n == name) {
                Some((_, points)) => points.push(result),
                None => series.push((name, vec![result])),
            }
        }
    }
    let mut x = MARGIN;
    canvas.y += 6.0;
    for (i, (name, _)) in series.iter().enumerate() {
        let wide = text_width(name) + 40.0;
        if x > MARGIN && x + wide > WIDTH - MARGIN {
            x = MARGIN;
            canvas.y += 18.0;
        }
        let (y, color) = (canvas.y, LINES[i % LINES.len()]);
        let _ = writeln!(
            canvas.body,
            r#"<rect x="{x:.1}" y="{:.1}" width="14" height="4" rx="2" fill="{color}"/>"#,
            y - 6.0
        );
        canvas.text(x + 20.0, y, "", "start", name);
        x += wide;
    }

    let left = MARGIN
        + ticks
            .iter()
            .map(|t| text_width(&number(*t)))
            .fold(0.0, f64::max)
        + 10.0;
    let (right, head) = (WIDTH - MARGIN - 20.0, canvas.y + 18.0);
    // Counts grow by orders of magnitude: equal factors, equal steps. Zero lies one step before 1.
    let place = |n: u64| if n == 0 { -1.0 } else { (n as f64).log10() };
    let span = (place(most) - place(least)).max(1e-9);
    let to_x = |n: u64| left + (place(n) - place(least)) / span * (right - left);
    let to_y = |value: f64| head + (1.0 - value / top) * HEIGHT;
    for tick in &ticks {
        let class = if *tick == 0.0 { "axis" } else { "grid" };
        canvas.line(class, (left, to_y(*tick)), (right, to_y(*tick)));
        canvas.text(
            left - 8.0,
            to_y(*tick) + 4.0,
            "muted",
            "end",
            &number(*tick),
        );
    }
    for stop in &stops {
        canvas.text(
            to_x(*stop),
            head + HEIGHT + 18.0,
            "muted",
            "middle",
            &short(*stop),
        );
    }
    let axis = all().find_map(|r| r.id.at.as_ref().map(|at| at.axis.clone()));
    let (middle, below) = (f64::midpoint(left, right), head + HEIGHT + 36.0);
    canvas.text(middle, below, "muted", "middle", &axis.unwrap_or_default());
    for (i, (_, points)) in series.iter().enumerate() {
        let color = LINES[i % LINES.len()];
        let mut path = String::new();
        for point in points {
            let _ = write!(
                path,
                "{:.1},{:.1} ",
                to_x(at(point)),
                to_y(point.summary.median)
            );
        }
        let _ = writeln!(
            canvas.body,
            r#"<polyline points="{}" fill="none" stroke="{color}" stroke-width="2"/>"#,
            path.trim_end()
        );
        for point in points {
            let (x, s) = (to_x(at(point)), &point.summary);
            canvas.line("whisker", (x, to_y(s.min)), (x, to_y(s.max)));
            let _ = writeln!(
                canvas.body,
                r#"<circle cx="{x:.1}" cy="{:.1}" r="3.5" fill="{color}"/>"#,
                to_y(s.median)
            );
        }
    }
    canvas.y = below;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::sample;

    fn chart(suite: &str, kind: fn(Vec<(String, String)>) -> ChartKind, case: &str) -> Chart {
        Chart {
            name: format!("{suite}-rate"),
            title: "Rate (more is better)".to_owned(),
            metric: "rate",
            kind: kind(vec![
                (case.to_owned(), "Small <packets> & \"more\"".to_owned()),
                ("no such case".to_owned(), String::new()),
            ]),
        }
    }

    #[test]
    fn bars_are_well_formed_and_to_scale() {
        let svg = svg(&sample(), &chart("clear", ChartKind::Bars, "small-up")).unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let widths: Vec<f64> = document
            .descendants()
            .filter(|n| n.has_tag_name("rect"))
            .map(|n| n.attribute("width").unwrap().parse().unwrap())
            .collect();
        assert_eq!(widths.len(), 2);
        assert!((widths[0] / widths[1] - 2.0).abs() < 0.01);
        // Three strokes of a whisker each, and the label as it was given.
        assert_eq!(
            document
                .descendants()
                .filter(|n| n.has_tag_name("line"))
                .count(),
            6
        );
        let texts: Vec<_> = document.descendants().filter_map(|n| n.text()).collect();
        assert!(texts.contains(&"Small <packets> & \"more\""));
        assert!(texts.contains(&"2,000,000  2.00x"), "{texts:?}");
    }

    #[test]
    fn everything_lies_within_the_picture() {
        for chart in [
            chart("clear", ChartKind::Bars, "small-up"),
            chart("scale", ChartKind::Lines, "flows"),
        ] {
            let svg = svg(&sample(), &chart).unwrap();
            let document = roxmltree::Document::parse(&svg).unwrap();
            let height: f64 = document
                .root_element()
                .attribute("height")
                .unwrap()
                .parse()
                .unwrap();
            for node in document.descendants() {
                let number = |name: &str| node.attribute(name).map(|v| v.parse::<f64>().unwrap());
                for name in ["x", "x1", "x2", "cx"] {
                    assert!(
                        number(name).is_none_or(|x| (0.0..=WIDTH).contains(&x)),
                        "{node:?}"
                    );
                }
                for name in ["y", "y1", "y2", "cy"] {
                    assert!(
                        number(name).is_none_or(|y| (0.0..=height).contains(&y)),
                        "{node:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn lines_have_a_point_per_result() {
        let svg = svg(&sample(), &chart("scale", ChartKind::Lines, "flows")).unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let count = |tag| {
            document
                .descendants()
                .filter(|n| n.has_tag_name(tag))
                .count()
        };
        assert_eq!((count("polyline"), count("circle")), (1, 3));
        assert!(svg.contains(">1M<") && svg.contains(">flows<"));
    }

    #[test]
    fn nothing_to_draw_is_no_chart() {
        assert_eq!(
            svg(&sample(), &chart("mtu", ChartKind::Bars, "small-up")),
            None
        );
    }

    #[test]
    fn ticks_are_round_and_reach_the_top() {
        assert_eq!(ticks(10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(0.9), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        for most in [0.0, 1e-6, 3.3, 17.0, 99.0, 123_456.0] {
            let ticks = ticks(most);
            assert!(
                *ticks.last().unwrap() >= most && ticks.len() <= 7,
                "{most}: {ticks:?}"
            );
        }
    }
}
