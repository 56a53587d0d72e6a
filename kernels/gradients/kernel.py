"""Copies between the gradients or updates of many parameters, in their layouts, and stacks of padded matrices."""

from __future__ import annotations

from ..runtime import tl, triton


@triton.jit
def _piece(entry, addresses, rows, columns, DTYPE: tl.constexpr):
    """Addresses of the elements of a piece (see `gather_kernel`) at these places of its matrix, and whether it has them."""
    height, width = tl.load(entry + 4).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    i, j = rows - tl.load(entry + 6).to(tl.int32), columns - tl.load(entry + 7).to(tl.int32)
    inside = ((i >= 0) & (i < height))[:, None] & ((j >= 0) & (j < width))[None, :]
    tensor = tl.load(addresses + tl.load(entry)).to(tl.pointer_type(DTYPE)) + tl.load(entry + 1)
    i, j = i.to(tl.int64) * tl.load(entry + 2), j.to(tl.int64) * tl.load(entry + 3)
    return tensor + i[:, None] + j[None, :], inside


@triton.jit
def gather_kernel(
    addresses,  # int64 (gradients,)
    table,  # int64 (matrices, 19): address of a matrix, its rows and columns, and two pieces of it, empty ones included, each:
    # number of its gradient, offset and strides in it, rows and columns, row and column where it begins in the matrix
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some tiles of a float32 matrix, whose elements lie side by side: gradients of type DTYPE where it has any, else zero."""
    entry = table + tl.program_id(0) * 19
    matrix, m, n = (
        tl.load(entry).to(tl.pointer_type(tl.float32)),
        tl.load(entry + 1).to(tl.int32),
        tl.load(entry + 2).to(tl.int32),
    )
    across = tl.cdiv(n, BLOCK_N)
    for tile in range(tl.program_id(1), tl.cdiv(m, BLOCK_M) * across, tl.num_programs(1)):
        rows = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
        first, in_first = _piece(entry + 3, addresses, rows, columns, DTYPE)
        second, in_second = _piece(entry + 11, addresses, rows, columns, DTYPE)
        values = tl.where(in_second, tl.load(second, mask=in_second, other=0.0), tl.load(first, mask=in_first, other=0.0))
        place = matrix + rows.to(tl.int64)[:, None] * n + columns[None, :]
        tl.store(place, values.to(tl.float32), mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def inner_kernel(
    table,  # int64 (matrices, 3): addresses of W and V, both float32, number of elements
    partials,  # float32 (3, matrices, shares), written
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A share of <V, W>, <W, W> and <V, V>. ALIGNED: addresses are multiples of 16, and numbers of elements of 4."""
    entry = table + tl.program_id(0) * 3
    w, v = tl.load(entry).to(tl.pointer_type(tl.float32)), tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    size = tl.load(entry + 2).to(tl.int32)
    if ALIGNED:  # with these hints, copies are 16 bytes wide
        w, v, size = tl.multiple_of(w, 16), tl.multiple_of(v, 16), tl.multiple_of(size, 4)
    product, gradient = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    update = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x, y = tl.load(w + at, mask=at < size, other=0.0), tl.load(v + at, mask=at < size, other=0.0)
        product += x * y
        gradient += x * x
        update += y * y
    place = partials + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    row = tl.num_programs(0) * tl.num_programs(1)
    tl.store(place, tl.sum(product, 0))
    tl.store(place + row, tl.sum(gradient, 0))
    tl.store(place + 2 * row, tl.sum(update, 0))


@triton.jit
def scatter_kernel(
    addresses,  # int64 (updates,)
    table,  # int64 (pieces, 11): as those of `gather_kernel`, of updates; address of the matrix, and its columns; flag
    scale,  # float32 (1,)
    zeros,  # uint8 (flags,)
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some tiles of a piece of an update of type DTYPE: scale times what is in the float32 matrix, or zero by the flag."""
    entry = table + tl.program_id(0) * 11
    height, width = tl.load(entry + 4).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    matrix, n = tl.load(entry + 8).to(tl.pointer_type(tl.float32)), tl.load(entry + 9)
    factor, moves = tl.load(scale), tl.load(zeros + tl.load(entry + 10)) == 0
    across = tl.cdiv(width, BLOCK_N)
    for tile in range(tl.program_id(1), tl.cdiv(height, BLOCK_M) * across, tl.num_programs(1)):
        rows = tl.load(entry + 6).to(tl.int32) + tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tl.load(entry + 7).to(tl.int32) + tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
        update, inside = _piece(entry, addresses, rows, columns, DTYPE)
        place = matrix + rows.to(tl.int64)[:, None] * n + columns[None, :]
        values = tl.load(place, mask=inside & moves, other=0.0) * factor
        tl.store(update, tl.where(moves, values, 0.0).to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["weights"])
def clip_kernel(
    products,  # float32 (matrices,): <V, W>
    rates,  # float32 (weights,)
    members,  # int32 (weights, MEMBERS): the matrices of each weight, then -1
    places,  # int64 (matrices,): where each is in dropped
    kl_clip,  # float, infinite for no bound
    scale,  # float32 (1,), written
    finite,  # uint8 (weights,), written
    zeros,  # uint8 (matrices,), written
    dropped,  # int64, counted up
    weights,
    MEMBERS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the scale nu, and which weights and matrices have products that are not finite.

    The sum goes through the weights in order, so that it does not depend on the device.
    """
    total = tl.zeros((BLOCK_W,), tl.float32)
    for first in range(0, weights, BLOCK_W):
        weight = first + tl.arange(0, BLOCK_W)
        rate = tl.load(rates + weight, mask=weight < weights, other=0.0)[:, None]
        bad, own = tl.zeros((BLOCK_W,), tl.int32), tl.zeros((BLOCK_W,), tl.float32)
        for start in range(0, MEMBERS, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (weight < weights)[:, None] & (k < MEMBERS)[None, :]
            member = tl.load(members + weight[:, None] * MEMBERS + k[None, :], mask=inside, other=-1)
            product = tl.load(products + member, mask=member >= 0, other=0.0)
            broken = (product * 0.0 != 0.0).to(tl.int32)  # infinity times zero is a NaN, too
            place = dropped + tl.load(places + member, mask=member >= 0, other=0)
            tl.store(place, tl.load(place, mask=member >= 0, other=0) + broken, mask=member >= 0)
            term = rate * rate * product
            own += tl.sum(tl.where(term * 0.0 == 0.0, term, 0.0), 1)
            bad += tl.sum(broken, 1)
        total += tl.where(bad == 0, own, 0.0)
        tl.store(finite + weight, (bad == 0).to(tl.uint8), mask=weight < weights)
        for start in range(0, MEMBERS, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (weight < weights)[:, None] & (k < MEMBERS)[None, :]
            member = tl.load(members + weight[:, None] * MEMBERS + k[None, :], mask=inside, other=-1)
            tl.store(zeros + member, tl.broadcast_to((bad != 0).to(tl.uint8)[:, None], (BLOCK_W, BLOCK_K)), mask=member >= 0)
    bound = tl.maximum(tl.sum(total, 0), 1.1754943508222875e-38)  # the smallest normal number: nothing is divided by zero
    tl.store(scale, tl.minimum(1.0, tl.sqrt(kl_clip / bound)))
