"""Small Triton kernels over many tensors at once: lists, found through a table of addresses, and stacks."""

from __future__ import annotations

from ..runtime import tl, triton


@triton.jit
def squares_kernel(
    table,  # int64 (programs, 3): address of a tensor of type DTYPE, number of its elements, place in out
    out,  # float32 (inputs,)
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the squares of one tensor, whose elements fill one stretch of memory in any order."""
    row = table + tl.program_id(0) * 3
    source, size = tl.load(row).to(tl.pointer_type(DTYPE)), tl.load(row + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    at = tl.arange(0, BLOCK)
    for _ in range(tl.cdiv(size, BLOCK)):
        values = tl.load(source + at, mask=at < size, other=0.0).to(tl.float32)
        total += values * values
        source += BLOCK
        size -= BLOCK
    tl.store(out + tl.load(row + 2), tl.sum(total, 0))


@triton.jit
def gather_kernel(
    table,  # int64 (layers, 5): addresses of weight (rows, columns) and bias (rows,) of type DTYPE, rows, columns, size of bias
    out,  # float32 (layers, m, n), contiguous
    m, n,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[weight | bias] of one layer into the leading part of its (m, n) block of out, zero where the bias is missing."""
    index = tl.program_id(1)
    entry = table + index * 5
    weight, bias = tl.load(entry).to(tl.pointer_type(DTYPE)), tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    rows, columns, has_bias = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // n, at % n
    inside = (row < rows) & (column < columns)
    values = tl.load(weight + row.to(tl.int64) * columns + column, mask=inside, other=0.0)
    border = (row < tl.minimum(rows, has_bias)) & (column == columns)
    values = tl.where(border, tl.load(bias + row, mask=border, other=0.0), values)
    tl.store(out + index.to(tl.int64) * m * n + at, values.to(tl.float32), mask=at < m * n)


@triton.jit
def blend_kernel(
    factor, total,  # float32 (B, n, n), contiguous
    keep, gain,  # float (B,)
    accept,  # uint8 (B,)
    size,  # n * n
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A share of one matrix of a stack: factor <- keep factor + gain total where accepted; not even read where not."""
    matrix = tl.program_id(1)
    if tl.load(accept + matrix) == 0:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = matrix.to(tl.int64) * size + at
    old = tl.load(factor + place, mask=at < size)
    new = tl.load(total + place, mask=at < size)
    blended = tl.load(keep + matrix).to(tl.float32) * old + tl.load(gain + matrix).to(tl.float32) * new
    tl.store(factor + place, blended, mask=at < size)


@triton.jit
def restore_kernel(
    table,  # int64 (tensors, 4): addresses of a tensor and of its copy, both of type DTYPE, number of elements, place in finite
    finite,  # uint8 (flags,)
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A share of one tensor gets the values of its copy where its flag is zero; nothing is read where it is not."""
    row = table + tl.program_id(0) * 4
    if tl.load(finite + tl.load(row + 3)) != 0:
        return
    tensor, kept = tl.load(row).to(tl.pointer_type(DTYPE)), tl.load(row + 1).to(tl.pointer_type(DTYPE))
    size = tl.load(row + 2)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(tl.cdiv(size, BLOCK * tl.num_programs(1))):
        tl.store(tensor + at, tl.load(kept + at, mask=at < size), mask=at < size)
        at += BLOCK * tl.num_programs(1)
