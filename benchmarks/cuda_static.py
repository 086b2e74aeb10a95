"""What the compiler made of every CUDA kernel: registers, spills, shared memory, occupancy, instructions.

``python -m benchmarks.cuda_static`` compiles csrc/cuda with nvcc for sm_80, sm_90 and sm_120, reads ptxas' report and
the machine code (nvdisasm, in Triton's wheel), and rewrites cuda_static.md. No GPU is needed. Nothing is timed.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "csrc" / "cuda"
REPORT = HERE / "cuda_static.md"
ARCHITECTURES = (80, 90, 120)
TYPES = {"float": "float32", "Tf32": "tf32", "double": "float64", "__nv_bfloat16": "bfloat16", "__half": "float16"}
MULTIPLY = {"HMMA": 64, "DMMA": 8, "FFMA": 1, "DFMA": 1}  # instructions, and how many multiply-adds of a lane each does

# One call of each launcher makes every kernel of a dtype. tf32 is float32 multiplied in TF32: products only.
INSTANCES = """
#include "curvature_block.cuh"
#include "frobenius_inner.cuh"
#include "gauss_newton_block.cuh"
#include "gauss_newton_diagonal.cuh"
#include "gram_by_jacobian.cuh"
#include "jacobian_norms.cuh"
#include "outer.cuh"
using namespace torch_curvature::cuda;
template <class T>
void instances() {
  if constexpr (!std::is_same_v<T, Tf32>) {
    launch_outer<T>(nullptr, nullptr, nullptr, {}, nullptr);
    launch_frobenius_inner<T>({}, {}, nullptr, 0, 0, 0, nullptr, nullptr);
  }
  launch_tile_product(KroneckerProblem<T>{}, nullptr, nullptr);
  launch_tile_product(OwnBlockProblem<T>{}, nullptr, nullptr);
  launch_tile_product(CrossBlockProblem<T>{}, nullptr, nullptr);
  launch_gauss_newton_block<T>({}, nullptr, nullptr);
  launch_gauss_newton_diagonal<T>({}, nullptr, nullptr, nullptr, nullptr);
  launch_jacobian_norms<T>({}, nullptr, nullptr, nullptr);
  launch_jacobian_gram<T>({}, nullptr, false, nullptr, nullptr);
}
"""


@dataclass
class Kernel:
    name: str
    dtype: str
    architecture: int
    registers: int
    spills: int  # bytes stored and loaded
    stack: int
    shared: int
    threads: int
    blocks: int = 0  # resident on a multiprocessor
    occupancy: float = 0.0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    loop: collections.Counter[str] = field(default_factory=collections.Counter)  # of the loop densest in arithmetic

    @property
    def arithmetic(self) -> str:
        """The instruction that does the work of the inner loop."""
        return max(MULTIPLY, key=lambda op: self.loop[op] * MULTIPLY[op])


def toolkit() -> str | None:
    """nvcc, by CUDA_HOME or on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def disassembler() -> str | None:
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(path) if path.exists() else None


def unavailable() -> str | None:
    """Why there can be no report here, or None."""
    if toolkit() is None:
        return "no nvcc"
    if disassembler() is None:
        return "no nvdisasm: neither a CUDA toolkit with it nor Triton is installed"
    return None


def run(*command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, input=stdin)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done


def block_sizes() -> dict[str, int]:
    """Threads of each kernel's block, from its __launch_bounds__ and the constant that names."""
    text = "\n".join(path.read_text() for path in sorted(KERNELS.glob("*.cuh")))
    constants = {name: int(value) for name, value in re.findall(r"\b(k\w+Threads) = (\d+)", text)}
    kernels = re.findall(r"__launch_bounds__\((k\w+Threads)[^)]*\)\s*(\w+)\(", text)
    return {name: constants[threads] for threads, name in kernels}


