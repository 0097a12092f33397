"""The HTML page of a report: self-contained, it requests nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.elements import Html, escape


def page(*, title: str, header: Html, sections: Mapping[str, Html]) -> str:
    """Makes the whole page. A policy in its head makes the browser refuse every request, whatever a file contains."""
    # Read only when a page is written: training must not wait for it.
    from plotly.offline import get_plotlyjs

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
