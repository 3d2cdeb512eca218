"""What the report shows of an analysis: tables, plots, and a word on where thresholds cut."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pipelines.report.charts import distribution_chart

DESCRIBED = ("count", "mean", "std", "min", "25%", "50%", "75%", "max")
BOX = ("1%", "25%", "50%", "75%", "99%")


def analysis(reports: Mapping[str, Any]) -> dict[str, Any] | None:
    """The analysis before clean and, where it is done, after it; None where there is none."""
    sides = {
        side: reports[stage] for side, stage in (("before", "analyze"), ("after", "analyze_clean")) if stage in reports
    }
    if "before" not in sides:
        return None
    told = {side: {entry["name"]: entry for entry in report["statistics"]} for side, report in sides.items()}
    numbers = {name: entry for name, entry in told["before"].items() if "unique" not in entry and entry["count"]}
    return {
        "labels": [*DESCRIBED, "mean − 3σ", "mean + 3σ", "beyond 3σ"],
        "numbers": [
            {"name": name, "side": side, "cells": _cells(entries[name])}
            for name in numbers
            for side, entries in told.items()
            if entries[name]["count"]
        ],
        "strings": [
            {"name": name, "side": side, **entry, "values": ", ".join(f"{v} {n}" for v, n in entry["values"])}
            for name in told["before"]
            for side, entries in told.items()
            if "top" in (entry := entries[name])
        ],
        "charts": [Markup(_chart(name, told)) for name in numbers],
        "cuts": [_cut(number, sides) for number in range(len(sides["before"]["filters"]))],
        "percentiles": [
            f"{name}: the lowest 1 % of rows lie below {entry['1%']:.6g}, the highest 1 % above {entry['99%']:.6g}."
            for name, entry in numbers.items()
        ],
        "sketched": not all(entry["exact"] for entry in numbers.values()),
    }


def _cells(entry: dict[str, Any]) -> list[str]:
    sigma = entry["sigma"]
    values = [*(entry[key] for key in DESCRIBED[1:]), sigma["low"], sigma["high"]]
    return [f"{entry['count']:,}", *(f"{value:.6g}" for value in values), f"{sigma['beyond']:,}"]


def _chart(name: str, told: dict[str, dict[str, Any]]) -> str:
    before = told["before"][name]
    series = {
        side: (entries[name]["histogram"]["counts"], tuple(entries[name][key] for key in BOX))
        for side, entries in told.items()
        if entries[name]["count"]
    }
    return distribution_chart(name, before["histogram"]["edges"], series, list(before["bounds"].values()))


def _cut(number: int, sides: dict[str, Any]) -> str:
    """What one filter alone would drop, in words."""
    first = sides["before"]["filters"][number]
    bounds = ", ".join(f"{name} {value:g}" for name, value in sorted(first["bounds"].items(), reverse=True))
    told = [
        f"{report['filters'][number]['cuts']:,} of {report['rows']:,} rows {side} cleaning"
        f" ({report['filters'][number]['cuts'] / max(report['rows'], 1):.1%})"
        for side, report in sides.items()
    ]
    return f"{first['operator']} ({bounds}) alone would drop {', '.join(told)}."
