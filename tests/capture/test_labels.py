"""Loss terms of Hugging Face models, from the labels that their own loss counts."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.layers import hf_labels

WORDS, WIDTH, TOLERANCE = 11, 8, 1e-10


@pytest.fixture(autouse=True)
def transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of this name: the classes of transformers are recognized by theirs, so that it need not be installed."""
    PreTrainedModel.__module__ = "transformers.modeling_utils"
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", types.ModuleType("transformers.modeling_utils"))
    yield
    PreTrainedModel.__module__ = __name__


class PreTrainedModel(nn.Module):
    """Stands for the base class of all models of transformers."""

    config: Any = types.SimpleNamespace(is_encoder_decoder=False)


class Attention(nn.Module):
    """Causal, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class TinyForCausalLM(PreTrainedModel):
    """Embedding, norm, attention, MLP and head, with the loss of transformers: the mean over labels that are not -100."""

    def __init__(self, attends: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH) if attends else nn.Identity()
        self.attention = Attention() if attends else None
        self.up, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)
        self.double()

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.attention is not None:
            x = x + self.attention(self.norm(x))
        return torch.tanh(self.up(x))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        logits = self.head(self.hidden(input_ids))
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        result = {"logits": logits}
        if shift_labels is not None:
            result = {"loss": F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten()), **result}
        return result


class TinyForMaskedLM(TinyForCausalLM):
    """Labels at their own positions."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.head(self.hidden(input_ids))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class TinyForSequenceClassification(TinyForCausalLM):
    """One label for each example, from its last position."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.head(self.hidden(input_ids)[:, -1])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Wrapped(nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def batch(examples: int = 6, length: int = 10, share: float = 0.6) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which this share is masked."""
    torch.manual_seed(2)
    tokens = torch.randint(WORDS, (examples, length))
    return tokens, torch.where(torch.rand(examples, length) < share, -100, tokens)


def recorded(model: nn.Module, loss: Any) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Inputs and output gradients of each layer, from hooks of its own."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    ]
    value = loss()
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(value, [out for _, out in seen.values()], retain_graph=True)
    return {name: (x.detach(), g) for (name, (x, _)), g in zip(seen.items(), gradients, strict=True)}, value


def brute_force(x: Tensor, g: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """A over the rows with a gradient, and G of the mean over these terms."""
    g = g.flatten(0, -2)
    kept = (g != 0).any(1)
    if x.is_floating_point():
        rows = torch.cat([x.flatten(0, -2), torch.ones(len(g), 1, dtype=x.dtype)], 1)[kept]
        return rows.T @ rows / len(rows), terms * g.T @ g
    return torch.bincount(x.flatten()[kept], minlength=WORDS).double() / int(kept.sum()), terms * g.T @ g


def run(
    model: nn.Module, *args: Any, compiled: bool = False, **kwargs: Any
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    settings = kwargs.pop("settings", {})
    with KFACPreconditioner(model, **settings) as ours:
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        call(*args, **kwargs)["loss"].backward()
        ours.precondition_()
        return ours.factors(), ours.diagnostics()["loss_terms"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attends", [False, True])
def test_fine_tuning_with_most_labels_masked(attends: bool, compiled: bool) -> None:
    torch.compiler.reset()
    model, (tokens, labels) = TinyForCausalLM(attends), batch()
    terms = int((labels[:, 1:] != -100).sum())
    assert terms < 0.5 * tokens.numel()
    rows, _ = recorded(model, lambda: model(tokens, labels=labels)["loss"])
    found, how = run(model, tokens, labels=labels, compiled=compiled)
    for name, (x, g) in rows.items():
        a, true_g = brute_force(x, g, terms)
        assert relative_error(found[name][0], a) <= TOLERANCE, name
        assert relative_error(found[name][1], true_g) <= TOLERANCE, name
    assert compiled or how == ["labels that the Hugging Face model's own loss counts"]


@pytest.mark.parametrize("attends", [False, True])
def test_the_head_has_the_factors_of_its_packed_batch(attends: bool) -> None:
    """And so have all layers of a model that does not mix positions."""
    model, (tokens, labels) = TinyForCausalLM(attends), batch()
    found, _ = run(model, tokens, labels=labels)
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:]
    kept = targets != -100
    hidden = model.hidden(tokens).detach()[kept]
    with KFACPreconditioner(model.head) as ours:
        F.cross_entropy(model.head(hidden), targets[kept]).backward()
        ours.precondition_()
        for one, packed in zip(found["head"], ours.factors()[""], strict=True):
            assert relative_error(one, packed) <= TOLERANCE
    if attends:
        return
    with KFACPreconditioner(model) as ours:
        F.cross_entropy(model(tokens[kept][:, None])["logits"].flatten(0, 1), targets[kept]).backward()
        ours.precondition_()
        for name, pair in ours.factors().items():
            for one, packed in zip(found[name], pair, strict=True):
                assert relative_error(one, packed) <= TOLERANCE, name


def test_all_rows_if_the_user_says_so() -> None:
    model, (tokens, labels) = TinyForCausalLM(), batch()
    found, _ = run(model, tokens, labels=labels, settings={"rows": "all"})
    rows, _ = recorded(model, lambda: model(tokens, labels=labels)["loss"])
    terms = int((labels[:, 1:] != -100).sum())
    for name in ("up", "head"):
        x, g = (v.flatten(0, 1) for v in rows[name])
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        assert relative_error(found[name][0], x.T @ x / len(x)) <= TOLERANCE
        assert relative_error(found[name][1], terms * g.T @ g) <= TOLERANCE


@pytest.mark.parametrize("how", ["by place", "shifted by the user", "wrapped", "tuple"])
def test_ways_to_pass_labels(how: str) -> None:
    model, (tokens, labels) = TinyForCausalLM(), batch()
    expected, _ = run(model, tokens, labels=labels)
    if how == "by place":
        found, _ = run(model, tokens, None, labels)
    elif how == "shifted by the user":
        found, _ = run(model, tokens, shift_labels=F.pad(labels, (0, 1), value=-100)[..., 1:])
    elif how == "wrapped":
        found, _ = run(Wrapped(model), input_ids=tokens, labels=labels)
        found = {name.removeprefix("base_model."): pair for name, pair in found.items()}
    else:
        found, _ = run(model, input_ids=tokens, labels=labels)
    for name, pair in expected.items():
        assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(found[name], pair, strict=True)), name


def test_labels_that_are_not_shifted() -> None:
    model, (tokens, labels) = TinyForMaskedLM(), batch()
    rows, _ = recorded(model, lambda: model(tokens, labels=labels)["loss"])
    found, _ = run(model, tokens, labels=labels)
    terms = int((labels != -100).sum())
    a, g = brute_force(*rows["head"], terms)
    assert relative_error(found["head"][0], a) <= TOLERANCE
    assert relative_error(found["head"][1], g) <= TOLERANCE


def test_one_label_for_each_example() -> None:
    """Examples whose label does not count are out as a whole, and no others: dead rows of the others stay."""
    model, (tokens, _) = TinyForSequenceClassification(), batch()
    labels = torch.tensor([1, -100, 3, 2, -100, 0])
    kept = labels != -100
    found, _ = run(model, tokens, labels=labels)
    packed, _ = run(model, tokens[kept], labels=labels[kept])
    for name, pair in packed.items():
        for one, other in zip(found[name], pair, strict=True):
            assert relative_error(one, other) <= TOLERANCE, name


def test_micro_batches_with_different_numbers_of_labels() -> None:
    """Each loss divided by the labels of the whole batch, as transformers.Trainer does it."""
    model, (tokens, labels) = TinyForCausalLM(), batch()
    whole, _ = run(model, tokens, labels=labels, settings={"stats_fraction": 1.0})
    total = int((labels[:, 1:] != -100).sum())
    with KFACPreconditioner(model, stats_fraction=1.0) as ours:
        for part in (slice(0, 1), slice(1, 6)):
            own = int((labels[part, 1:] != -100).sum())
            (model(tokens[part], labels=labels[part])["loss"] * own / total).backward()
        ours.precondition_()
        for name, pair in ours.factors().items():
            assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(pair, whole[name], strict=True)), name


