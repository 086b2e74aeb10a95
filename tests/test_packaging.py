"""What a user meets before the first result: the sdist, and the errors of a wrong installation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything built."""
    copy = tmp_path_factory.mktemp("checkout") / "torch_curvature"
    ignored = shutil.ignore_patterns(
        "*.so", "__pycache__", "build", ".venv", ".git", ".benchmarks", "*.egg-info", ".*cache"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def test_sdist_holds_the_sources_of_both_backends(checkout: Path, tmp_path: Path) -> None:
    result = run("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path), cwd=checkout)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {
        str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")
    }
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "torch_curvature").rglob("*.py")}
    assert sources
    assert (sources | python | {"setup.py", "LICENSE", "README.md", "torch_curvature/py.typed"}) <= packed


@pytest.fixture
def no_torch(tmp_path: Path) -> str:
    """A PYTHONPATH on which `import torch` fails as if it were not installed."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    return str(tmp_path)


def test_building_without_torch_names_the_right_command(checkout: Path, no_torch: str) -> None:
    for command in ("dist_info", "bdist_wheel", "build_ext", "editable_wheel"):
        result = run("setup.py", command, cwd=checkout, PYTHONPATH=no_torch)
        assert result.returncode != 0
        assert "pip install . --no-build-isolation" in result.stderr


def test_sdist_needs_no_torch(checkout: Path, no_torch: str, tmp_path: Path) -> None:
    result = run("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "dist"), cwd=checkout, PYTHONPATH=no_torch)
    assert result.returncode == 0, result.stderr


def test_import_without_the_compiled_module_names_the_command(checkout: Path) -> None:
    result = run("-c", "import torch_curvature", cwd=checkout, PYTHONPATH=str(checkout))
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "pip install . --no-build-isolation" in result.stderr


def test_import_of_a_module_built_for_another_torch_names_the_command(checkout: Path, tmp_path: Path) -> None:
    broken = tmp_path / "torch_curvature"
    shutil.copytree(checkout / "torch_curvature", broken)
    for built in (ROOT / "torch_curvature").glob("_C.*.so"):
        data = built.read_bytes()
        # A symbol that no torch exports stands for one that this torch does not export yet.
        (broken / built.name).write_bytes(data.replace(b"torch_parallel_for", b"torch_parallel_f0r"))
    result = run("-c", "import torch_curvature", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "ImportError: The compiled part of torch_curvature cannot be loaded" in result.stderr
    assert "undefined symbol" in result.stderr
    assert "pip install . --no-build-isolation" in result.stderr


def test_cuda_can_be_demanded(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("class version:\n    cuda = None\n")
    (tmp_path / "torch" / "utils").mkdir()
    (tmp_path / "torch" / "utils" / "__init__.py").write_text("")
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text("")
    result = run("setup.py", "build_ext", cwd=checkout, PYTHONPATH=str(tmp_path), TORCH_CURVATURE_CUDA="1")
    assert result.returncode != 0
    assert "TORCH_CURVATURE_CUDA=1, but torch.version.cuda=None" in result.stderr


def test_self_check_passes() -> None:
    result = run("-m", "torch_curvature", cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "self-check passed" in result.stdout
    assert "instruction set" in result.stdout


def test_every_operator_is_registered_for_every_backend_compiled() -> None:
    import torch

    from torch_curvature import _C

    schemas = re.findall(r'm\.def\("(\w+)\(', (ROOT / "csrc" / "library.cpp").read_text())
    keys = ["CPU"] if _C.build_info()["cuda"] == "not compiled" else ["CPU", "CUDA"]
    missing = [
        (name, key)
        for name in schemas
        for key in keys
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_curvature::{name}", key)
    ]
    assert schemas
    assert not missing


def test_cuda_without_a_gpu_says_so() -> None:
    # In a process of its own: torch looks for a device once.
    code = "import torch, torch_curvature as tc; print(tc.ops.outer(*torch.ones(2, 3, device='cuda')).is_cuda)"
    result = run("-c", code, cwd=ROOT)
    if torch.cuda.is_available():
        assert result.stdout.strip() == "True", result.stderr
    else:
        assert result.returncode != 0
        assert re.search("NVIDIA driver|not compiled with CUDA", result.stderr), result.stderr