def compile_type(cpp_type: str, architecture: int, folder: Path) -> tuple[Path, str]:
    source, cubin = folder / "instances.cu", folder / "instances.cubin"
    source.write_text(INSTANCES + f"template void instances<{cpp_type}>();\n")
    flags = ["-std=c++20", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", f"-I{KERNELS}"]
    done = run(str(toolkit()), *flags, str(source), "-o", str(cubin))
    return cubin, done.stderr


def short_name(mangled: str) -> str:
    """A kernel's demangled name without namespaces, arguments and dtype."""
    name = run("c++filt", mangled).stdout.strip().replace("torch_curvature::cuda::", "")
    name = re.sub(r"^void ", "", name)
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            end = i
            break
    name = name[:end]
    name = re.sub(r"\(int\)|\(bool\)", "", name)
    for cpp_type in TYPES:
        name = re.sub(rf"<{cpp_type}, ", "<", name)
        name = re.sub(rf"<{cpp_type}>", "", name)
    return re.sub(r" >", ">", name)


def read_ptxas(log: str, dtype: str, architecture: int) -> dict[str, Kernel]:
    sizes, kernels = block_sizes(), {}
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for mangled, stack, stores, loads, registers, rest in re.findall(pattern, log, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        name = short_name(mangled)
        threads = sizes[re.split(r"[<(]", name)[0]]
        spills = int(stores) + int(loads)
        kernels[mangled] = Kernel(
            name, dtype, architecture, int(registers), spills, int(stack), int(shared[1]) if shared else 0, threads
        )
    return kernels


def read_instructions(cubin: Path, kernels: dict[str, Kernel]) -> None:
    text = run(str(disassembler()), "-c", str(cubin)).stdout
    for part in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        kernel = kernels.get(part.split(",")[0].strip())
        if kernel is None:
            continue
        labels: dict[str, int] = {}
        code: list[tuple[str, str]] = []
        for line in part.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(code)
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", line):
                code.append((found[1], found[2]))
        kernel.counts = count(code)
        bodies = [count(code[first:last]) for first, last in loops(labels, code)]
        dense = [body for body in bodies if body["all"]]
        if dense:
            kernel.loop = max(dense, key=lambda b: sum(b[op] * worth for op, worth in MULTIPLY.items()) / b["all"])


def loops(labels: dict[str, int], code: list[tuple[str, str]]) -> list[tuple[int, int]]:
    found = []
    for i, (operation, rest) in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", rest) if operation.startswith("BRA") else None
        if target and labels.get(target[1], i + 1) <= i:
            found.append((labels[target[1]], i + 1))
    return found


def count(code: list[tuple[str, str]]) -> collections.Counter[str]:
    counts = collections.Counter(operation.split(".")[0] for operation, _ in code)
    counts["all"] = len(code)
    for operation, _ in code:
        base = operation.split(".")[0]
        if base in ("LDG", "STG", "LDS", "STS") and ".128" in operation:
            counts[base + ".128"] += 1
    return counts


def add_occupancy(kernels: list[Kernel], folder: Path) -> None:
    """By NVIDIA's own calculator, cuda_occupancy.h, which needs no GPU."""
    program = folder / "occupancy"
    # An nvcc on PATH may be a wrapper script, so nvcc itself is asked where it lives.
    report = subprocess.run([str(toolkit()), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next(line.split("TOP=", 1)[1].strip() for line in report.splitlines() if "TOP=" in line)
    include = Path(top).resolve() / "include"
    run("g++", "-O1", f"-I{include}", str(HERE / "cuda_occupancy.cpp"), "-o", str(program))
    lines = [f"{k.architecture} {k.registers} {k.shared} {k.threads}" for k in kernels]
    out = run(str(program), stdin="\n".join(lines) + "\n").stdout.split("\n")
    for kernel, line in zip(kernels, out):
        blocks, occupancy = line.split()
        kernel.blocks, kernel.occupancy = int(blocks), float(occupancy)


def measure(architecture: int, types: dict[str, str] = TYPES) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as name:
        folder, kernels = Path(name), []
        for cpp_type, dtype in types.items():
            cubin, log = compile_type(cpp_type, architecture, folder)
            found = read_ptxas(log, dtype, architecture)
            read_instructions(cubin, found)
            kernels += sorted(found.values(), key=lambda k: k.name)
        add_occupancy(kernels, folder)
    return kernels


def share(counts: collections.Counter[str], *operations: str) -> str:
    """Of these memory operations, how many move 128 bits."""
    total = sum(counts[op] for op in operations)
    return f"{sum(counts[op + '.128'] for op in operations)}/{total}" if total else "–"


def row(k: Kernel) -> str:
    global_memory = share(k.counts, "LDG", "STG") + (f" + {k.counts['LDGSTS']} async" if k.counts["LDGSTS"] else "")
    work = k.arithmetic
    loop = f"{k.loop[work]} {work} of {k.loop['all']}" if k.loop[work] else "–"
    cells = [f"`{k.name}`", k.dtype, k.registers, k.spills, k.shared, k.threads, k.blocks, f"{k.occupancy:.0%}"]
    return "| " + " | ".join(str(cell) for cell in [*cells, global_memory, share(k.counts, "LDS", "STS"), loop]) + " |"


HEADER = """# What the compiler made of the CUDA kernels

Written by `python -m benchmarks.cuda_static` with {version}. **Static evidence, not a measurement: these kernels have
not run on a GPU.** Columns: registers a thread; bytes of spills; bytes of static shared memory a block; threads a
block; blocks resident on a multiprocessor and the share of its warps that makes (by NVIDIA's occupancy calculator);
global loads and stores of 128 bits among all in the code (+ asynchronous 128-bit copies to shared memory), shared ones
likewise; and in the loop densest in arithmetic, how many of its instructions multiply and add (HMMA: a tensor-core
product of 16 x 8 x 16, or 16 x 8 x 8 in TF32; DMMA: of 8 x 8 x 4 in float64). dtype tf32 is float32 where torch's own
setting allows TF32. Kernels hold code for aligned and unaligned memory: a share is of the code, not of the accesses
of a run.
"""
NAMES = ["kernel", "dtype", "registers", "spills", "shared", "threads", "blocks", "occupancy"]
NAMES += ["global 128", "shared 128", "inner loop"]


def write(kernels: list[Kernel]) -> None:
    version = run(str(toolkit()), "--version").stdout.strip().splitlines()[-2].split(", ")
    lines = [HEADER.format(version="nvcc " + version[-1].removeprefix("V"))]
    for architecture in ARCHITECTURES:
        lines += [f"\n## sm_{architecture}\n", "| " + " | ".join(NAMES) + " |", "|---" * len(NAMES) + "|"]
        lines += [row(k) for k in kernels if k.architecture == architecture]
    REPORT.write_text("\n".join(lines) + "\n")


def main() -> None:
    if reason := unavailable():
        sys.exit(f"No static report: {reason}.")
    kernels = []
    for architecture in ARCHITECTURES:
        print(f"sm_{architecture} ...", file=sys.stderr, flush=True)
        kernels += measure(architecture)
    write(kernels)
    print(
        f"{len(kernels)} kernels, {sum(k.spills > 0 for k in kernels)} with spills: {REPORT.relative_to(HERE.parent)}"
    )


if __name__ == "__main__":
    main()
