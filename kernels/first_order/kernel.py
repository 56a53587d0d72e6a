"""SGD with momentum or AdamW for many parameters in one launch; those whose gradient is not finite stay as they are."""

from __future__ import annotations

from ..runtime import tl, triton


@triton.jit(do_not_specialize=["parameters"])
def factors_kernel(
    table,  # int64 (parameters,): address of each parameter's counter of steps, float32
    rates,  # float64 (1,): learning rate
    constants,  # float64 (3,): beta1, beta2, weight decay
    factors,  # float32 (parameters, 4), written: steps with this one, rate, root, factor of the weight decay
    parameters,
    ADAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What depends on the number of steps. In double precision: one minus a power near one would lose digits in single."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < parameters
    steps = tl.load(tl.load(table + at, mask=inside, other=0).to(tl.pointer_type(tl.float32)), mask=inside, other=0.0) + 1.0
    rate = tl.load(rates)
    root, count = tl.full((BLOCK,), 1.0, tl.float64), steps.to(tl.float64)
    scaled = tl.full((BLOCK,), 1.0, tl.float64) * rate
    if ADAM:
        scaled = rate / (1.0 - tl.exp2(count * tl.log2(tl.load(constants))))
        root = tl.sqrt(1.0 - tl.exp2(count * tl.log2(tl.load(constants + 1))))
    tl.store(factors + at * 4, steps, mask=inside)
    tl.store(factors + at * 4 + 1, scaled.to(tl.float32), mask=inside)
    tl.store(factors + at * 4 + 2, root.to(tl.float32), mask=inside)
    decay = tl.full((BLOCK,), 1.0, tl.float64) - rate * tl.load(constants + 2)
    tl.store(factors + at * 4 + 3, decay.to(tl.float32), mask=inside)


@triton.jit
def _move(
    parameter, gradient, first, second, size, start, step, rate, root, decay, weight, other, eps,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A share of one parameter. ALIGNED: addresses are multiples of 16, and the number of elements of 8."""
    if ALIGNED:  # with these hints, copies are 16 bytes wide
        parameter, gradient, size = tl.multiple_of(parameter, 16), tl.multiple_of(gradient, 16), tl.multiple_of(size, 8)
        first, second = tl.multiple_of(first, 16), tl.multiple_of(second, 16)
    for begin in range(start, size, step):
        at = begin + tl.arange(0, BLOCK)
        inside = at < size
        x = tl.load(parameter + at, mask=inside).to(tl.float32) * decay
        along = tl.load(gradient + at, mask=inside).to(tl.float32)
        if MAXIMIZE:
            along = -along
        if ADAM:
            mean = tl.load(first + at, mask=inside).to(tl.float32)
            square = tl.load(second + at, mask=inside).to(tl.float32)
            mean += weight * (along - mean)
            square += other * (along * along - square)
            x -= rate * mean / (tl.sqrt(square) / root + eps)
            tl.store(first + at, mean.to(DTYPE), mask=inside)
            tl.store(second + at, square.to(DTYPE), mask=inside)
        else:
            if MOMENTUM:
                mean = weight * tl.load(first + at, mask=inside).to(tl.float32) + along
                tl.store(first + at, mean.to(DTYPE), mask=inside)
                along = along + weight * mean if NESTEROV else mean
            x -= rate * along
        tl.store(parameter + at, x.to(DTYPE), mask=inside)


@triton.jit
def move_kernel(
    table,  # int64 (parameters, 7): addresses of a parameter, its gradient, the two tensors of its state and its counter;
    # number of elements; whether these allow wide copies
    factors,  # float32 (parameters, 4), see `factors_kernel`
    finite,  # uint8 (parameters,)
    weight, other, eps,  # of the moving averages: 1 - beta1 and 1 - beta2, or the momentum
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """A share of one parameter with a finite gradient, and its counter; the others are not even read."""
    number = tl.program_id(0)
    if tl.load(finite + number) == 0:
        return
    row, own = table + number * 7, factors + number * 4
    parameter, gradient = tl.load(row).to(tl.pointer_type(DTYPE)), tl.load(row + 1).to(tl.pointer_type(DTYPE))
    first, second = tl.load(row + 2).to(tl.pointer_type(DTYPE)), tl.load(row + 3).to(tl.pointer_type(DTYPE))
    if tl.program_id(1) == 0:
        tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float32)), tl.load(own))
    size, rate, root, decay = tl.load(row + 5).to(tl.int32), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    start, step = tl.program_id(1) * BLOCK, tl.num_programs(1) * BLOCK
    if tl.load(row + 6) != 0:
        _move(
            parameter, gradient, first, second, size, start, step, rate, root, decay, weight, other, eps,
            ADAM, MOMENTUM, NESTEROV, MAXIMIZE, BLOCK, DTYPE, True,
        )  # fmt: skip
    else:
        _move(
            parameter, gradient, first, second, size, start, step, rate, root, decay, weight, other, eps,
            ADAM, MOMENTUM, NESTEROV, MAXIMIZE, BLOCK, DTYPE, False,
        )  # fmt: skip