def test_two_calls_in_one_backward_pass() -> None:
    """The loss is a sum of two means, whose numbers of terms only the device knows."""
    model, (tokens, labels) = TinyForCausalLM(), batch()
    parts = [slice(0, 2), slice(2, 6)]
    single = [run(model, tokens[part], labels=labels[part])[0] for part in parts]
    with KFACPreconditioner(model) as ours:
        sum(model(tokens[part], labels=labels[part])["loss"] for part in parts).backward()
        ours.precondition_()
        for name, (_, g) in ours.factors().items():
            assert relative_error(g, single[0][name][1] + single[1][name][1]) <= TOLERANCE, name


def test_without_labels_each_token_is_a_term() -> None:
    model, (tokens, _) = TinyForCausalLM(), batch()
    with KFACPreconditioner(model) as ours:
        logits = model(tokens)["logits"]
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        assert all(float(s.counts[1]) == tokens.numel() for s in ours.engine.statistics)
        ours.precondition_()
        assert "tokens" in ours.diagnostics()["loss_terms"][0]


def test_what_the_user_says_comes_first() -> None:
    model, (tokens, labels) = TinyForCausalLM(), batch()
    for loss_terms, expected in (
        (7, 7),
        (lambda args, kwargs, output: (kwargs["labels"] != -100).sum(), int((labels != -100).sum())),
        ("examples", 6),
    ):
        with KFACPreconditioner(model, loss_terms=loss_terms) as ours:
            model(tokens, labels=labels)["loss"].backward()
            assert all(float(s.counts[1]) == expected for s in ours.engine.statistics)


def test_labels_that_are_no_integers_are_examples() -> None:
    class Regression(PreTrainedModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.mse_loss(self.layer(x), labels)}

    model = Regression()
    with KFACPreconditioner(model) as ours:
        model(torch.randn(5, 4), labels=torch.randn(5, 2))["loss"].backward()
        assert float(ours.engine.statistics[0].counts[1]) == 5


@pytest.mark.parametrize(
    ("name", "encodes", "shifts"),
    [
        ("LlamaForCausalLM", False, True), ("GPT2LMHeadModel", False, True), ("LlavaForConditionalGeneration", False, True),
        ("GPT2DoubleHeadsModel", False, True), ("T5ForConditionalGeneration", True, False), ("BertForMaskedLM", False, False),
        ("BertForTokenClassification", False, False), ("BartForCausalLM", False, True),
    ],
)  # fmt: skip
def test_which_models_shift_labels(name: str, encodes: bool, shifts: bool) -> None:
    model = type(name, (PreTrainedModel,), {"config": types.SimpleNamespace(is_encoder_decoder=encodes)})()
    assert hf_labels.shifts_labels(model) == shifts
    assert hf_labels.has_token_labels(model)


def test_other_models_with_labels_are_not_read() -> None:
    """A model of one's own may do anything with them."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.layer(x), labels)

    model = Own()
    with KFACPreconditioner(model) as ours:
        model(torch.randn(5, 4), labels=torch.tensor([0, 1, -100, -100, 2])).backward()
        assert float(ours.engine.statistics[0].counts[1]) == 5
