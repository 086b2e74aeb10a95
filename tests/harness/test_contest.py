"""The benchmark harness finds what is wrong, times what is right, and says clearly what it cannot do."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import environment
from benchmarks.contest import check, measure, set_floors
from benchmarks.counting import count
from benchmarks.measure import Clock, interleaved
from benchmarks.memory import back_pages, peak_in_fresh_process, peak_memory
from benchmarks.operations import operations
from benchmarks.passes import COLUMNS, Forward, columns_of, of
from benchmarks.problems import LOSS, make
from benchmarks.workloads import WORKLOADS, Case, Workload

CPU = torch.device("cpu")


def case_of(**contestants) -> Case:
    return Case(contestants, lambda: torch.ones(4), 1.0, 1.0)


def raises() -> tuple:
    raise ValueError("what went wrong\nand more")


def test_a_contestant_is_right_wrong_or_shown_with_its_message() -> None:
    case = case_of(
        right=lambda: (lambda: torch.ones(2, 2), lambda r: r),
        wrong=lambda: (lambda: torch.ones(4) * 1.01, lambda r: r),
        nan=lambda: (lambda: torch.full((4,), float("nan")), lambda r: r),
        short=lambda: (lambda: torch.ones(3), lambda r: r),
        fails=raises,
    )
    reference = torch.ones(4, dtype=torch.float64)
    run, message, seconds = check(case, "right", reference)
    assert run is not None
    assert message == "0e+00"
    assert seconds > 0
    for label, expected in {
        "wrong": "wrong: relative error 1.0e-02",
        "nan": "wrong: relative error nan",
        "short": "wrong shape: 3 entries for 4",
        "fails": "fails: ValueError: what went wrong (test_contest.py:",
    }.items():
        run, message, _ = check(case, label, reference)
        assert run is None
        assert message.startswith(expected), message


def test_floors_are_those_of_the_best_speeds() -> None:
    entry = {"flops": 6e9, "flops_of_passes": 2e9, "bytes": 1e9}
    for matmul, copy, expected in (
        (1e12, 1e11, (10, 6, 10, 4)),
        (1e12, 5e11, (6, 6, 2, 4)),
        (2e12, 5e11, (3, 3, 2, 2)),
    ):
        set_floors(entry, {"matmul": matmul, "copy": copy})
        found = [entry[key] for key in ("floor_ms", "compute_ms", "memory_ms", "products_ms")]
        assert found == pytest.approx(expected)


def test_turns_are_taken_and_garbage_is_left_for_later() -> None:
    import gc

    calls = []

    def contestant(name: str, seconds: float):
        def run() -> None:
            assert not gc.isenabled()
            calls.append(name)
            time.sleep(seconds)

        return run

    runs = {"a": contestant("a", 0.0), "slow": contestant("slow", 0.02), "b": contestant("b", 0.0)}
    timings = interleaved(runs, Clock(CPU), 0.03, 4, first={"slow": 2.0})
    assert gc.isenabled()
    assert calls[:3] == ["slow"] * 3  # it has been called before: no warm-up, and it keeps nobody waiting
    assert calls[3:5] == ["a", "b"]
    assert calls[5:] == ["a", "b", "b", "a"] * 2
    assert {name: len(t.milliseconds) for name, t in timings.items()} == {"a": 4, "slow": 3, "b": 4}
    assert timings["slow"].least >= 20


def test_garbage_is_collected_again_after_a_contestant_that_raises() -> None:
    import gc

    with pytest.raises(ValueError, match="what went wrong"):
        interleaved({"a": raises}, Clock(CPU), 1.0, 2)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_operators_are_counted_forward_and_backward() -> None:
    a = torch.randn(3, 3, requires_grad=True)
    assert operations(lambda: a.T.unsqueeze(0)[0].detach()) == 0
    assert operations(lambda: a @ a + 1) == 2
    # forward: mm, add, sum; backward: ones_like, two products, one sum of the two
    assert operations(lambda: torch.autograd.grad((a @ a.mT + 1).sum(), a)) == 7


def test_counted_flops_of_a_perceptron() -> None:
    p = make("mlp64", 8, CPU)  # 64-64-32-10 with biases in `a`
    layers = [(64, 64), (32, 64), (10, 32)]
    forward = sum(2.0 * 8 * O * I for O, I in layers)
    backward = sum(2.0 * 8 * O * I for O, I in layers[1:])
    flops, moved = count(p, "norms")
    assert flops == forward + backward + sum(2.0 * 8 * (O + I) for O, I in layers)
    assert moved == 4 * 8


def test_cross_entropy_counts_a_column_less_than_classes() -> None:
    p = make("mlp64", 8, CPU)
    layers = [(64, 64), (32, 64), (10, 32)]
    forward = sum(2.0 * 8 * O * I for O, I in layers)
    for quantity, V in (("kronecker", 9), ("kernel", 10)):
        own = {
            "kronecker": sum(8.0 * I * I + V * 8 * O * O for O, I in layers),
            "kernel": sum(64.0 * (V * V * O + I) for O, I in layers),
        }[quantity]
        backward = V * sum(2.0 * 8 * O * I for O, I in layers[1:])
        assert columns_of(10, quantity) == V
        assert count(p, quantity)[0] == forward + backward + own


@pytest.mark.parametrize("kind", ["mlp64", "cnn", "transformer"])
def test_torchs_passes_reach_every_layer(kind: str) -> None:
    """As many columns as the quantity needs, to the output of every layer with parameters, and no weight's gradient."""
    p = make(kind, 2, CPU)
    outputs, layers = Forward(p.model)(p.x)
    with_parameters = [m for m in p.model.modules() if any(True for _ in m.parameters(recurse=False))]
    assert len(layers) == len(with_parameters)
    expected = torch.autograd.grad(LOSS(outputs, p.y), layers)
    torch.testing.assert_close(of(p, "norms")["step"](), expected)
    assert not any(m._forward_hooks for m in p.model.modules())
    for quantity in COLUMNS:
        ways = {name: run() for name, run in of(p, quantity).items()}
        assert [tuple(g.shape) for g in ways["batched"]] == [
            (columns_of(p.classes, quantity), *z.shape) for z in layers
        ]
        assert [len(x) for x in ways["in turn"]] == [len(layers)] * columns_of(p.classes, quantity)
    assert all(q.grad is None for q in p.model.parameters())
    assert of(p, "hessian") == {}


