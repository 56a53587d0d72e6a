"""Small Triton kernels over many tensors at once: lists, found through a table of addresses, and stacks."""

from __future__ import annotations

from ..runtime import tl, triton


@triton.jit
def squares_kernel(
    table,  # int64 (inputs, 3): address of a tensor of type DTYPE, number of its elements, place in partials
    partials,  # float32 (all inputs, shares), written
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A share of the sum of the squares of one tensor, whose elements fill one stretch of memory in any order.

    ALIGNED: addresses are multiples of 16. All but the last elements, fewer than eight, are then read 16 bytes at a time.
    """
    row = table + tl.program_id(0) * 3
    source, size = tl.load(row).to(tl.pointer_type(DTYPE)), tl.load(row + 1)
    most = size
    if ALIGNED:
        source, most = tl.multiple_of(source, 16), tl.multiple_of(size // 8 * 8, 8)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(1).to(tl.int64) * BLOCK, most, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(source + at, mask=at < most, other=0.0).to(tl.float32)
        total += values * values
    result = tl.sum(total, 0)
    if tl.program_id(1) == 0:
        if most < size:
            at = most + tl.arange(0, 8)
            values = tl.load(source + at, mask=at < size, other=0.0).to(tl.float32)
            result += tl.sum(values * values, 0)
    tl.store(partials + tl.load(row + 2) * tl.num_programs(1) + tl.program_id(1), result)


@triton.jit
def blend_kernel(
    table,  # int64 (factors, 4): addresses of a factor and of its sum, both float32; number of elements; place in the vectors
    keep, gain,  # float (factors,)
    accept, summed,  # uint8 (factors,)
    old,  # uint8 (factors,), written
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A share of one accepted factor: factor <- keep factor + gain sum, if there is a sum; sum <- old factor.

    Nothing is read of a factor that is not accepted. ALIGNED: addresses are multiples of 16, and numbers of elements of 4.
    """
    row = table + tl.program_id(0) * 4
    place = tl.load(row + 3)
    if tl.load(accept + place) == 0:
        return
    factor, total = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 2).to(tl.int32)
    if ALIGNED:  # with these hints, copies are 16 bytes wide
        factor, total, size = tl.multiple_of(factor, 16), tl.multiple_of(total, 16), tl.multiple_of(size, 4)
    has_sum = tl.load(summed + place) != 0
    weight, other = tl.load(keep + place).to(tl.float32), tl.load(gain + place).to(tl.float32)
    if tl.program_id(1) == 0:
        tl.store(old + place, 1)
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        before = tl.load(factor + at, mask=at < size)
        if has_sum:  # else it may hold anything
            tl.store(factor + at, weight * before + other * tl.load(total + at, mask=at < size), mask=at < size)
        tl.store(total + at, before, mask=at < size)


@triton.jit
def traces_kernel(
    table,  # int64 (factors, 4): address of a float32 factor, number of elements on its diagonal, their distance, place in out
    out,  # float32 (factors,)
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The trace of one factor."""
    row = table + tl.program_id(0) * 4
    factor, size, stride = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1).to(tl.int32), tl.load(row + 2)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(factor + at * stride, mask=at < size, other=0.0)
    tl.store(out + tl.load(row + 3), tl.sum(total, 0))


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
