"""Tables and pictures of what was measured."""

from __future__ import annotations

from pathlib import Path

OURS = "torch_curvature"


def best_other(entry: dict) -> tuple[str, float] | None:
    """The fastest contestant that is right and not ours."""
    timed = {k: c["median_ms"] for k, c in entry["contestants"].items() if not k.startswith(OURS) and "median_ms" in c}
    return min(timed.items(), key=lambda item: item[1]) if timed else None


def best_peer(entry: dict) -> tuple[str, float] | None:
    """The fastest library that is right; on single operators, plain torch is the peer."""
    timed = {
        k: c["median_ms"]
        for k, c in entry["contestants"].items()
        if not k.startswith((OURS, "plain torch")) and "median_ms" in c
    }
    return min(timed.items(), key=lambda item: item[1]) if timed else None


def fastest_passes(entry: dict) -> float | None:
    """Milliseconds of torch's own passes, the fastest way; nothing where none was timed."""
    timed = [way["median_ms"] for way in entry.get("passes", {}).values() if "median_ms" in way]
    return min(timed, default=None)


def passes_line(entry: dict) -> str:
    """How long torch's own passes take, each way, beside the best peer; empty where the workload has none."""
    ways = entry.get("passes", {})
    said = "; ".join(
        f"{name} {way['median_ms']:.3g} ms" if "median_ms" in way else f"{name} {way['check']}"
        for name, way in ways.items()
    )
    fastest, peer = fastest_passes(entry), best_peer(entry)
    ratio = f"; best peer / passes {peer[1] / fastest:.2f}" if fastest and peer else ""
    return f"torch's own passes through the model: {said}{ratio}" if ways else ""


def table(entry: dict) -> str:
    if "error" in entry:
        return f"### {entry['title']}\n\nfails: {entry['error']}\n"
    floor, mine = entry["floor_ms"], entry["contestants"].get(OURS, {}).get("median_ms")
    lines = [
        f"### {entry['title']}",
        "",
        f"floor {floor:.3g} ms (products {entry['compute_ms']:.3g}, result to memory {entry['memory_ms']:.3g}); "
        f"aim: {entry['target']} times the best peer",
        "",
        *([f"{entry['bounds']}", ""] if "bounds" in entry else []),
        *([line, ""] if (line := passes_line(entry)) else []),
        "| | ms, median | min | spread | of ours | of floor | peak MiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(entry["contestants"].items(), key=lambda item: item[1].get("median_ms", float("inf")))
    for label, c in order:
        if "median_ms" not in c:
            lines.append(f"| {label} | {c['check']} | | | | | | |")
            continue
        ratio = f"{c['median_ms'] / mine:.2f}" if mine else ""
        memory = f"{c['peak_MiB']:.0f}" if "peak_MiB" in c else c.get("peak_fails", "")
        lines.append(
            f"| {label} | {c['median_ms']:.3g} | {c['min_ms']:.3g} | {c['spread']:.0%} | {ratio} | "
            f"{c['median_ms'] / floor:.1f} | {memory} | {c['check']} |"
        )
    return "\n".join([*lines, ""])


def peaks(ours: dict, peer: dict) -> str:
    """MiB at the peak, ours and the peer's."""
    found = [f"{c['peak_MiB']:.0f}" if "peak_MiB" in c else "?" for c in (ours, peer)]
    return " / ".join(found) if "peak_MiB" in ours else ""


def summary(results: dict) -> str:
    """One line for each workload."""
    lines = [
        "| workload | ours, ms | floor, ms | ours / floor | plain torch, ms | best peer, ms | best peer / ours | aim | "
        "peak MiB, ours / best peer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in results["workloads"]:
        ours = entry.get("contestants", {}).get(OURS, {})
        if "median_ms" not in ours:
            lines.append(f"| {entry['title']} | {ours.get('check', entry.get('error', ''))} | | | | | | | |")
            continue
        mine, floor = ours["median_ms"], entry["floor_ms"]
        plain = entry["contestants"].get("plain torch", {}).get("median_ms")
        peer = best_peer(entry)
        memory = peaks(ours, entry["contestants"][peer[0]] if peer else {})
        lines.append(
            f"| {entry['title']} | {mine:.3g} | {floor:.3g} | {mine / floor:.1f} | {f'{plain:.3g}' if plain else ''} | "
            f"{f'{peer[1]:.3g} ({peer[0]})' if peer else 'none is right'} | "
            f"{f'**{peer[1] / mine:.2f}**' if peer else ''} | {entry['target']} | {memory} |"
        )
    return "\n".join(lines)


def machine_line(m: dict) -> str:
    return (
        f"{m['processor']}, {m['threads']} threads: matrix product {m['matmul_gflops']:.0f} GFLOP/s, "
        f"copy {m['copy_GBs']:.1f} GB/s, fill {m['fill_GBs']:.1f} GB/s"
    )


def machine_lines(m: dict) -> str:
    """Where, when, with what, how busy, and the command that does it again."""
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    before, after = (", ".join(f"{x:.1f}" for x in m.get(k, ())) or "?" for k in ("load_at_start", "load_at_end"))
    return (
        f"{m['processor']}, {m.get('cores', '?')} cores, {m['threads']} threads, {m['date']}; in this run a matrix "
        f"product reached {m['matmul_gflops']:.0f} GFLOP/s, a copy {m['copy_GBs']:.1f} GB/s, a fill "
        f"{m['fill_GBs']:.1f} GB/s.\n{versions}.\n"
        f"The run took {m.get('minutes', 0):.0f} minutes; load average (1, 5, 15 minutes) before it {before}, after it "
        f"{after}; the run itself makes up to {m['threads']}.\n\n    {m['command']}\n"
    )


def document(results: dict) -> str:
    """Machine, summary and all tables, in markdown."""
    tables = (table(entry) for entry in results["workloads"])
    return "\n".join(["# All contestants\n", machine_lines(results["machine"]), summary(results), "", *tables])


def draw(results: dict, path: Path) -> None:
    """Bars against the floor, one panel for each workload."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [e for e in results["workloads"] if any("median_ms" in c for c in e.get("contestants", {}).values())]
    if not entries:
        return
    columns = min(3, len(entries))
    rows = -(-len(entries) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, 2.3 * rows), squeeze=False)
    for axis in axes.flat[len(entries) :]:
        axis.axis("off")
    for axis, entry in zip(axes.flat, entries):
        timed = [(k, c["median_ms"]) for k, c in entry["contestants"].items() if "median_ms" in c]
        timed.sort(key=lambda item: -item[1])
        colours = [
            "#c44e52" if k.startswith(OURS) else "#8c8c8c" if k == "plain torch" else "#4c72b0" for k, _ in timed
        ]
        axis.barh([k for k, _ in timed], [t for _, t in timed], color=colours)
        axis.axvline(entry["floor_ms"], color="black", linestyle=":", linewidth=1.2)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlim(left=min(entry["floor_ms"], timed[-1][1]) / 2)
        axis.set_title(entry["title"], fontsize=8)
        axis.tick_params(labelsize=7)
    figure.suptitle(
        f"milliseconds (log scale), dotted: floor; {results['machine']['processor']}, "
        f"{results['machine']['threads']} threads, {results['machine']['date']}", fontsize=9, y=0.998,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.992))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
