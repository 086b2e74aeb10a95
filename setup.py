"""Builds torch_curvature._C: every .cpp under csrc/ and, with a CUDA torch and nvcc, every .cu.

TORCH_CURVATURE_CUDA=0 or =1 overrides the choice of CUDA; TORCH_CUDA_ARCH_LIST chooses its architectures.
"""

import glob
import os
import shutil
import subprocess
import sys

from setuptools import setup

NEEDS_TORCH = (
    "torch_curvature is compiled against the torch that will run it, and no torch can be imported here.\n"
    "pip hides it unless told not to. Run:\n"
    "    pip install torch ninja pybind11 setuptools\n"
    "    pip install . --no-build-isolation\n"
)


def cuda_toolkit() -> str | None:
    """Root of the CUDA toolkit. An nvcc on PATH may be a wrapper script, so nvcc itself is asked where it lives."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if home or not nvcc:
        return home
    report = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("TOP=", 1)[1] for line in report.splitlines() if "TOP=" in line), None)
    return os.path.realpath(top) if top else None


def same_major_version(torch_cuda: str, toolkit: str) -> bool:
    """Kernels of one major version of CUDA do not run beside another's runtime."""
    nvcc = os.path.join(toolkit, "bin", "nvcc")
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if os.path.exists(nvcc) else ""
    return f"release {torch_cuda.split('.')[0]}." in report


def wants_cuda(torch_cuda: str | None, toolkit: str | None) -> bool:
    override = os.environ.get("TORCH_CURVATURE_CUDA")
    possible = torch_cuda is not None and toolkit is not None and same_major_version(torch_cuda, toolkit)
    if override == "1" and not possible:
        sys.exit(f"TORCH_CURVATURE_CUDA=1, but torch.version.cuda={torch_cuda} and the CUDA toolkit is {toolkit}.")
    return possible and override != "0"


def extension() -> dict:
    toolkit = cuda_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit
    try:
        import pybind11
        import torch
    except ImportError:
        # Metadata of a wheel is refused too: pip asks for it first, and would fetch torch before it builds.
        if {"sdist", "egg_info", "clean"} & set(sys.argv):
            return {}
        sys.exit(NEEDS_TORCH)
    from torch.utils import cpp_extension

    cuda = wants_cuda(torch.version.cuda, toolkit)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;12.0+PTX")
    sources = sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp") + cuda * glob.glob("csrc/cuda/*.cu"))
    # 2.13 is the oldest torch whose stable ABI carries all that the kernels call.
    defines = ["-DTORCH_TARGET_VERSION=0x020d000000000000"]
    if cuda:
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        defines += ["-DUSE_CUDA", f'-DTORCH_CURVATURE_CUDA="{torch.version.cuda} for {architectures}"']
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = kind(
        "torch_curvature._C",
        sources,
        include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
        extra_compile_args={
            "cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", *defines],
            "nvcc": ["-O3", "-std=c++20", *defines],
        },
        depends=sorted(glob.glob("csrc/**/*.*h", recursive=True)),
    )
    if (
        "cudart" in module.libraries
    ):  # torch has loaded it already, and not every toolkit puts it where the linker looks
        module.libraries.remove("cudart")
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


setup(**extension())
