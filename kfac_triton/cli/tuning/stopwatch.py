"""Time of one run on a device: events on a GPU, with cold caches, and CUDA graphs where the host would be what is timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_FLUSHED_BYTES = 256 << 20  # several times any second-level cache; and the host gains as much time as this takes to write


class Stopwatch:
    """Seconds of a run, alone on the device, with nothing of its operands in the second-level cache of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds that one run takes."""
        if self._flushed is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            self._flushed.zero_()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def waits_for_host(run: Callable[[], object]) -> bool:
    """Whether a run waits for the device, which a CUDA graph cannot record; it is run once."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], None] | None:
    """A CUDA graph of a run, to be replayed; None where there is no GPU, or the run waits for it.

    The run must have been warmed up: what a first call copies or compiles is not to be captured.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()  # torch.cuda.graph would capture on a stream of the first GPU that was used
        with torch.cuda.stream(stream):
            if waits_for_host(run):  # checked first, because a failed capture leaves the allocator in disorder
                return None
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    return graph.replay
