"""report.html of a run: one file with everything in it, that fetches nothing and runs no script."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .checkpoint import write_atomically
from .figures import INK, curves
from .metric import Metric
from .recipe import changed_text

REPORT = "report.html"

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #21262c; --soft: #5b6570; --rule: #dde1e6; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --ink: #e4e7ea; --soft: #9aa4ae; --rule: #2d333a; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; font-weight: 650; margin: 0 0 1.75rem; text-wrap: balance; }
h2 { font-size: 1.1rem; font-weight: 650; margin: 3rem 0 1rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .5rem; }
p { max-width: 42rem; }
.errors { display: flex; flex-wrap: wrap; gap: 1.25rem 3.5rem; margin: 0; }
.errors div { display: flex; flex-direction: column; }
.errors dt { order: 2; color: var(--soft); font-size: .9rem; }
.errors dd { margin: 0; font-size: 1.9rem; line-height: 1.3; font-weight: 350; font-variant-numeric: tabular-nums; }
.errors .own dd { font-weight: 650; color: var(--accent); }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 34rem; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: .87rem; max-width: 34rem; margin-top: .5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2.5rem 3rem; }
.figures .wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .87rem; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; color: var(--soft); }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2rem 3rem; }
.settings table { width: 100%; }
.settings th { width: 12rem; }
.settings td { overflow-wrap: anywhere; }
.history th, .history td { text-align: right; white-space: nowrap; }
summary { cursor: pointer; color: var(--accent); font-size: .9rem; margin-top: 1.25rem; }
details[open] summary { margin-bottom: .75rem; }
"""


def write_report(
    folder: str | Path,
    *,
    title: str,
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    published: str | None,
    figures: Mapping[str, Figure],
    baseline: Mapping[str, Any] | None = None,
    metric: Metric = Metric(),  # noqa: B008  (frozen)
) -> Path:
    """Write `report.html` into `folder`, whole or not at all, and return its path.

    Args:
        folder: an existing folder.
        title: the heading.
        settings: by name; names with a dot are grouped by what stands before it.
        history: one mapping an epoch, as `ladderfast.training.figures.curves` takes it; may be empty.
        result: the final figures by name; that of `metric` is shown large.
        published: the paper's figure, as it prints it.
        figures: by title. A figure's label (`figure.set_label`) becomes its caption; what is drawn in
            `figures.INK` takes the page's text colour.
        baseline: the result of another run to compare with, and its title.
        metric: what the run is judged by.
    """
    path = Path(folder) / REPORT
    pictures = [_figure(number, name, figure) for number, (name, figure) in enumerate(figures.items(), 1)]
    sections = [_errors(title, result, published, baseline, metric)]
    if history:
        drawn = _figure(0, "Costs and error over the epochs", curves(history, metric), heading=False)
        sections.append(_section("Training", drawn + _history(history, metric)))
    if pictures:
        sections.append(_section("What it has learned", f'<div class="figures">{"".join(pictures)}</div>'))
    shown = {metric.name, "published", "title", "changed"}
    names = [key for key in result if key not in shown]
    if baseline is None:
        figures_of_run = _table({_words(key): result[key] for key in names})
    else:
        figures_of_run = _table(
            {_words(key): (result[key], baseline.get(key)) for key in names}, head=(title, baseline["title"])
        )
    sections.append(_section("Figures of the run", figures_of_run))
    sections.append(_section("Settings", _settings(settings)))
    changed = ""
    if result.get("changed"):
        changed = f"<p>Not the recipe as it is, but with {escape(changed_text(result['changed']))}.</p>\n"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{changed}"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>"


