"""The style of every page: light and dark, on paper and on a phone, in colours that colour-blind people tell apart."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1d2530;--quiet:#5b6675;--rule:#dfe4ea;
--accent:#0068a8;
--good:#00704f;--bad:#b3261e;--goodwash:#e3f4ec;--badwash:#fbe7e5;--heat0:#f3efe6;--heat1:#12386e;
--c0:#0068a8;--c1:#c75b00;--c2:#00845f;--c3:#a83f86;--c4:#6a55c2;--c5:#7d6600;--c6:#4a5565}
@media(prefers-color-scheme:dark){:root{--page:#14181e;--card:#1c222a;--ink:#e4e8ee;--quiet:#a3adbb;--rule:#343d49;
--accent:#63b3ee;--good:#5fd0a0;--bad:#ff9488;--goodwash:#17362b;--badwash:#44221f;--heat0:#262d37;--heat1:#8fc4ff;
--c0:#63b3ee;--c1:#f2994a;--c2:#4cc79a;--c3:#e58ac6;--c4:#ab9bf5;--c5:#d3b93c;--c6:#b4bfcd}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
main{max-width:1160px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:17px;font-weight:600;margin:6px 0;color:var(--quiet)}
.result{font-size:26px;line-height:1.25;font-weight:600;margin:4px 0;max-width:none}.more{max-width:none}
h2{font-size:20px;margin:0 0 10px}h3{font-size:16px;margin:20px 0 6px}p{margin:6px 0 10px;max-width:75ch}
.quiet,figcaption span,.bar span span{color:var(--quiet)}.good{color:var(--good)}.bad{color:var(--bad)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 2px}a{color:var(--accent)}
section,.tiles>div{background:var(--card);border:1px solid var(--rule);border-radius:10px}
section{padding:16px 18px;margin:0 0 16px}
.tiles{margin-top:12px!important;display:grid;grid-template-columns:repeat(4,1fr);gap:10px;margin:0}
.tiles>div{padding:9px 14px}
dt{color:var(--quiet);font-size:14px}dd{margin:0}.tiles dd{font-size:21px;font-weight:600}
.facts>div{display:grid;grid-template-columns:minmax(110px,180px) 1fr;gap:12px;padding:4px 0;
border-bottom:1px solid var(--rule)}.facts{margin:0}
ul.findings{list-style:none;margin:12px 0 0;padding:0}.findings li{padding:5px 12px;margin:5px 0;border-radius:7px;
background:var(--goodwash)}.findings li.bad{background:var(--badwash)}
.findings li.bad::before{content:"Look: ";font-weight:600}
.findings li.good::before{content:"✓ "}
table{border-collapse:collapse;width:100%;font-size:15px;margin:8px 0}
th,td{padding:5px 14px 5px 0;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--quiet);font-weight:500}td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
td.number{overflow-wrap:normal}
.meter{position:relative;min-width:90px;height:9px;margin-top:7px;border-radius:5px;background:var(--rule)}
.meter i{position:absolute;inset:0 auto 0 0;border-radius:5px;background:var(--accent)}
.meter b{position:absolute;top:-4px;bottom:-4px;width:2px;background:var(--ink)}
.stack{display:flex;gap:1px;height:34px;margin:10px 0 14px;border-radius:6px;overflow:hidden}.stack i{min-width:1px}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:8px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:14px 22px}
figure{margin:0 0 6px;min-width:0}figcaption{margin-bottom:4px}figure>svg{width:100%;height:auto;display:block}
svg text{fill:var(--quiet);font-size:12px}svg .name{font-style:italic}.rule{stroke:var(--rule);fill:none}
.axis{stroke:var(--quiet);fill:none}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.shade{stroke:none;opacity:.16}
.point{stroke:none}.line.grey{stroke:var(--quiet)}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}
.c5{stroke:var(--c5)}.c6{stroke:var(--c6)}
.f0,.c0.shade,.c0.point{fill:var(--c0)}.f1,.c1.shade,.c1.point{fill:var(--c1)}.f2,.c2.shade,.c2.point{fill:var(--c2)}
.f3,.c3.shade,.c3.point{fill:var(--c3)}.f4,.c4.shade,.c4.point{fill:var(--c4)}.f5,.c5.shade,.c5.point{fill:var(--c5)}
.f6,.c6.shade,.c6.point{fill:var(--c6)}.none{fill:var(--rule)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:2px 0;padding:0;font-size:14px}
.key{width:26px;height:10px;margin-right:6px}
.bars{display:grid;gap:8px;margin:10px 0}
.bar{display:grid;grid-template-columns:180px 1fr 260px;gap:12px;align-items:center}
.bar div{position:relative;height:16px;background:var(--rule);border-radius:3px}
.bar i{position:absolute;inset:0 auto 0 0;background:var(--c0);border-radius:3px}
.bar b{position:absolute;top:-4px;bottom:-4px;border:2px solid var(--ink);border-top:0;border-bottom:0;min-width:2px}
.bar.off i{background:var(--bad)}
table.heat{table-layout:fixed;font-size:13px}.heat th[scope=row],.heat .name{width:34%}
.heat td,.heat thead th{text-align:center;padding:4px 0;font-size:11px}.heat thead .name{text-align:left}
.heat td{background:color-mix(in srgb,var(--heat1) var(--heat),var(--heat0));border:1px solid var(--card);
overflow-wrap:normal}.heat td.dark{color:var(--card)}
img{max-width:100%;display:block;image-rendering:auto;border-radius:4px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(250px,100%),1fr));gap:14px}
.card{border:1px solid var(--rule);border-radius:8px;padding:10px;min-width:0}
.query{display:flex;gap:10px;align-items:flex-start}.query img{width:96px;flex:none;background:var(--rule)}
.card ol{list-style:none;margin:6px 0 0;padding:0}.card li{display:flex;gap:8px;padding:2px 6px;border-radius:4px}
.card li>span:first-child,.found span{flex:1}.hit{background:var(--goodwash);font-weight:600}
.card .strip{width:100%;max-height:90px;object-fit:fill;margin-bottom:4px}
h4{margin:0 0 6px;font-size:14px;color:var(--quiet);font-weight:500}
.found li{align-items:center}.found img{width:44px;height:32px;object-fit:contain;flex:none;background:var(--rule)}
.text{font-weight:600}.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(190px,100%),1fr));
gap:12px}section.first{margin-top:16px}
.glance{display:grid;grid-template-columns:repeat(6,1fr);gap:14px}.glance>*{grid-column:span 2;min-width:0}
.glance>.film{grid-column:span 2}.more{margin:4px 0 0;font-size:16px;font-weight:400}
.map text{font-size:11px;fill:var(--ink);paint-order:stroke;stroke:var(--card);stroke-width:3px}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(150px,45%),1fr));gap:12px}
.maps.wide{grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr))}
.maps svg,.maps img{width:100%}.pieces span{display:inline-block;padding:0 5px;margin:1px;border-radius:4px;
background:var(--page);border:1px solid var(--rule)}.pieces .cut{text-decoration:line-through;color:var(--quiet)}
pre{font:13px/1.45 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:var(--page);padding:12px;
border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere}
code{font:14px/1.4 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.blocks{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));gap:4px 34px}
small{font-weight:400;color:var(--quiet)}
.metrics{display:grid;grid-template-columns:minmax(0,2.2fr) 5.5em minmax(60px,2fr) minmax(0,2fr);gap:2px 14px;
padding:3px 0}
.metrics+.metrics{border-top:1px solid var(--rule)}.metrics>b{text-align:right;font-variant-numeric:tabular-nums}
svg text.on{fill:#fff;font-size:13px}@media(prefers-color-scheme:dark){svg text.on{fill:#10151b}}
@media(max-width:700px){.glance{grid-template-columns:1fr}.glance>*,.glance>.film{grid-column:auto}

.metrics{display:flex;flex-wrap:wrap}.metrics>span:first-child{flex:1 1 65%}.metrics .meter{min-width:0;flex:1 1 25%}
.tiles{grid-template-columns:1fr 1fr}
.result{font-size:21px}section{padding:12px}
.bar{grid-template-columns:1fr;gap:3px}.facts>div{grid-template-columns:1fr;gap:0}
table:not(.heat) thead{display:none}table:not(.heat) tr{display:block;padding:7px 0;
border-bottom:1px solid var(--rule)}
table:not(.heat) td{display:flex;justify-content:space-between;gap:14px;border:0;padding:2px 0;text-align:right}
table:not(.heat) td::before{content:attr(data-name);color:var(--quiet);text-align:left;flex:none;max-width:50%}
table:not(.heat) td:first-child{font-weight:600}td>.meter{width:50%}}
@media print{:root{--page:#fff}body{font-size:11pt}main{max-width:none;padding:0}nav{display:none}
section{border:0;padding:8px 0}figure,tr,.card,.bar,.tiles>div{break-inside:avoid}h2,h3{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
