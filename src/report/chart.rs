//! Line charts against a number of tokens, as SVG whose colours come from the style sheet.

use super::format::{tokens, trimmed};
use super::html::Html;

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 290.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = 92.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 44.0;
/// Least distance of two labels at the ends of lines.
const LABEL_HEIGHT: f64 = 15.0;

/// One measured point.
pub(super) struct Point {
    /// Tokens.
    pub(super) x: f64,
    /// Typical value.
    pub(super) y: f64,
    /// Best and bad value, drawn as a vertical bar.
    pub(super) spread: Option<(f64, f64)>,
    /// Shown when pointed at.
    pub(super) title: String,
}

/// The points of one method, by growing `x`.
pub(super) struct Series<'a> {
    pub(super) name: &'a str,
    pub(super) points: Vec<Point>,
}

/// One chart.
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    pub(super) description: String,
    /// What the tokens of the horizontal axis are.
    pub(super) axis: &'a str,
    pub(super) series: Vec<Series<'a>>,
    pub(super) format: fn(f64) -> String,
}

/// Which of the style sheet's series styles a method has: the same on every chart of every report.
fn style(method: &str) -> &'static str {
    // What is in brackets tells contenders of one method apart.
    match method.split(" (").next().unwrap_or(method) {
        "plain" => "series s0",
        "homer" => "series s1",
        "rcc" => "series s2",
        "sharedllm" => "series s3",
        _ => "series s4",
    }
}

/// Maps values to pixels, and says where the ticks are.
struct Scale {
    low: f64,
    high: f64,
    logarithmic: bool,
    from: f64,
    to: f64,
}

impl Scale {
    fn pixel(&self, value: f64) -> f64 {
        let place = |v: f64| if self.logarithmic { v.log10() } else { v };
        let share = (place(value) - place(self.low)) / (place(self.high) - place(self.low));
        self.from + share * (self.to - self.from)
    }

    /// The vertical axis for positive values: logarithmic once they span more than a factor of five, else from zero.
    fn vertical(low: f64, high: f64) -> Self {
        let logarithmic = high / low > 5.0;
        let (low, high) = if logarithmic { (low / 1.3, high * 1.3) } else { (0.0, high * 1.15) };
        Self { low, high, logarithmic, from: HEIGHT - BOTTOM, to: TOP }
    }

    fn ticks(&self) -> Vec<f64> {
        let decade = |exponent: f64| 10f64.powi(exponent as i32);
        let candidates: Vec<f64> = if self.logarithmic {
            let exponents = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let multiples: &[f64] = if (self.high / self.low).log10() < 2.6 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            exponents.flat_map(|e| multiples.iter().map(move |m| m * decade(f64::from(e)))).collect()
        } else {
            let rough = self.high / 4.0;
            let power = decade(rough.log10().floor());
            let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&s| s >= rough).unwrap_or(rough);
            (0..=5).map(|i| f64::from(i) * step).collect()
        };
        candidates.into_iter().filter(|&tick| tick >= self.low && tick <= self.high).collect()
    }
}

/// Draws `chart`. Points that a logarithmic axis cannot show (zero, negative or not finite) are left out; without any
/// point nothing is drawn.
pub(super) fn draw(html: &mut Html, mut chart: Chart<'_>) {
    for series in &mut chart.series {
        series.points.retain(|p| p.x.is_finite() && p.x > 0.0 && p.y.is_finite() && p.y > 1e-12 && p.y < 1e18);
    }
    chart.series.retain(|series| !series.points.is_empty());
    let points = || chart.series.iter().flat_map(|series| &series.points);
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, 0.0f64), |(low, high), v| (low.min(v), high.max(v)))
    };
    let (first, last) = range(&mut points().map(|p| p.x));
    let (low, high) = range(&mut points().map(|p| p.y));
    if first > last {
        return;
    }
    // A single context length sits in the middle.
    let (first_x, last_x) = if first < last { (first, last) } else { (first / 2.0, last * 2.0) };
    let x = Scale { low: first_x, high: last_x, logarithmic: true, from: LEFT + 14.0, to: WIDTH - RIGHT };
    let y = Scale::vertical(low, high);

    html.element("figure", &[("class", &"chart")], |html| {
        html.element("figcaption", &[], |html| {
            html.leaf("strong", &[], chart.title);
            html.text(" ");
            html.leaf("span", &[], &chart.description);
            if y.logarithmic {
                html.leaf("span", &[], " Both axes logarithmic.");
            }
        });
        let label = format!("{}. The numbers are in the table below.", chart.title);
        let view = format!("0 0 {WIDTH} {HEIGHT}");
        html.element("svg", &[("viewBox", &view), ("role", &"img"), ("aria-label", &label)], |html| {
            grid(html, &chart, &x, &y);
            for series in &chart.series {
                line(html, series, &x, &y);
            }
            labels(html, &chart, &x, &y);
        });
    });
}

fn px(value: f64) -> String {
    format!("{value:.1}")
}

