"""How a report is drawn: escaped text, tables and Plotly figures on one HTML page that asks the network for nothing."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

MAX_POINTS = 2000  # per trace: more than a screen has pixels
NEUTRAL = "#9aa0a6"
# Middle tones: they stand out on the light page and on the dark one.
COLORS = ("#3b7dd8", "#e07b39", "#2a9d72", "#c44e8a", "#8a63d2", "#b59b00", "#3aa6b9", "#d0504d")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})


class Html(str):
    """Markup that is safe already. Every other string is escaped on its way into the page."""


Cell = str | float | None  # int is a float here, as in type checkers


def escape(value: object) -> Html:
    return value if isinstance(value, Html) else Html(str(value).translate(_ENTITIES))


def label(name: str, *, limit: int = 30) -> str:
    """A name as Plotly shows it: shortened, and without meaning in Plotly's own small HTML."""
    short = name if len(name) <= limit else name[: limit - 1] + "…"
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def format_number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def right(text: str) -> Html:
    """A cell that stands right, as numbers do."""
    return Html(f'<span class="number">{escape(text)}</span>')


def fixed(value: float, form: str = ".1f") -> Html:
    """A number with as many digits as its neighbours in the column."""
    return right(format(value, form) if math.isfinite(value) else "–")


def percent(value: float) -> Html:
    return fixed(value, ".1%")


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _is_number(cell: Cell) -> bool:
    return 'class="number"' in cell if isinstance(cell, Html) else not isinstance(cell, str | None)


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Html:
    """A table that scrolls inside its own box; numbers, and columns that hold them, stand right."""
    rows = [list(row) for row in rows]
    numeric = [any(map(_is_number, column)) for column in zip(*rows, strict=True)] or [False] * len(columns)
    side = ['<{0} class="number">{1}</{0}>' if right else "<{0}>{1}</{0}>" for right in numeric]

    def line(tag: str, cells: Sequence[Cell]) -> str:
        texts = [cell if isinstance(cell, str) else format_number(cell) for cell in cells]
        filled = (form.format(tag, escape(text)) for form, text in zip(side, texts, strict=True))
        return f"<tr>{''.join(filled)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return Html(f'<div class="scroll"><table><thead>{line("th", columns)}</thead><tbody>{body}</tbody></table></div>')


def _plain(value: object) -> object:
    """`value` as JSON can hold it: arrays as lists, null where a number is not finite, six digits of a fraction."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return None
        return int(value) if value == int(value) else float(f"{value:.6g}")  # a step keeps all its digits
    return int(value) if isinstance(value, np.integer) else value


def figure(traces: Sequence[Mapping], *, height: int, title: str = "", note: str = "", **layout: object) -> Html:
    """A Plotly figure as wide as its box. Its JSON holds no `<`, so nothing in it can end the script element."""
    spec = json.dumps(_plain({"data": traces, "layout": layout}), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        spec = spec.replace(character, f"\\u{ord(character):04x}")
    caption = f"<figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>" if title else ""
    return Html(
        f'<figure>{caption}<div class="chart" style="height:{height}px">'
        f'<script type="application/json">{spec}</script></div></figure>'
    )


def grid(figures: Iterable[Html]) -> Html:
    return Html('<div class="grid">' + "".join(figures) + "</div>")


def tiles(facts: Mapping[str, str]) -> Html:
    cells = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return Html('<dl class="tiles">' + "".join(cells) + "</dl>")


def thin(x: np.ndarray, y: np.ndarray, *, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` finite points: the lowest and the highest of every bucket, because a spike must stay visible."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= limit:
        return x, y
    buckets = np.array_split(np.arange(len(x)), limit // 2)
    kept = np.unique([bucket[pick(y[bucket])] for bucket in buckets for pick in (np.argmin, np.argmax)])
    return x[kept], y[kept]


def running_median(x: np.ndarray, y: np.ndarray, *, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """The median of a centred window of a twentieth of the finite points, at `limit` places at most."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    half = max(2, len(y) // 40)
    places = np.unique(np.linspace(0, max(len(y) - 1, 0), min(len(y), limit)).astype(int))
    return x[places], np.array([np.median(y[max(0, place - half) : place + half + 1]) for place in places])


def curve(x: np.ndarray, y: np.ndarray, *, name: str, color: str = COLORS[0], limit: int = MAX_POINTS) -> list[dict]:
    """Two traces: every value, light, and their running median, strong. The legend switches both together."""
    raw, smooth = thin(x, y, limit=limit), running_median(x, y, limit=limit)
    common = {"name": label(name), "legendgroup": name.translate(_ENTITIES), "type": "scatter"}
    dots = {"mode": "markers", "marker": {"color": color, "size": 4, "opacity": 0.28}, "hoverinfo": "skip"}
    line = {"mode": "lines", "line": {"color": color, "width": 2.5}, "hovertemplate": "%{y:.4g}"}
    return [
        {**common, **dots, "x": raw[0], "y": raw[1], "showlegend": False},
        {**common, **line, "x": smooth[0], "y": smooth[1]},
    ]


