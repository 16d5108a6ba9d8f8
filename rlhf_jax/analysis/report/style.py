"""The style of the report of a run, after that of all pages, for light and dark."""

LEVELS = 8  # of a token's colour, to each side

COLOURS = """
:root { --page: #fff; --ink: #1b1f24; --quiet: #5b6470; --line: #d9dde3;
  --soft: #f4f5f7; --accent: #2158d0; --heat: 33 88 208; --good: #17803d;
  --warn: #a15c00; --bad: #c02626; --gone: 220 60 60; --came: 30 150 80;
  --more: 240 120 10; --less: 40 110 235; --strongest: .72; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e8eb;
  --quiet: #9aa3ad; --line: #343a42; --soft: #1d2126; --accent: #86aeff;
  --heat: 96 150 255; --good: #5fd38a; --warn: #f0b35a; --bad: #ff8a80;
  --gone: 255 90 90; --came: 60 200 120; --more: 250 130 30; --less: 80 145 255;
  --strongest: .62; } }
"""
TEXT = """
body { background: var(--page); color: var(--ink); margin: 0 auto 3rem; }
h1 { margin: 1.6rem 0 .1rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; padding-bottom: .2rem; scroll-margin-top: 1rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0; }
a { color: var(--accent); }
code { overflow-wrap: anywhere; }
.quiet, .lead, footer { color: var(--quiet); }
.lead { max-width: 52rem; margin-bottom: .9rem; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .8rem 0 1rem; }
ul { padding-left: 1.2rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); font-size: .85rem; }
summary { cursor: pointer; }
.verdict { border-left: 5px solid var(--quiet); background: var(--soft);
  padding: .7rem 1rem; margin: 1rem 0; border-radius: 0 .4rem .4rem 0; }
.verdict strong { font-size: 1.15rem; }
.healthy { border-color: var(--good); } .healthy strong { color: var(--good); }
.parted { border-color: var(--warn); } .parted strong { color: var(--warn); }
.wrong { border-color: var(--bad); } .wrong strong { color: var(--bad); }
.cards { display: grid; gap: .8rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-weight: 600; }
.card span { color: var(--quiet); font-size: .85rem; display: block;
  font-variant-numeric: tabular-nums; }
.card b.bad { color: var(--bad); }
"""
TABLES = """
.wide { overflow: auto; max-height: 44rem; margin: .4rem 0; }
.wide th, .wide td { white-space: nowrap; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; padding: .2rem .9rem .2rem 0; }
.wide th { position: sticky; top: 0; background: var(--page); font-weight: 600;
  vertical-align: bottom; }
.wide th:first-child, .wide td:first-child { position: sticky; left: 0;
  background: var(--page); }
.wide th:first-child { z-index: 1; }
@media (max-width: 40rem) { .wide .quiet { display: none; } }
.heat td:not(:first-child), .heat th:not(:first-child) { padding: .2rem .5rem; }
.taken { color: var(--accent); font-weight: 600; }
.onset { color: var(--bad); font-weight: 600; }
.bars td:last-child { text-align: left; }
.share { display: inline-block; height: .6rem; border-radius: .1rem; }
.share.more { background: rgb(var(--more) / .75); }
.share.less { background: rgb(var(--less) / .75); }
"""
CHARTS = """
.charts { display: grid; gap: 1.2rem 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.charts.large {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .9rem; display: grid; grid-template-columns: 1fr auto;
  gap: 0 .6rem; padding-bottom: .3rem; font-variant-numeric: tabular-nums; }
figcaption b { font-weight: 600; }
svg { width: 100%; height: auto; display: block; font-size: 11px; }
@media (max-width: 40rem) { svg.large { font-size: 13px; } }
svg text { fill: var(--quiet); stroke: var(--page); stroke-width: 3px;
  paint-order: stroke; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid, svg .axis { stroke: var(--line); fill: none; }
svg .band { fill: rgb(var(--heat) / .18); stroke: rgb(var(--heat) / .18); }
svg .line { stroke: var(--accent); stroke-width: 1.8; fill: none; }
svg .curve { stroke: var(--warn); stroke-width: 1.6; fill: none; }
svg .bar { stroke: rgb(var(--heat) / .45); stroke-width: 1.4; }
svg .dot { fill: var(--accent); } svg .near { fill: transparent; }
svg g:hover .dot { stroke: var(--accent); stroke-width: 4; }
svg .mark { stroke-dasharray: 4 3; fill: none; }
svg path.taken { stroke: var(--accent); } svg text.taken { fill: var(--accent); }
svg path.onset { stroke: var(--bad); } svg text.onset { fill: var(--bad); }
svg path.peak { stroke: var(--warn); } svg text.peak { fill: var(--warn); }
"""
TEXTS = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft);
  padding: .5rem .7rem; border-radius: .3rem; margin: .3rem 0; max-height: 15rem;
  overflow-y: auto; }
.text .quiet { user-select: none; }
.pair { margin: 1.2rem 0; }
details[open] > summary .start, details:not([open]) > summary .all { display: none; }
.sides { display: grid; gap: .3rem 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.sides > div { min-width: 0; }
del { background: rgb(var(--gone) / .22); text-decoration: none; border-radius: .2rem; }
ins { background: rgb(var(--came) / .26); text-decoration: none; border-radius: .2rem; }
details { margin: .5rem 0; }
.odd { margin: .5rem 0 .5rem 1rem; max-width: 60rem; }
.text span[title] { border-radius: .2rem; }
.legend { display: flex; align-items: center; gap: .6rem; margin: 1.2rem 0 .6rem;
  flex-wrap: wrap; font-size: .9rem; }
.legend i { display: inline-block; width: 12rem; height: .9rem; border-radius: .2rem;
  background: linear-gradient(90deg, rgb(var(--less) / var(--strongest)), transparent,
  rgb(var(--more) / var(--strongest))); }
"""


def level_style() -> str:
    """.m1 to .m8 for a token that is said more willingly, .l1 to .l8 for less."""
    return "\n".join(
        f".{name}{level} {{ background: rgb(var(--{colour}) / "
        f"calc(var(--strongest) * {level / LEVELS:g})); }}"
        for name, colour in (("m", "more"), ("l", "less"))
        for level in range(1, LEVELS + 1)
    )


STYLE = COLOURS + TEXT + TABLES + CHARTS + TEXTS + level_style()
