# ruff: noqa: E501
"""Faults put into the kernels one at a time. Each must be caught, by the means it names:

values   a result is wrong, or the emulator refuses (deadlock, mask, alignment, copies never waited for)
memory   AddressSanitizer or UndefinedBehaviorSanitizer
races    ThreadSanitizer: right values do not prove that a barrier is there
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    operator: str
    format: str
    caught_by: str
    occurrence: int = 0  # of `old` in the file

    def apply(self, text: str) -> str:
        parts = text.split(self.old)
        if len(parts) < self.occurrence + 2:
            raise ValueError(f"{self.name}: {self.file} has no {self.old!r} number {self.occurrence}")
        at = self.occurrence + 1
        return self.old.join(parts[:at]) + self.new + self.old.join(parts[at:])


F32, F64, BF16, F16, TF32 = "float32", "float64", "bfloat16", "float16", "tf32"
SYNC = "__syncthreads();"

MUTANTS = [
    # barriers
    Mutant("no barrier before a block's partial sums are read", "numbers.cuh", SYNC, "", "frobenius_inner", F32, "races"),
    Mutant("no barrier after a block's sum", "numbers.cuh", SYNC, "", "frobenius_inner", F32, "races", 1),
    Mutant("no barrier between slabs", "tile.cuh", SYNC, "", "kronecker_sum", F32, "races"),
    Mutant("no barrier at the end of a product", "tile.cuh", SYNC, "", "gauss_newton_diagonal", F32, "races", 1),
    Mutant("one buffer instead of two", "tile.cuh", "buffer ^= 1;", "", "kronecker_sum", F32, "races"),
    Mutant("no barrier before split parts are read", "tensor_tile.cuh", SYNC, "", "kronecker_sum", BF16, "races"),
    Mutant("no barrier before split parts are replaced", "tensor_tile.cuh", SYNC, "", "kronecker_sum", BF16, "races", 1),
    Mutant("no barrier before copies are read", "direct_tile.cuh", SYNC, "", "jacobian_gram", BF16, "races"),
    Mutant("no barrier before a stage is copied anew", "direct_tile.cuh", SYNC, "", "jacobian_gram", F16, "races", 1),
    Mutant("no barrier between two tiles", "tile_product.cuh", SYNC, "", "kronecker_sum", F64, "races", 2),
    Mutant("no barrier after the keys", "tile_product.cuh", SYNC, "", "kronecker_sum", F32, "races", 3),
    Mutant("no barrier before results go out", "tile_product.cuh", SYNC, "", "kronecker_sum", F32, "races"),
    Mutant("no barrier before results are replaced", "tile_product.cuh", "if (i + 1 < Tile::kSide) __syncthreads();", "", "curvature_block", F32, "races"),
    Mutant("no barrier before positions are summed", "jacobian_gram.cuh", SYNC, "", "jacobian_gram", F32, "races"),
    Mutant("no barrier between the sums over t and s", "jacobian_gram.cuh", SYNC, "", "jacobian_gram", F32, "races", 2),
    Mutant("no barrier before products are stored", "jacobian_gram.cuh", SYNC, "", "jacobian_gram", TF32, "races", 4),
    # asynchronous copies
    Mutant("wait for one group too few", "direct_tile.cuh", "wait<1>", "wait<2>", "gauss_newton_diagonal", BF16, "values"),
    Mutant(
        "no empty group at the end",
        "direct_tile.cuh",
        "cp_async_commit();  // an empty",
        "if (left > 1) cp_async_commit();  // an empty",
        "gauss_newton_diagonal",
        F16,
        "values",
    ),
    Mutant("copies of rows that are not aligned", "direct_tile.cuh", "if (vector) {", "if (true) {", "jacobian_gram", BF16, "values"),
    Mutant("fragments of a not transposed", "direct_tile.cuh", "ldmatrix_x4<true>(a[i]", "ldmatrix_x4<false>(a[i]", "jacobian_norms", BF16, "values"),
    # tensor cores
    Mutant("half of the depth left out", "tensor_tile.cuh", "k += 2 * kGroup", "k += 4 * kGroup", "kronecker_sum", TF32, "values"),
    Mutant("columns of the wrong depth", "tensor_tile.cuh", "lane / 8 % 2 * kGroup", "lane / 16 * kGroup", "gauss_newton_diagonal", TF32, "values"),
    Mutant("runs put in the wrong place", "tensor_tile.cuh", "[row][k + first]", "[row][k]", "curvature_block", TF32, "values"),
    Mutant("blocks of float64 columns swapped", "tile.cuh", "warp_column() + j * 8 + at", "warp_column() + (j ^ 1) * 8 + at", "kronecker_sum", F64, "values"),
    Mutant("float64 rows of one depth", "tile.cuh", "u[i] = x[k + depth]", "u[i] = x[k]", "jacobian_norms", F64, "values"),
    # warps
    Mutant("half a mask", "numbers.cuh", "__shfl_xor_sync(kFullWarp", "__shfl_xor_sync(0xffffu", "frobenius_inner", F32, "values"),
    Mutant("shuffle in divergent code", "frobenius_inner.cuh", "sum = sum_lanes<Group>(sum);", "if (item < items) sum = sum_lanes<Group>(sum);", "frobenius_inner", F64, "values"),
    # bounds and tails
    Mutant("one element too many", "outer.cuh", "if (e >= total) break;", "if (e > total) break;", "outer", F32, "memory"),
    Mutant("unrolled loads past the end", "frobenius_inner.cuh", "* Group < last; i +=", "* Group <= last; i +=", "frobenius_inner", F32, "memory"),
    Mutant("rows of a tile not clamped", "tile_product.cuh", "row0 + i < p.rows ? row0 + i : p.rows - 1", "row0 + i", "kronecker_sum", F32, "memory"),
    Mutant("quads past the depth", "tile.cuh", "if (k < depth) {", "if (k <= depth) {", "gauss_newton_diagonal", F32, "memory"),
    Mutant("runs past the end", "tile.cuh", "if (vector && left >= Count)", "if (vector)", "jacobian_gram", F32, "memory"),
    Mutant("second terms past the last", "curvature_block.cuh", "oi.second < D", "oi.second <= D", "curvature_block", F32, "memory"),
    Mutant("positions past the last", "jacobian_gram.cuh", "&& position < j.S", "", "jacobian_gram", F32, "memory"),
    Mutant("no tail", "frobenius_inner.cuh", "for (; i < last; i += Group)", "for (; i < first; i += Group)", "frobenius_inner", F32, "values"),
    Mutant("last tile left out", "jacobian_norms.cuh", "t < tiles; ++t", "t < tiles - 1; ++t", "jacobian_norms", F32, "values"),
    Mutant("no grid stride", "launch.cuh", "item += gridDim.x", "item += (items)", "outer", F32, "values"),
    # indices and arithmetic
    Mutant("carry at the wrong column", "outer.cuh", "whole = at >= size;", "whole = at > size;", "outer", F32, "values"),
    Mutant("mirrored indices swapped", "kronecker_sum.cuh", "put(p, j, o, i)", "put(p, i, o, j)", "kronecker_sum", F32, "values"),
    Mutant("rest of the split forgotten", "tensor_tile.cuh", "mma_tiles<typename Format::Number, kBlockRows, kBlockRows>(c, a, b);", "", "gauss_newton_block", BF16, "values", 2),
    Mutant("leading part used twice", "tensor_tile.cuh", "load_columns(b, y[1], k)", "load_columns(b, y[0], k)", "kronecker_sum", BF16, "values"),
    Mutant("upper triangle of split sums", "tile_product.cuh", "if (Problem::kMirrored && r < c) continue;", "", "gauss_newton_block", F32, "values"),
    Mutant("mirrored tiles count once", "jacobian_gram.cuh", "2 * part : part", "part : part", "jacobian_norms", F32, "values"),
    Mutant("pieces not added up", "gauss_newton_block.cuh", "p.add = n > 0", "p.add = false", "gauss_newton_block", F32, "values"),
    Mutant("one triangle written", "curvature_block.cuh", "out.put(r, c, sum), out.put(c, r, sum);", "out.put(r, c, sum);", "curvature_block", BF16, "values"),
    Mutant("biases among the weights", "curvature_block.cuh", "i == last_input", "false", "curvature_block", F32, "values"),
    Mutant("signs of the wrong sample", "gauss_newton_diagonal.cuh", "p.sign + v * p.j.N + n)", "p.sign + v * p.j.N)", "gauss_newton_diagonal", F32, "values"),
]  # fmt: skip
FAST = {  # one of each kind, for the fast set
    "no barrier before a block's partial sums are read",
    "wait for one group too few",
    "half of the depth left out",
    "unrolled loads past the end",
    "mirrored indices swapped",
}