def page(*, title: str, header: Html, sections: Mapping[str, Html]) -> str:
    """The whole page. The policy in its head makes the browser refuse every request, whatever a file contains."""
    from plotly.offline import get_plotlyjs  # read only when a page is written: training must not wait for it

    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for name, anchor in anchors.items())
    missing = Html('<p class="quiet">not available</p>')
    body = "\n".join(
        f'<section id="{anchors[name]}"><h2>{escape(name)}</h2>{content or missing}</section>'
        for name, content in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><main><header><h1>{escape(title)}</h1>{header}</header><nav>{links}</nav>
<noscript><p class="quiet">The charts need JavaScript; the tables do not.</p></noscript>
{body}</main>
<script>{get_plotlyjs()}</script>
<script>{_SCRIPT}</script></body></html>
"""


_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1d2530;--quiet:#667080;--rule:#e2e6eb;--accent:#3b7dd8;
--good:#1b7f55;--bad:#c0392b;--goodwash:#e3f4ec;--badwash:#fbe7e5}
@media(prefers-color-scheme:dark){:root{--page:#14181e;--card:#1c222a;--ink:#e4e8ee;--quiet:#98a2b0;--rule:#323a45;
--good:#5fd0a0;--bad:#ff8a7d;--goodwash:#17362b;--badwash:#44221f}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:20px 16px 60px}h1{font-size:25px;margin:6px 0 12px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 10px}h3{font-size:14px;margin:18px 0 6px}p{margin:6px 0 10px;max-width:75ch}
.quiet,figcaption span{color:var(--quiet)}.good{color:var(--good)}.bad{color:var(--bad)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 2px;font-size:14px}a{color:var(--accent);text-decoration:none}
section,.tiles>div{background:var(--card);border:1px solid var(--rule);border-radius:10px}
section{padding:16px 18px;margin:0 0 16px}.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:0}
.tiles>div{padding:9px 14px;flex:1 1 auto}dt{color:var(--quiet);font-size:12.5px}
dd{margin:0;font-size:17px;font-weight:600;overflow-wrap:anywhere}
ul.findings{list-style:none;margin:12px 0 0;padding:0}.findings li{padding:5px 12px;margin:5px 0;border-radius:7px;
background:var(--goodwash);color:var(--good);overflow-wrap:anywhere}
.findings li.bad{background:var(--badwash);color:var(--bad)}
.scroll{overflow:auto;max-height:520px;margin:8px 0}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:5px 18px 5px 0;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{position:sticky;top:0;background:var(--card);color:var(--quiet);font-weight:500;white-space:nowrap;z-index:1}
td{overflow-wrap:break-word;max-width:420px}td.number,th.number{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}tbody tr:hover{background:var(--page)}
.meter{position:relative;min-width:110px;height:9px;margin-top:7px;border-radius:5px;background:var(--rule)}
.meter i{position:absolute;inset:0 auto 0 0;border-radius:5px;background:var(--accent)}
.meter b{position:absolute;top:-4px;bottom:-4px;width:2px;background:var(--ink)}
.stack{display:flex;gap:2px;height:34px;margin:10px 0 14px;border-radius:6px;overflow:hidden}.stack i{min-width:1px}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:9px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:10px 18px}
figure{margin:0 0 6px;min-width:0}figcaption{font-size:14px;overflow-wrap:anywhere}.chart{width:100%}
summary{cursor:pointer;color:var(--accent)}pre{overflow:auto;max-height:600px;font:13px/1.45 ui-monospace,Menlo,
Consolas,"DejaVu Sans Mono",monospace;background:var(--page);padding:12px;border-radius:8px}
"""

_SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = [...document.querySelectorAll(".chart")].map(box => {
  const spec = JSON.parse(box.firstElementChild.textContent);
  box.textContent = "";
  return {box, spec};
});
function draw() {
  const style = getComputedStyle(document.documentElement), color = name => style.getPropertyValue(name).trim();
  const [ink, quiet, rule, card] = ["--ink", "--quiet", "--rule", "--card"].map(color);
  const axis = {gridcolor: rule, linecolor: rule, zeroline: false, automargin: true, tickfont: {color: quiet}};
  const base = {font: {color: ink, size: 12, family: getComputedStyle(document.body).fontFamily},
    hovermode: "x unified", paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: {l: 8, r: 10, t: 8, b: 8},
    hoverlabel: {bgcolor: card, bordercolor: rule, font: {color: ink}}, showlegend: false,
    modebar: {bgcolor: "rgba(0,0,0,0)", color: rule, activecolor: quiet},
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom"}};
  // Named one by one, so that no button can share the chart with a server.
  const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const config = {displaylogo: false, responsive: true, plotlyServerURL: "", modeBarButtons: buttons};
  for (const {box, spec} of charts) {
    const layout = {...base, ...spec.layout};
    for (const name of ["xaxis", "yaxis"]) layout[name] = {...axis, ...layout[name]};
    Plotly.react(box, structuredClone(spec.data), layout, {...config, displayModeBar: spec.layout.bar ?? "hover"});
  }
}
draw();
dark.addEventListener("change", draw);
"""