fn grid(html: &mut Html, chart: &Chart<'_>, x: &Scale, y: &Scale) {
    for tick in y.ticks() {
        let at = px(y.pixel(tick));
        html.element(
            "line",
            &[("class", &"grid"), ("x1", &LEFT), ("x2", &(WIDTH - RIGHT)), ("y1", &at), ("y2", &at)],
            |_| {},
        );
        let place = px(y.pixel(tick) + 4.0);
        html.leaf(
            "text",
            &[("class", &"tick end"), ("x", &(LEFT - 8.0)), ("y", &place)],
            trimmed(&(chart.format)(tick)),
        );
    }
    let mut lengths: Vec<f64> = chart.series.iter().flat_map(|series| series.points.iter().map(|p| p.x)).collect();
    lengths.sort_by(f64::total_cmp);
    let mut free = f64::NEG_INFINITY;
    for length in lengths {
        let at = x.pixel(length);
        if at < free {
            continue;
        }
        free = at + 46.0;
        let at = px(at);
        let bottom = HEIGHT - BOTTOM;
        html.element(
            "line",
            &[("class", &"grid faint"), ("x1", &at), ("x2", &at), ("y1", &TOP), ("y2", &bottom)],
            |_| {},
        );
        html.leaf("text", &[("class", &"tick middle"), ("x", &at), ("y", &(bottom + 17.0))], tokens(length as usize));
    }
    let middle = px(f64::midpoint(LEFT, WIDTH - RIGHT));
    html.leaf("text", &[("class", &"axis middle"), ("x", &middle), ("y", &(HEIGHT - 8.0))], chart.axis);
}

fn line(html: &mut Html, series: &Series<'_>, x: &Scale, y: &Scale) {
    html.element("g", &[("class", &style(series.name))], |html| {
        let path: Vec<String> = series.points.iter().map(|p| px(x.pixel(p.x)) + "," + &px(y.pixel(p.y))).collect();
        html.element("polyline", &[("points", &path.join(" "))], |_| {});
        for point in &series.points {
            let at = px(x.pixel(point.x));
            html.element("g", &[("class", &"point")], |html| {
                html.leaf("title", &[], &point.title);
                if let Some((low, high)) = point.spread {
                    let inside = |v: f64| px(y.pixel(v.clamp(y.low.max(1e-12), y.high)));
                    html.element(
                        "line",
                        &[("x1", &at), ("x2", &at), ("y1", &inside(low)), ("y2", &inside(high))],
                        |_| {},
                    );
                }
                html.element("circle", &[("cx", &at), ("cy", &px(y.pixel(point.y))), ("r", &4)], |_| {});
                html.element(
                    "circle",
                    &[("class", &"hit"), ("cx", &at), ("cy", &px(y.pixel(point.y))), ("r", &14)],
                    |_| {},
                );
            });
        }
    });
}

/// The method's name and last value at the end of each line, moved apart where lines end together.
fn labels(html: &mut Html, chart: &Chart<'_>, x: &Scale, y: &Scale) {
    let mut ends: Vec<(f64, f64, &Series<'_>)> = chart
        .series
        .iter()
        .filter_map(|series| series.points.last().map(|p| (y.pixel(p.y), x.pixel(p.x), series)))
        .collect();
    ends.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = f64::NEG_INFINITY;
    for (wanted, end, series) in ends {
        let at = wanted.max(free);
        free = at + LABEL_HEIGHT;
        html.element("g", &[("class", &style(series.name))], |html| {
            let name: String = series.name.chars().take(12).collect();
            html.leaf("text", &[("class", &"name"), ("x", &px(end + 10.0)), ("y", &px(at + 4.0))], name);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(series: Vec<Series<'_>>) -> String {
        let mut html = Html::default();
        draw(
            &mut html,
            Chart { title: "T", description: String::new(), axis: "tokens", series, format: |v| format!("{v}") },
        );
        html.finish()
    }

    fn series<'a>(name: &'a str, points: &[(f64, f64)]) -> Series<'a> {
        let point = |&(x, y): &(f64, f64)| Point { x, y, spread: Some((y, y * 1.1)), title: format!("{x} {y}") };
        Series { name, points: points.iter().map(point).collect() }
    }

    #[test]
    fn wide_ranges_are_logarithmic_and_narrow_ones_start_at_zero() {
        let wide = Scale::vertical(1.0, 1000.0);
        assert!(wide.logarithmic);
        assert_eq!(wide.ticks(), [1.0, 10.0, 100.0, 1000.0]);
        let narrow = Scale::vertical(20.0, 25.0);
        assert_eq!(narrow.ticks(), [0.0, 10.0, 20.0]);
        assert!((narrow.pixel(0.0) - (HEIGHT - BOTTOM)).abs() < 1e-9);
    }

    #[test]
    fn a_factor_in_length_is_a_fixed_distance() {
        let scale = Scale { low: 4096.0, high: 32768.0, logarithmic: true, from: 0.0, to: 300.0 };
        assert!((scale.pixel(8192.0) - 100.0).abs() < 1e-9);
        assert!((scale.pixel(16384.0) - 200.0).abs() < 1e-9);
    }

    #[test]
    fn labels_do_not_overlap() {
        let points = [(4096.0, 20.0), (8192.0, 21.0)];
        let page = chart(vec![series("plain", &points), series("homer", &points)]);
        let heights: Vec<f64> = page
            .split("class=\"name\"")
            .skip(1)
            .filter_map(|rest| rest.split("y=\"").nth(1)?.split('"').next()?.parse().ok())
            .collect();
        assert!(heights[1] - heights[0] >= LABEL_HEIGHT - 0.1, "{heights:?}");
    }

    #[test]
    fn unplottable_values_leave_no_trace() {
        let points = [(0.0, 1.0), (4096.0, 0.0), (4096.0, -1.0), (4096.0, f64::NAN), (f64::INFINITY, 1.0)];
        assert_eq!(chart(vec![series("plain", &points)]), "");
        let one = chart(vec![series("odd", &[(4096.0, 5.0), (0.0, 1.0)])]);
        assert!(one.contains("<polyline") && !one.contains("NaN") && !one.contains("inf"), "{one}");
    }
}