def _errors(
    title: str,
    result: Mapping[str, Any],
    published: str | None,
    baseline: Mapping[str, Any] | None,
    metric: Metric,
) -> str:
    """The figure of the run, large, beside what it is to be compared with."""
    own = result.get(metric.name)
    if own is None:
        return ""
    wrong, samples = result.get("test_errors"), result.get("test_samples")
    of = f", {_text(wrong)} of {_text(samples)}" if wrong is not None and samples is not None else ""
    what = f"{metric.words}{of}"
    if f"{metric.name}_std" in result:
        what = f"{metric.words}, mean and standard deviation of {result['seeds']} seeds"
    clean = result.get(f"clean_{metric.name}")
    if clean is not None:
        what += ", input corrupted as in training"
    entries = [("own", metric.text(result), what)]
    if clean is not None:
        entries.append(("", metric.text({metric.name: clean}), f"{metric.words}, input as it is"))
    if published is not None:
        entries.append(("", metric.published(published), f"published {metric.words}"))
    without, other = (None, "") if baseline is None else (baseline.get(metric.name), baseline["title"])
    if without is not None:
        entries.append(("", metric.text({metric.name: without}), f"{metric.words}, {other}"))
    cells = "".join(
        f'<div class="{kind}"><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>'
        for kind, value, what in entries
    )
    text = f'<dl class="errors">{cells}</dl>'
    if without is not None and own > 0 and metric.name == "test_error":
        ratio = without / own
        how = f"{ratio:.1f} times fewer" if ratio >= 1.5 else f"{100 * (1 - own / without):.2g} % fewer"
        how = how if ratio > 1 else "no fewer"
        text += f"<p>“{escape(title)}” makes {how} errors than “{escape(other)}”.</p>"
    return text


def _figure(number: int, title: str, figure: Figure, *, heading: bool = True) -> str:
    caption = str(figure.get_label())
    name = f"{title}. {caption}" if caption else title
    svg = _svg(figure, f"f{number}-")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)
    head = f"<h3>{escape(title)}</h3>" if heading else ""
    width, height = figure.get_size_inches()
    kind = ' class="wide"' if width > 2 * height else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{kind}>{head}{svg}{below}</figure>\n"


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> element to stand in a page: its text as text, in the page's colour."""
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(
            file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # Its own names are memory addresses in part; these are the same for the same figure, and the page's alone.
    names: dict[str, str] = {}
    svg = re.sub(
        r'(\bid="|href="#|url\(#)([^")]+)',
        lambda found: found[1] + names.setdefault(found[2], f"{prefix}{len(names)}"),
        svg,
    )
    return svg.replace(INK, "currentColor")


def _history(history: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    keys = list(dict.fromkeys(key for row in history for key in row))
    head = "".join(f'<th scope="col">{escape(_words(key))}</th>' for key in keys)
    other = (
        ""
        if metric.unit == "%"
        else f"; {escape(metric.words)} {f'in {metric.unit}' if metric.unit else 'without unit'}"
    )
    errors = ", errors in percent" if any("error" in key for key in keys) else ""
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(row.get(key)))}</td>" for key in keys) + "</tr>\n"
        for row in history
    )
    return (
        '<details><summary>The same as numbers</summary><div class="scroll"><table class="history">'
        f"<caption>One row an epoch: costs in nats{errors}{other}.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _settings(settings: Mapping[str, Any]) -> str:
    def group(key: str) -> str:
        return key.partition(".")[0] if "." in key else ""

    tables = []
    for name, keys in groupby(sorted(settings, key=group), key=group):
        entries = {key.removeprefix(f"{name}."): settings[key] for key in keys}
        tables.append(f"<div>{f'<h3>{escape(name)}</h3>' if name else ''}{_table(entries)}</div>")
    return f'<div class="settings">{"".join(tables)}</div>'


def _table(entries: Mapping[str, Any], head: Sequence[str] = ()) -> str:
    """A row an entry; with a head, entries are tuples of a cell for each of its columns."""

    def cells(value: Any) -> str:
        return "".join(f"<td>{escape(_text(cell))}</td>" for cell in (value if head else (value,)))

    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th>{cells(value)}</tr>\n' for key, value in entries.items()
    )
    above = f"<thead><tr><td></td>{columns}</tr></thead>" if head else ""
    return f"<table>{above}<tbody>{rows}</tbody></table>"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _text(value: Any) -> str:
    """A value as people write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value)
