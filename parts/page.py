"""HTML pages: the curves of a run, and tables with recordings to play.

Each page is one file with its style and its pictures (inline SVG) inside: nothing has to be installed or loaded.
"""

import html
import os
from pathlib import Path
from urllib.parse import quote

from parts.files import whole

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8" /><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #223 }}
h1 {{ font-size: 1.3em }} h2 {{ font-size: 1em; margin: 1.5em 0 0 }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ border-bottom: 1px solid #ccc; padding: 0.4em; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
text {{ font-size: 13px; fill: #667 }} .grid {{ stroke: #e4e6ee }}
polyline {{ fill: none; stroke-width: 2; stroke-linejoin: round }}
polyline.c0 {{ stroke: #2a6fdb }} polyline.c1 {{ stroke: #e0662b }}
text.c0 {{ fill: #2a6fdb }} text.c1 {{ fill: #e0662b }}
@media (prefers-color-scheme: dark) {{ body {{ color: #dde; background: #16181d }} text {{ fill: #99a }} }}
@media (prefers-color-scheme: dark) {{ .grid {{ stroke: #2b2e37 }} }}
</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
LEFT, RIGHT, TOP, BOTTOM = 60, 880, 10, 270  # of the plotting area, in a picture of 900 x 300
POINTS = 1000  # of a curve: the picture is not wide enough to show more


def write_html(path, title, body):
    """Write a page. `title` is plain text, `body` is HTML. Raises OSError, which names the file."""
    with whole(path, "w") as file:
        file.write(PAGE.format(title=html.escape(title), body=body))


# ---------------------------------------------------------------------------------------------------------------------
# tables


def write_page(path, title, about, head, rows):
    """Write a page with a table. A cell is text, or a Path: a recording to play, relative to the page's folder.

    head: the cells of the first row; about: one paragraph above the table. Raises OSError, which names the file.
    """
    def cell(x):
        return f'<audio controls src="{quote(x.as_posix())}"></audio>' if isinstance(x, Path) else html.escape(x)

    lines = ["<tr><th>" + "<th>".join(map(cell, head))]
    lines += ["<tr><td>" + "<td>".join(map(cell, row)) for row in rows]
    table = "\n".join(lines)
    write_html(path, title, f"<p>{html.escape(about)}</p>\n<table>\n{table}\n</table>")


# ---------------------------------------------------------------------------------------------------------------------
# curves


def draw(lines, path):
    """Write the curves of lines of metrics.jsonl as a page. Raises OSError, which names the file."""
    def curve(key):
        return [(line["iter"], line[key]) for line in lines if line.get(key) is not None]

    charts = [
        chart("Loss", {"training": curve("loss"), "held out": curve("val_loss")}),
        chart("Accuracy of codebook 0", {"training": curve("c0_accuracy"), "held out": curve("val_c0_accuracy")}),
        chart("Learning rate", {"learning rate": curve("lr")}),
    ]
    run = os.path.basename(os.path.dirname(os.path.abspath(path)))
    write_html(path, run, "".join(charts))


def chart(title, series):
    """One diagram as SVG, "" without a point. series {label: [(x, y)]}: at most two; each label shows its last y."""
    series = {label: line[:: -(-len(line) // POINTS)] + line[-1:] for label, line in series.items() if line}
    if not series:
        return ""
    xs, ys = zip(*(point for line in series.values() for point in line), strict=True)
    low, high, far = min(ys), max(ys), max(1, *xs)
    high = high if high > low else low + (abs(low) or 1)  # a constant curve still needs a height
    svg = [f'<h2>{title}</h2>\n<svg viewBox="0 0 900 300" role="img" aria-label="{title}">']
    for i in range(5):
        x = LEFT + (RIGHT - LEFT) * i / 4
        y = BOTTOM - (BOTTOM - TOP) * i / 4
        svg.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}" />')
        svg.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{low + (high - low) * i / 4:.3g}</text>')
        svg.append(f'<text x="{x}" y="{BOTTOM + 22}" text-anchor="middle">{far * i / 4:.0f}</text>')
    right = (RIGHT - LEFT) / far  # pixels for each unit of x
    up = (BOTTOM - TOP) / (high - low)
    for n, (label, line) in enumerate(series.items()):
        points = [(LEFT + right * x, BOTTOM - up * (y - low)) for x, y in line]
        svg.append(f'<polyline class="c{n}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" />')
        place = f'x="{RIGHT - 8}" y="{TOP + 16 + 18 * n}" text-anchor="end"'
        svg.append(f'<text class="c{n}" {place}>{label} {line[-1][1]:.4g}</text>')
    return "\n".join(svg) + "</svg>\n"
