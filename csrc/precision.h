// What the user has asked of torch about the precision of products.
#pragma once

namespace torch_curvature {

// Whether float32 products on CUDA may be taken in TF32: torch.backends.cuda.matmul.fp32_precision is "tf32" (which
// allow_tf32 and set_float32_matmul_precision set, too). The stable ABI does not carry that setting: Python is asked,
// at every call, under its lock. No without Python.
bool tf32_allowed();
}  // namespace torch_curvature
