"""SGD with momentum or AdamW for many parameters in one launch; those whose gradient is not finite stay as they are."""

from __future__ import annotations

from ..runtime import tl, triton


@triton.jit(do_not_specialize=["parameters"])
def factors_kernel(
    table,  # int64 (parameters,): address of each parameter's counter of steps, float32
    rates,  # float64 (1,): learning rate
    constants,  # float64 (3,): beta1, beta2, weight decay
    factors,  # float32 (parameters, 4), written: steps with this one, rate, root, factor of the weight decay; if Adam has
    # Nesterov's look ahead, (parameters, 5): the first rate is that of the mean, and the last number that of the gradient
    parameters,
    ADAM: tl.constexpr, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What depends on the number of steps. In double precision: one minus a power near one would lose digits in single."""
    WIDTH: tl.constexpr = 5 if ADAM and NESTEROV else 4
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < parameters
    steps = tl.load(tl.load(table + at, mask=inside, other=0).to(tl.pointer_type(tl.float32)), mask=inside, other=0.0) + 1.0
    rate = tl.load(rates)
    root, count = tl.full((BLOCK,), 1.0, tl.float64), steps.to(tl.float64)
    scaled = tl.full((BLOCK,), 1.0, tl.float64) * rate
    if ADAM:
        scaled = rate / (1.0 - tl.exp2(count * tl.log2(tl.load(constants))))
        root = tl.sqrt(1.0 - tl.exp2(count * tl.log2(tl.load(constants + 1))))
        if NESTEROV:
            scaled *= tl.load(constants)
            beside = tl.full((BLOCK,), 1.0, tl.float64) - tl.load(constants)
            tl.store(factors + at * WIDTH + 4, (rate * beside).to(tl.float32), mask=inside)
    tl.store(factors + at * WIDTH, steps, mask=inside)
    tl.store(factors + at * WIDTH + 1, scaled.to(tl.float32), mask=inside)
    tl.store(factors + at * WIDTH + 2, root.to(tl.float32), mask=inside)
    decay = tl.full((BLOCK,), 1.0, tl.float64) - rate * tl.load(constants + 2)
    tl.store(factors + at * WIDTH + 3, decay.to(tl.float32), mask=inside)


@triton.jit
def _move(
    parameter, gradient, first, second, at, inside, rate, root, decay, beside, keep, gain, keep_square, gain_square, eps,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Some elements of one parameter."""
    x = tl.load(parameter + at, mask=inside).to(tl.float32) * decay
    along = tl.load(gradient + at, mask=inside).to(tl.float32)
    if MAXIMIZE:
        along = -along
    if ADAM:
        mean = keep * tl.load(first + at, mask=inside).to(tl.float32) + gain * along
        square = keep_square * tl.load(second + at, mask=inside).to(tl.float32) + gain_square * along * along
        if NESTEROV:
            x -= (rate * mean + beside * along) / (tl.sqrt(square) / root + eps)
        else:
            x -= rate * mean / (tl.sqrt(square) / root + eps)
        tl.store(first + at, mean.to(DTYPE), mask=inside)
        tl.store(second + at, square.to(DTYPE), mask=inside)
    else:
        if MOMENTUM:
            mean = keep * tl.load(first + at, mask=inside).to(tl.float32) + along
            tl.store(first + at, mean.to(DTYPE), mask=inside)
            along = along + keep * mean if NESTEROV else mean
        x -= rate * along
    tl.store(parameter + at, x.to(DTYPE), mask=inside)


@triton.jit
def move_kernel(
    table,  # int64 (parameters, 7): addresses of a parameter, its gradient, the two tensors of its state and its counter;
    # number of elements; place in the vectors
    factors,  # float32 (all parameters, 4 or 5), see `factors_kernel`
    finite,  # uint8 (all parameters,)
    keep, gain,  # weights of the old and the new in the mean, or the momentum and 1
    keep_square, gain_square, eps,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A share of one parameter with a finite gradient, and its counter; the others are not even read.

    ALIGNED: addresses are multiples of 16. All but the last elements, fewer than eight, are then copied 16 bytes at a time.
    """
    row = table + tl.program_id(0) * 7
    place = tl.load(row + 6)
    if tl.load(finite + place) == 0:
        return
    own = factors + place * (5 if ADAM and NESTEROV else 4)
    parameter, gradient = tl.load(row).to(tl.pointer_type(DTYPE)), tl.load(row + 1).to(tl.pointer_type(DTYPE))
    first, second = tl.load(row + 2).to(tl.pointer_type(DTYPE)), tl.load(row + 3).to(tl.pointer_type(DTYPE))
    size, rate, root, decay = tl.load(row + 5).to(tl.int32), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    beside = tl.load(own + 4) if ADAM and NESTEROV else 0.0
    most = size
    if ALIGNED:
        parameter, gradient = tl.multiple_of(parameter, 16), tl.multiple_of(gradient, 16)
        first, second, most = tl.multiple_of(first, 16), tl.multiple_of(second, 16), tl.multiple_of(size // 8 * 8, 8)
    if tl.program_id(1) == 0:
        tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float32)), tl.load(own))
        if most < size:
            at = most + tl.arange(0, 8)
            _move(
                parameter, gradient, first, second, at, at < size, rate, root, decay, beside, keep, gain, keep_square,
                gain_square, eps, ADAM, MOMENTUM, NESTEROV, MAXIMIZE, DTYPE,
            )  # fmt: skip
    for start in range(tl.program_id(1) * BLOCK, most, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        _move(
            parameter, gradient, first, second, at, at < most, rate, root, decay, beside, keep, gain, keep_square,
            gain_square, eps, ADAM, MOMENTUM, NESTEROV, MAXIMIZE, DTYPE,
        )  # fmt: skip
