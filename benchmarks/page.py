"""Writes what a run measured and counted into the pages, between markers: a rerun replaces it, the rest stays."""

from __future__ import annotations

import re
from pathlib import Path

from .report import OURS, document, draw, machine_lines, summary

MARKER = "<!-- {}: written by python -m benchmarks --page -->\n"


def between(text: str, name: str, new: str) -> str:
    """The text with what stands between the two markers of that name replaced."""
    begin, end = MARKER.format(name), MARKER.format(f"end of {name}")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page needs one line {begin.strip()} and one {end.strip()}")
    return re.sub(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{new.strip()}\n\n{end}", text, flags=re.DOTALL
    )


def counted(results: dict) -> str:
    """What each call consists of, and what is left of its time when the floor is taken away, for each operator run."""
    lines = [
        "| workload | Gflop | result, MB | floor: products, ms | floor: result, ms | operators run | ours, ms | "
        "beyond the floor, us an operator |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in results["workloads"]:
        mine = entry.get("contestants", {}).get(OURS, {}).get("median_ms")
        if mine is None:
            continue
        ran = entry.get("operations", 0)
        beyond = f"{1e3 * max(0.0, mine - entry['floor_ms']) / ran:.0f}" if ran else ""
        lines.append(
            f"| {entry['title']} | {entry['flops'] / 1e9:.3g} | {entry['bytes'] / 1e6:.3g} | "
            f"{entry['compute_ms']:.3g} | {entry['memory_ms']:.3g} | {ran or ''} | {mine:.3g} | {beyond} |"
        )
    return "\n".join(lines)


def missed(results: dict) -> str:
    """The workloads that do not reach their aim, by how much."""
    lines = []
    for entry in results["workloads"]:
        found = entry.get("contestants", {})
        mine = found.get(OURS, {}).get("median_ms")
        others = {k: c["median_ms"] for k, c in found.items() if "median_ms" in c and not k.startswith((OURS, "plain"))}
        if mine is None or not others:
            continue
        ratio = min(others.values()) / mine
        if ratio < float(entry["target"]):
            at_floor = min(others.values()) / entry["floor_ms"]
            lines.append(
                f"- {entry['title']}: {ratio:.2f} of {entry['target']}; at the floor it would be {at_floor:.2f}"
                + (", so the aim lies beyond the floor" if at_floor < float(entry["target"]) else "")
            )
    return "\n".join(lines) if lines else "Every aim is reached."


def write(results: dict, folder: Path) -> list[Path]:
    """README.md, results.md and results.png of the folder; the paths written."""
    page, tables, picture = folder / "README.md", folder / "results.md", folder / "results.png"
    text = page.read_text()
    text = between(text, "measured", machine_lines(results["machine"]) + "\n" + summary(results))
    text = between(text, "missed", missed(results))
    text = between(text, "counted", counted(results))
    page.write_text(text)
    tables.write_text(document(results))
    draw(results, picture)
    return [page, tables, picture]
