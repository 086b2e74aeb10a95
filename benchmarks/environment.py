"""An environment of the peers' own, beside the one that has torch: made on first use, nothing installed into yours."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".benchmarks"
PEERS = (
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "laplace-torch",
    "nngeometry",
    "asdfghjkl",
    "opacus",
    "hessian-eigenthings",
)
MODULES = ("backpack", "curvlinops", "laplace", "nngeometry", "asdl", "opacus", "hessian_eigenthings")
SKIP = "`python -m benchmarks --no-peers` measures without them."


def python_with_peers() -> Path:
    """The interpreter of the peers' environment. It borrows torch from the one that runs now, so that all compute with
    the same torch and 5 GB are not installed twice."""
    python = HOME / "venv" / "bin" / "python"
    ready = HOME / "venv" / ".ready"
    torch_at = sysconfig.get_path("purelib")
    if ready.exists() and not os.access(python, os.X_OK):
        sys.exit(f"{python} does not run any more. Delete {HOME / 'venv'} to set the peers up again; or {SKIP}")
    if not ready.exists():
        print("Setting up the peers (once) in .benchmarks/venv ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME / "venv")], check=True)
        _borrow(python, torch_at)
        done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS, "matplotlib"])
        if done.returncode:
            sys.exit(f"The peers could not be installed; pip says why above. {SKIP}")
        ready.write_text(torch_at)
    elif ready.read_text() not in ("", torch_at):  # another environment's torch than at first: nothing to install
        _borrow(python, torch_at)
        ready.write_text(torch_at)
    return python


def _borrow(python: Path, torch_at: str) -> None:
    own = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    Path(own, "torch_of_the_project.pth").write_text(torch_at + "\n")


def rerun_with_peers() -> None:
    """Start over in the peers' environment, unless this is it already."""
    if os.environ.get("TORCH_CURVATURE_BENCHMARKS") == "1":
        return
    python = python_with_peers()
    environment = {**os.environ, "TORCH_CURVATURE_BENCHMARKS": "1", "PYTHONPATH": str(ROOT)}
    os.chdir(ROOT)
    os.execve(python, [str(python), "-W", "ignore", "-m", "benchmarks", *sys.argv[1:]], environment)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", *PEERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
