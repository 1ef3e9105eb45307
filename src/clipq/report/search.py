"""What came out of a search: a table for the terminal, and a page with plots."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from clipq.report.tables import table
from clipq.search.record import SearchRecord

COLUMNS = ("tensor", "weights", "p", "b", "bytes (predicted)", "share", "remark")

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#202124}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem}svg{max-width:100%;height:auto}
table{border-collapse:collapse;font-size:13px}
td,th{padding:.2rem .7rem;border-bottom:1px solid #dadce0;text-align:right}
td:first-child,th:first-child,td.text,th.text{text-align:left}p.note{color:#5f6368}"""


def to_table(found: SearchRecord) -> Group:
    """For a terminal."""
    groups = table("The plan, group by group", COLUMNS, _group_rows(found))
    groups.columns[-1].justify = "left"
    lines = [*summary(found), *(f"Note: {note}" for note in found.notes)]
    return Group(groups, *(Text(line) for line in lines))


def to_page(found: SearchRecord) -> str:
    """One HTML file that needs no other."""
    # Here and not above: Matplotlib takes a while to import.
    from clipq.report import search_plots as plots

    parts = [f"<h1>Search for {html.escape(_target(found))}</h1>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in summary(found)]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in found.notes]
    sections = (
        ("The trade-off", interaction_words(found), plots.plot_trade_off(found)),
        ("Pruning rate and bit width of every group", "", plots.plot_choices(found)),
        ("Sensitivity", _SENSITIVITY[bool(found.sensitivity)], plots.plot_sensitivity(found)),
        ("Convergence", "", plots.plot_convergence(found)),
    )
    for title, words, figure in sections:
        if figure is not None:
            parts.append(f"<h2>{title}</h2>")
            parts += [f"<p>{html.escape(words)}</p>"] if words else []
            parts.append(plots.to_svg(figure))
    parts += ["<h2>Every group</h2>", _table(COLUMNS, _group_rows(found), text={len(COLUMNS) - 1})]
    parts += ["<h2>Evaluations and time</h2>", _table(("stage", "evaluations", "seconds"), _stage_rows(found))]
    parts.append(
        '<p class="note">Seconds are those of the process that wrote this page, since it was last started.</p>'
    )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>clipq search</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def summary(found: SearchRecord) -> list[str]:
    """What was asked for, and what came of it."""
    after = "after a few steps of fine-tuning" if found.recovered else "without fine-tuning"
    return [
        f"Target: {_target(found)}. The plan's file has {found.bytes:,} bytes, the model {found.float32_bytes:,} as "
        f"float32: {found.ratio:.1f} times smaller.",
        f"Cost: {found.base_cost:.4g} in full precision, {found.cost:.4g} with the plan, {after}. "
        f"Drop, as max_drop counts it: {found.drop:.4g}.",
    ]


def interaction_words(found: SearchRecord) -> str:
    """How groups compressed together differ from the sum of each alone."""
    if found.interaction is None:
        return ""
    a, b = found.interaction
    factors = [math.exp(a) * cost ** (b - 1) for cost in (0.01, 0.1, 1.0)]
    return (
        f"A whole plan adds about exp({a:.3g}) · sum^{b:.3g} to the cost, sum being what its groups add one by one: "
        f"{factors[0]:.2g}, {factors[1]:.2g} and {factors[2]:.2g} times the sum where that is 0.01, 0.1 and 1. The "
        f"predicted curve is corrected by that."
    )


_SENSITIVITY = {
    True: "What each group adds to the cost, the others in full precision, by the surfaces that were fitted.",
    False: "What the evaluations of each group added to the cost, the groups before it already compressed.",
}


def _target(found: SearchRecord) -> str:
    (name, value), *_ = found.target.items()
    limit = "" if found.target_bytes is None or name == "bytes" else f" (at most {found.target_bytes:,} bytes)"
    return f"{name.replace('_', ' ')} {value}{limit}"


def _group_rows(found: SearchRecord) -> list[tuple[str, ...]]:
    return [
        (
            g.name,
            f"{g.size:,}",
            f"{g.pruning_rate:.4f}",
            str(g.bits),
            f"{g.bytes:,.0f}",
            f"{100 * g.share:.1f} %",
            g.remark or "",
        )
        for g in found.groups
    ]


def _stage_rows(found: SearchRecord) -> list[tuple[str, ...]]:
    """Stages as they were timed; layers of the layerwise search are one."""
    counts = Counter({"layer" if k == "layerwise" else k: n for k, n in _counts(found).items()})
    stages = list(dict.fromkeys([*found.seconds, *counts]))
    rows = [(s, str(counts[s]) if counts[s] else "", f"{found.seconds.get(s, 0.0):.1f}") for s in stages]
    return [*rows, ("all", str(sum(counts.values())), f"{sum(found.seconds.values()):.1f}")]


def _counts(found: SearchRecord) -> Counter[str]:
    return Counter(e.stage for e in found.evaluations) + Counter({"plan": 1, "prices": len(found.groups) + 1})


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: set[int] | None = None) -> str:
    """All columns but the first, and those of text, are aligned right."""
    kinds = ['class="text"' if i in (text or set()) else "" for i in range(len(columns))]

    def line(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag} {kind}>{html.escape(v)}</{tag}>" for v, kind in zip(row, kinds, strict=True))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', columns)}</tr></thead><tbody>\n{body}\n</tbody></table>"