def test_torchs_passes_of_a_product_push_the_tangent_and_pull_back() -> None:
    p = make("mlp64", 4, CPU)
    one, two = (run() for run in of(p, "product").values())
    assert [g.shape for g in one] == [q.shape for q in p.model.parameters()]
    assert len(two) == len(one)
    assert all(q.grad is None for q in p.model.parameters())


@pytest.mark.parametrize("warm", [False, True])
def test_peak_memory_of_a_call_in_a_fresh_process(warm: bool) -> None:
    result = 1e6 * 3 * 3 * 4 / 2**20  # outer, 1e6 x 3 x 3
    found = peak_in_fresh_process("outer-3", "torch_curvature", "cpu", 1, warm)
    if isinstance(found, float) and found != found:
        pytest.skip("this system does not tell a process's peak memory")
    assert isinstance(found, float), found
    assert result - 2 < found < result + 40, found


def test_a_temporary_counts_and_a_process_that_fails_says_why() -> None:
    found = peak_memory(lambda: torch.ones(8 << 20).sum(), CPU, warm=True)
    assert found != found or 31 < found < 40
    assert peak_in_fresh_process("outer-3", "nobody", "cpu", 1, True) == "KeyError: 'nobody'"


def test_pages_are_touched_and_given_back() -> None:
    for MiB in (0, 3, 20):
        back_pages(MiB)


def run_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> Path:
    monkeypatch.setattr(environment, "HOME", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    command.main()
    return tmp_path / "results.json"


def test_a_run_writes_figures_and_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    arguments = ("--no-peers", "--only", "sums-16-64", "--seconds", "0.01", "--markdown", str(page))
    results = json.loads(run_command(monkeypatch, tmp_path, *arguments).read_text())
    (entry,) = results["workloads"]
    assert set(entry["contestants"]) == {"torch_curvature", "bmm of overlaps", "bmm, materialised"}
    for contestant in entry["contestants"].values():
        assert contestant["min_ms"] <= contestant["median_ms"]
        assert float(contestant["check"]) < 1e-4
        assert contestant.get("peak_MiB", 0) >= 0
    assert entry["operations"] == 1
    assert len(results["machine"]["load_at_start"]) == len(results["machine"]["load_at_end"]) == 3
    assert entry["passes"] == {}  # a single operator makes none
    assert "| torch_curvature |" in page.read_text()
    assert "| torch_curvature |" in capsys.readouterr().out


def test_torchs_passes_are_timed_beside_the_contestants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--no-peers", "--no-memory", "--only", "diagonal-mlp64", "--seconds", "0.01")
    (entry,) = json.loads(run_command(monkeypatch, tmp_path, *arguments).read_text())["workloads"]
    assert set(entry["contestants"]) == {"torch_curvature", "plain torch"}
    assert set(entry["passes"]) == {"batched", "in turn"}
    assert all(0 < way["min_ms"] <= way["median_ms"] for way in entry["passes"].values())


def test_passes_that_fail_are_shown_with_their_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "HOME", tmp_path)
    case = Case(
        {"torch_curvature": lambda: (lambda: torch.ones(4), lambda r: r)},
        lambda: torch.ones(4, dtype=torch.float64), 1.0, 1.0, passes={"one": raises, "other": lambda: None},
    )  # fmt: skip
    workload = Workload("name", "title", "2", lambda device: case)
    options = argparse.Namespace(no_peers=True, quick=True, no_memory=True, seconds=0.01)
    entry = measure(workload, CPU, {"matmul": 1e9, "copy": 1e9}, options)
    assert entry["passes"]["one"]["check"].startswith("fails: ValueError: what went wrong (test_contest.py:")
    assert "median_ms" not in entry["passes"]["one"]
    assert entry["passes"]["other"]["median_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--no-peers", "--only", "nothing-like-it"), "--only nothing-like-it: no workload has this in its name"),
        (("--no-peers", "--device", "tpu"), "tpu"),
        (("--page", "--quick"), "--page holds every workload"),
        (("--page", "--only", "outer"), "--page holds every workload"),
    ],
)
def test_what_cannot_be_done_is_said(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises((SystemExit, RuntimeError)) as stopped:
        run_command(monkeypatch, tmp_path, *arguments)
    assert message in str(stopped.value) + capsys.readouterr().err


def test_peers_that_are_there_need_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "HOME", tmp_path)
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / ".ready").write_text("")

    def started(*arguments, **keywords) -> None:
        raise AssertionError("nothing needs to be started")

    monkeypatch.setattr(environment.subprocess, "run", started)
    with pytest.raises(SystemExit, match="does not run any more"):
        environment.python_with_peers()
    python = folder / "bin" / "python"
    python.touch(mode=0o755)
    assert environment.python_with_peers() == python


def test_every_workload_has_a_name_and_an_aim_of_its_own() -> None:
    assert len({w.name for w in WORKLOADS}) == len({w.title for w in WORKLOADS}) == len(WORKLOADS)
    assert all(float(w.target) > 0 for w in WORKLOADS)
