"""Writes what a run measured and counted into the pages, between markers: a rerun replaces it, the rest stays."""

from __future__ import annotations

import re
from pathlib import Path

from .report import OURS, best_peer, document, draw, fastest_passes, machine_lines, summary

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
    """What each call consists of, what torch takes for its passes alone, and what is left of its time when the floor is
    taken away, for each operator run."""
    lines = [
        "| workload | Gflop | result, MB | floor: products, ms | floor: result, ms | torch's passes, ms | "
        "best peer / passes | aim | operators run | ours, ms | beyond the floor, us an operator |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in results["workloads"]:
        mine = entry.get("contestants", {}).get(OURS, {}).get("median_ms")
        if mine is None:
            continue
        ran = entry.get("operations", 0)
        beyond = f"{1e3 * max(0.0, mine - entry['floor_ms']) / ran:.0f}" if ran else ""
        passes, peer = fastest_passes(entry), best_peer(entry)
        ratio = f"{peer[1] / passes:.2f}" if passes and peer else ""
        lines.append(
            f"| {entry['title']} | {entry['flops'] / 1e9:.3g} | {entry['bytes'] / 1e6:.3g} | "
            f"{entry['compute_ms']:.3g} | {entry['memory_ms']:.3g} | {f'{passes:.3g}' if passes else ''} | {ratio} | "
            f"{entry['target']} | {ran or ''} | {mine:.3g} | {beyond} |"
        )
    return "\n".join(lines)


def left(entry: dict, peer: float, mine: float) -> str:
    """What the aim leaves beside torch's passes and the products that are not part of them, and what is needed."""
    passes, products = fastest_passes(entry), entry.get("products_ms")
    if passes is None or products is None:
        return ""
    allowed, rest = peer / float(entry["target"]), mine - passes - products
    if allowed <= passes + products:
        both = f"at torch's passes and the products at the floor it would be {peer / (passes + products):.2f}"
        return f", {both}, so the aim lies beyond both together"
    return (
        f"; it allows {allowed:.3g} ms: {passes:.3g} for torch's passes, {products:.3g} for the products at the floor, "
        f"{allowed - passes - products:.2g} for all else, which takes {rest:.2g}"
    )


def missed(results: dict) -> str:
    """The workloads that do not reach their aim, by how much."""
    lines = []
    for entry in results["workloads"]:
        mine = entry.get("contestants", {}).get(OURS, {}).get("median_ms")
        peer = best_peer(entry) if mine is not None else None
        if mine is None or peer is None:
            continue
        aim, ratio, passes = float(entry["target"]), peer[1] / mine, fastest_passes(entry)
        if ratio >= aim:
            continue
        limits = [("the floor", entry["floor_ms"]), *([("torch's passes alone", passes)] if passes else [])]
        said = ", ".join(f"at {name} it would be {peer[1] / limit:.2f}" for name, limit in limits)
        beyond = [name for name, limit in limits if peer[1] / limit < aim]
        lines.append(
            f"- {entry['title']}: {ratio:.2f} of {entry['target']}; {said}"
            + (f", so the aim lies beyond {' and '.join(beyond)}" if beyond else left(entry, peer[1], mine))
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
