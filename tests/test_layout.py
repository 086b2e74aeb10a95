"""The layout shows the design: imports run one way, backends do not know each other, files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch_curvature"

# Each part of the package may import the parts to its right, and itself; nothing else of the package.
MAY_IMPORT = {
    "ops": {"_C"},
    "patches": {"ops"},
    "unfolding": {"patches"},
    "factors": {"unfolding", "ops"},
    "layers": {"patches", "factors", "ops"},
    "losses": {"factors", "ops"},
    "detaching": set(),
    "recorder": {"layers", "detaching"},
    "capture": {"recorder", "factors", "layers", "ops"},
    "plan": set(),
    "fallback": {"capture", "recorder"},
    "trust": {"plan", "fallback", "capture", "recorder", "layers", "factors", "ops"},
    "node_kinds": set(),
    "spatial": {"node_kinds", "ops"},
    "rearranging": {"node_kinds"},
    "sequences": {"node_kinds", "ops"},
    "dense_products": {"node_kinds", "processor"},
    "nodes": {"dense_products", "node_kinds", "rearranging", "sequences", "spatial"},
    "processor": set(),
    "chains": {"nodes", "processor", "ops"},
    "chain_products": {"chains", "nodes", "ops"},
    "joining": set(),
    "norms": {"factors", "ops"},
    "diagonals": {"norms", "factors"},
    "grams": {"norms", "factors", "unfolding", "ops"},
    "closed_rules": {"unfolding", "joining", "plan", "capture", "recorder", "factors"},
    "backprop": {
        "closed_rules",
        "chains",
        "joining",
        "nodes",
        "trust",
        "plan",
        "fallback",
        "capture",
        "recorder",
        "losses",
        "layers",
        "factors",
        "ops",
    },
    "tangents": {"chain_products", "nodes", "backprop", "trust", "plan", "capture", "recorder", "ops"},
    "second_passes": {"backprop", "nodes", "plan", "capture"},
    "node_columns": {"nodes"},
    "second_nodes": {"node_columns", "nodes"},
    "chain_hessians": {"chains", "second_nodes", "nodes", "ops"},
    "second_order": {
        "chain_hessians",
        "joining",
        "second_passes",
        "second_nodes",
        "node_columns",
        "backprop",
        "plan",
        "layers",
    },
    "attached": {"capture", "recorder"},
    "tracking": {
        "norms",
        "grams",
        "attached",
        "detaching",
        "backprop",
        "plan",
        "capture",
        "recorder",
        "losses",
        "layers",
        "factors",
        "ops",
    },
    "matrices": {
        "joining",
        "diagonals",
        "grams",
        "norms",
        "second_nodes",
        "second_order",
        "second_passes",
        "tangents",
        "backprop",
        "plan",
        "capture",
        "recorder",
        "losses",
        "layers",
        "factors",
        "ops",
    },
    "reference": set(),
    "products": {"ops"},
    "composition": {"ops", "products"},
    "integration": set(),
    "matching": {"integration", "products", "ops"},
}
ENTRY_POINTS = {"__init__", "__main__"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Names of the parts of the package that a file imports, wherever in the file the import stands."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level]) if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == PACKAGE.name and len(name) > 1}
    return found


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if part_of(p) not in ENTRY_POINTS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is new: say in this test what it may import"
    assert imported_parts(path) <= MAY_IMPORT[part] | {part}


def test_the_order_has_no_cycle() -> None:
    for part, below in MAY_IMPORT.items():
        for other in below - {"_C"}:
            assert part not in MAY_IMPORT[other]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_backends_do_not_include_each_other(backend: str) -> None:
    other = {"cpu": "cuda", "cuda": "cpu"}[backend]
    for path in (ROOT / "csrc" / backend).iterdir():
        for included in re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text()):
            target = (path.parent / included).resolve()
            assert (ROOT / "csrc" / other) not in target.parents, f"{path.name} includes {included}"


def test_kernels_know_no_torch_header() -> None:
    for path in (ROOT / "csrc" / "cuda").glob("*.cuh"):
        assert not re.search(r"#include\s+[<\"](torch|ATen|c10)/", path.read_text()), path.name


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_files_are_short() -> None:
    sources = {".py", ".cpp", ".h", ".hpp", ".cu", ".cuh"}
    long = {
        str(p.relative_to(ROOT)): n
        for p in tracked_files()
        if p.suffix in sources and (n := len(p.read_text().splitlines())) > 320
    }
    assert not long, f"files of more than about 300 lines: {long}"
