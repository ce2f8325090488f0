"""How the report page looks: one style sheet, light and dark, phone and desktop."""

CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #24272e; --soft: #646b76;
  --line: #e3e4e6; --ours: #eef5fc; --good: #0b7a55; --bad: #b93a0a; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --ink: #e6e7ea;
  --soft: #9aa1ac; --line: #31353d; --ours: #1d2a39; --good: #4cc796; --bad: #ff8a5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 1.15rem; font-weight: 600; color: var(--soft); margin: 0; }
.lead { font-size: clamp(1.35rem, 3.2vw, 2.1rem); line-height: 1.25; font-weight: 650;
  max-width: 46rem;
  margin: .5rem 0 1.5rem; letter-spacing: -.01em; }
.lead:empty { display: none; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .9rem; }
h3 { font-size: .95rem; margin: 1.5rem 0 .5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  padding: 0; margin: 0; list-style: none; }
.cards li, figure, .scroll, pre, dl { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.cards li { padding: .8rem 1rem; color: var(--soft); font-size: .85rem; }
.cards b { display: block; color: var(--ink); font-size: 1.5rem; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 0 0 .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .55rem; text-align: right; white-space: nowrap; vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; font-size: .78rem;
  border-bottom: 1px solid var(--line); }
tbody th { font-weight: 500; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tr.group th { color: var(--soft); font-size: .78rem; padding-top: .9rem; }
tr.group th span { position: sticky; left: .8rem; }
tr.ours > * { background: var(--ours) !important; }
td small { display: block; color: var(--soft); font-size: .7rem; }
th small { display: block; color: var(--soft); font-size: .7rem; font-weight: 400; }
th i + small, th small { margin-left: 0; }
.settings th { text-align: left; }
td.left { text-align: left; }
td.words { text-align: left; white-space: normal; min-width: 8rem; max-width: 18rem;
  overflow-wrap: anywhere; }
tr.total > * { border-top: 2px solid var(--line) !important; }
td.unclear, td.unclear small { color: var(--soft); }
td.unclear small { white-space: normal; min-width: 11rem; }
th i { display: inline-block; width: .65em; height: .65em; border-radius: 50%;
  margin-right: .55em; }
.note { color: var(--soft); font-size: .84rem; max-width: 52rem; margin: .4rem 0; }
.figures { display: grid; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21.5rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .84rem; margin-top: .6rem; }
pre { padding: .9rem 1rem; margin: 0; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere;
  font-size: .84rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; margin: 0;
  padding: .4rem 1rem;
  font-size: .86rem; }
dt, dd { margin: 0; padding: .3rem 0; }
dt { color: var(--soft); padding-right: 1.5rem; overflow-wrap: anywhere; }
dd { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
nav { display: flex; gap: .4rem 1.1rem; flex-wrap: wrap; margin: 1.75rem 0 0; font-size: .84rem; }
nav a { color: var(--soft); text-decoration: none; border-bottom: 1px solid var(--line); }
nav a:hover, nav a:focus { color: var(--ink); border-color: var(--ink); }
.facts { color: var(--soft); font-size: .84rem; margin: 0 0 .7rem;
  font-variant-numeric: tabular-nums; }
.warning { border-left: 3px solid var(--bad); padding: .1rem 0 .1rem .8rem; margin: 0 0 .8rem;
  font-size: .86rem; max-width: 52rem; }
details { margin: 0 0 .9rem; }
summary { color: var(--soft); font-size: .84rem; cursor: pointer; padding: .3rem 0; }
footer { margin-top: 3rem; color: var(--soft); font-size: .78rem; }
@media (max-width: 36rem) { main { padding: 1.5rem .9rem 2rem; } figure { padding: .75rem; }
  h2 { margin-top: 2.1rem; } tbody th, thead th:first-child { min-width: 7.5rem; max-width: 9.5rem;
  white-space: normal; overflow-wrap: anywhere; } tr.group th { max-width: none; }
  .cards { grid-template-columns: 1fr 1fr; } }
@media print { :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --ours: #f2f6fa; }
  main { max-width: none; padding: 0; } nav { display: none; } .scroll { overflow: visible; }
  figure, tr, .cards li { break-inside: avoid; } h2, h3 { break-after: avoid; } table { font-size: .6rem; }
  th, td { padding: .2rem .25rem; } thead th { font-size: .52rem; white-space: normal; }
  td small, th small { font-size: .48rem; white-space: normal; } .figures { grid-template-columns: 1fr 1fr; } }
"""
