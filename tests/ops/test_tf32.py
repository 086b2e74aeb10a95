"""When CUDA kernels may multiply float32 in TF32: torch's own setting says so. What they compute then is tested in
tests/cuda_emulator."""

import torch
import torch_curvature._C as extension


def test_the_setting_is_torchs_own():
    matmul = torch.backends.cuda.matmul
    before = torch._C._get_fp32_precision_getter("cuda", "matmul")
    try:
        for value, allowed in (("tf32", True), ("ieee", False)):
            matmul.fp32_precision = value
            assert extension.tf32_allowed() is allowed
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert extension.tf32_allowed() is allowed
        torch.set_float32_matmul_precision("high")
        assert extension.tf32_allowed()
        torch.set_float32_matmul_precision("highest")
        assert not extension.tf32_allowed()
    finally:
        torch._C._set_fp32_precision_setter("cuda", "matmul", before)


def test_tf32_is_off_by_default():
    assert not extension.tf32_allowed()
