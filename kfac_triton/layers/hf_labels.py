"""The loss terms of Hugging Face models: the labels that their own loss counts."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, cast

import torch
from torch import Tensor, nn

_IGNORED = -100  # of the labels, in every Hugging Face model
# Models with a loss term for each token. An encoder-decoder model is given the labels of its decoder as they are.
_SHIFTED = re.compile("ForCausalLM|LMHeadModel|LMHead$|DoubleHeadsModel|ForConditionalGeneration")
_NOT_SHIFTED = re.compile("XLNetLMHead|XLMWithLMHead|FlaubertWithLMHead")  # which take the labels of the targets as they are
_BY_TOKEN = re.compile(f"{_SHIFTED.pattern}|ForMaskedLM|ForTokenClassification|ForPreTraining|WithLMHead")
# Models whose labels are the loss terms, but for those that are -100.
_COUNTED = re.compile(f"{_BY_TOKEN.pattern}|ForSequenceClassification|ForImageClassification|ForMultipleChoice")


def is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a model of transformers. By name, because transformers need not be installed."""
    return any(x.__name__ == "PreTrainedModel" and x.__module__.startswith("transformers.") for x in type(module).__mro__)


@functools.lru_cache(maxsize=256)
def _place_of_labels(kind: Any) -> int | None:
    names = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
    return names.index("labels") if "labels" in names else None


def shifts_labels(model: nn.Module) -> bool:
    """Whether the label at position t + 1 is that of the output at position t: of causal language models."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    name = type(model).__name__
    return not encodes and _SHIFTED.search(name) is not None and _NOT_SHIFTED.search(name) is None


def has_token_labels(model: nn.Module) -> bool:
    """Whether the model, or one inside of it (of PEFT), is a Hugging Face model with a loss term for each token."""
    return any(is_hugging_face(x) and _BY_TOKEN.search(type(x).__name__) for x in model.modules())


def count(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """The labels that count in a call of a Hugging Face model: their number, whether some do not, and which do not.

    The last are flags of the examples, and None unless there is one label for each. All are on the device.
    None if there are no labels, or they are no integers (regression, several labels for an example).
    """
    if _COUNTED.search(type(model).__name__) is None:  # CTC, segmentation and others have labels of another meaning
        return None
    given = kwargs.get("shift_labels")
    place = _place_of_labels(cast(Any, type(model)))
    if given is None:
        given = kwargs["labels"] if "labels" in kwargs else None if place is None else dict(enumerate(args)).get(place)
        if isinstance(given, Tensor) and given.dim() > 1 and shifts_labels(model):
            some_out = given.new_ones((), dtype=torch.bool)  # the last position of each sequence has no label
            return (given[..., 1:] != _IGNORED).sum(), some_out, None
    if not isinstance(given, Tensor) or given.is_floating_point() or given.dim() == 0:
        return None
    counted = given != _IGNORED
    return counted.sum(), ~counted.all(), ~counted if counted.dim() == 1 else None
