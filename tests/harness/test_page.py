"""What a run measured stands on the pages, between markers, and a rerun replaces it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import page, report

MACHINE = {
    "processor": "a processor", "cores": 2, "threads": 2, "date": "2026-01-01", "versions": {"torch": "2.13.0"},
    "matmul_gflops": 100.0, "copy_GBs": 10.0, "fill_GBs": 9.0, "command": "python -m benchmarks --page",
    "load_at_start": [0.5, 0.6, 0.7], "load_at_end": [2.0, 1.5, 1.0], "minutes": 12.3,
}  # fmt: skip


def timed(median: float, **more) -> dict:
    return {"median_ms": median, "min_ms": median, "spread": 0.01, "check": "1e-07", **more}


def entry(title: str = "norms", ours: float = 2.0, target: str = "3") -> dict:
    return {
        "name": title, "title": title, "target": target, "floor_ms": 1.0, "compute_ms": 1.0, "memory_ms": 0.5,
        "flops": 1e8, "bytes": 5e6, "operations": 10,
        "passes": {"batched": timed(1.25), "in turn": timed(1.75), "broken": {"check": "fails: why"}},
        "contestants": {
            "torch_curvature": timed(ours, peak_MiB=7.0), "torch_curvature, .grad too": timed(1.5),
            "plain torch": timed(3.0), "BackPACK": timed(5.0, peak_MiB=70.0), "opacus": timed(8.0),
            "laplace": {"check": "fails: no such layer"},
        },
    }  # fmt: skip


def results() -> dict:
    return {"machine": MACHINE, "workloads": [entry(), entry("fast", 0.5, "20"), {"title": "broken", "error": "why"}]}


def test_the_summary_compares_with_the_best_peer_that_is_right() -> None:
    lines = report.summary(results()).splitlines()
    assert "| norms | 2 | 1 | 2.0 | 3 | 5 (BackPACK) | **2.50** | 3 | 7 / 70 |" in lines
    assert any(line.startswith("| broken | why |") for line in lines)
    assert len({line.count("|") for line in lines}) == 1
    assert "| laplace | fails: no such layer |" in report.table(entry())


def test_what_is_missed_is_listed_with_what_the_floor_allows() -> None:
    lines = page.missed(results()).splitlines()
    assert lines == [
        "- norms: 2.50 of 3; at the floor it would be 5.00, at torch's passes alone it would be 4.00",
        "- fast: 10.00 of 20; at the floor it would be 5.00, at torch's passes alone it would be 4.00, so the aim lies "
        "beyond the floor and torch's passes alone",
    ]
    some, many = ({**entry(), "products_ms": x} for x in (0.25, 0.5))
    assert page.missed({"workloads": [some]}).endswith(
        "4.00; it allows 1.67 ms: 1.25 for torch's passes, 0.25 for the products at the floor, 0.17 for all else, "
        "which takes 0.5"
    )
    assert page.missed({"workloads": [many]}).endswith(
        "4.00, at torch's passes and the products at the floor it would be 2.86, so the aim lies beyond both together"
    )
    assert page.missed({"workloads": [entry(ours=1.0)]}) == "Every aim is reached."
    slow_passes = {**entry(), "passes": {"step": timed(2.5)}}
    assert page.missed({"workloads": [slow_passes]}).endswith("2.00, so the aim lies beyond torch's passes alone")
    without = {k: x for k, x in entry().items() if k != "passes"}  # figures of an operator, or of an earlier run
    assert page.missed({"workloads": [without]}) == "- norms: 2.50 of 3; at the floor it would be 5.00"


def test_what_a_call_consists_of() -> None:
    lines = page.counted(results()).splitlines()
    assert lines[2] == "| norms | 0.1 | 5 | 1 | 0.5 | 1.25 | 4.00 | 3 | 10 | 2 | 100 |"
    assert len(lines) == 4  # what failed has no line
    assert len({line.count("|") for line in lines}) == 1
    assert "| 0.5 |  |  | 3 |" in page.counted({"workloads": [{**entry(), "passes": {}}]})


def test_torchs_own_passes_are_shown_but_are_no_contestant() -> None:
    fast = {**entry(), "passes": {"step": timed(0.001)}}
    assert report.best_peer(fast) == report.best_peer(entry()) == ("BackPACK", 5.0)
    assert report.best_other(fast) == report.best_other(entry())
    assert report.summary({"workloads": [fast]}) == report.summary({"workloads": [entry()]})
    assert (
        "torch's own passes through the model: batched 1.25 ms; in turn 1.75 ms; broken fails: why; "
        "best peer / passes 4.00" in report.table(entry()).splitlines()
    )
    assert "passes" not in report.table({**entry(), "passes": {}})


def test_a_rerun_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    own = (Path(page.__file__).parent / "README.md").read_text()
    readme = tmp_path / "README.md"
    readme.write_text(own)
    written = page.write(results(), tmp_path)
    first = readme.read_text()
    assert readme in written
    assert "| norms | 2 |" in first
    assert "before it 0.5, 0.6, 0.7, after it 2.0, 1.5, 1.0" in first
    assert "    python -m benchmarks --page\n" in first
    assert "torch 2.13.0" in (tmp_path / "results.md").read_text()
    page.write(results(), tmp_path)
    assert readme.read_text() == first
    # what no marker encloses is as it was
    for name in ("measured", "missed", "counted"):
        own, first = (page.between(text, name, "") for text in (own, first))
    assert own == first


@pytest.mark.parametrize("text", ["", page.MARKER.format("measured"), 2 * page.MARKER.format("end of measured")])
def test_a_page_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the page needs one line"):
        page.between(text, "measured", "new")
