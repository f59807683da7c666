"""The page around a report: its head and its style. No script, and a policy under which none would run."""

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
"""
FOOT = "</main>\n</body>\n</html>\n"
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1b; --faint: #5d6066; --line: #d9dbdf; --ground: #ffffff;
  --raised: #f5f6f8; --bad: #a4262c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --faint: #a3a7ae; --line: #3a3d43; --ground: #17181b;
  --raised: #212327; --bad: #ff8f8f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1480px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
p { max-width: 75ch; overflow-wrap: anywhere; }
.faint, figcaption, caption { color: var(--faint); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 18px; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0 0 16px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; width: 100%; }
caption { text-align: left; padding: 0 0 6px; font-size: 15px; }
th, td { padding: 5px 9px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; } thead th { vertical-align: bottom; border-bottom: 2px solid var(--line); }
th:first-child { text-align: left; } tbody th { overflow-wrap: anywhere; min-width: 6em; }
td span { white-space: nowrap; } .why td { text-align: left; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 680px), 1fr)); gap: 28px 24px; }
figure { margin: 0; min-width: 0; } figure svg { display: block; width: 100%; height: auto; max-width: 860px; }
figcaption { font-size: 13.5px; margin-top: 6px; max-width: 75ch; overflow-wrap: anywhere; }
details { border-bottom: 1px solid var(--line); padding: 6px 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
details pre { background: var(--raised); padding: 12px; border-radius: 6px; margin: 8px 0; }
.bad { color: var(--bad); }
@media (max-width: 1000px) { th, td { padding: 5px 5px; } table { font-size: 12.5px; } }
@media print { main { max-width: none; padding: 0; } body { font-size: 11px; } table { font-size: 9px; }
  th, td { padding: 3px 4px; } .scroll { overflow: visible; } figure, tr { break-inside: avoid; }
  .plots { grid-template-columns: 1fr; } figure svg { max-width: 600px; } caption { font-size: 11px; }
  figcaption, code { font-size: 10px; } #runs { display: none; } }
"""
