"""README and docs: every Python block runs, every file and option that they name exists, and none is missing."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfac_triton
from kfac_triton import KFAC, KFACAdam, KFACPreconditioner, cli
from kfac_triton.engine import Engine
from kfac_triton.kernels import ops
from kfac_triton.layers import LAYER_TYPES
from kfac_triton.presets import preset

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LINKED = [*PAGES, ROOT / "benchmarks" / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]
# Blocks that need other packages than the tests do.
SLOW = {"docs/trainers.md"}
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _blocks(page: Path) -> list[str]:
    """Python blocks, each below as many empty lines as it has lines above it: errors name the line of the page."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


def _pages(pages: list[Path]) -> list[Any]:
    return [pytest.param(x, id=_name(x), marks=[pytest.mark.slow] if _name(x) in SLOW else []) for x in pages]


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = list(LAYER_TYPES)
    yield
    LAYER_TYPES[:] = before


def _given() -> dict[str, Any]:
    """What a reader has already: a model, data, a loss, and an optimizer that has taken a step."""
    torch.manual_seed(0)
    layers = {"encoder": nn.Linear(4, 6), "activation": nn.Tanh(), "decoder": nn.Linear(6, 3)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    loss_function = nn.CrossEntropyLoss()
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    optimizer = KFAC(model)
    loss = loss_function(model(x), y)
    loss.backward()
    optimizer.step()
    names = {"model": model, "loader": [(x, y)] * 2, "loss_function": loss_function, "loss": loss, "optimizer": optimizer}
    return {**names, "others": list(layers["decoder"].parameters())}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("page", _pages([page for page in PAGES if _blocks(page)]))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page. Each has a new model and optimizer, and what blocks above it imported and defined."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in _blocks(page):
        given = _given()
        names.update(given)
        exec(compile(block, str(page), "exec"), names)
        for value in (given["optimizer"], names.get("optimizer"), names.get("preconditioner")):
            if isinstance(value, KFAC | KFACPreconditioner):
                value.close()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_code_fits_the_page_and_columns_have_names(page: Path) -> None:
    """The site clips lines of code beyond some 80 characters."""
    fence, wide, unnamed = "", [], []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fence = "" if fence else line
        elif fence and len(line) > 78:
            wide.append(line)
        elif not fence and re.match(r"\|\s*\|.*\|$", line):
            unnamed.append(line)
    assert wide == []
    assert unnamed == []


@pytest.mark.parametrize("page", LINKED, ids=_name)
def test_pages_keep_the_preconditioner(page: Path) -> None:
    """`attach` returns a handle: `preconditioner = KFACPreconditioner(...).attach(...)` would lose the preconditioner."""
    assert re.findall(r"KFACPreconditioner\([^`]*?\)\s*\.attach", page.read_text()) == []


def test_the_citation_has_the_version() -> None:
    assert f"version = {{{kfac_triton.__version__}}}" in (ROOT / "README.md").read_text()


def test_pages_have_blocks() -> None:
    with_blocks = {page.name for page in PAGES if _blocks(page)}
    assert with_blocks >= {"README.md", "index.md", "curvature.md", "layers.md", "coming_from.md", "damping.md"}
    assert with_blocks >= {"troubleshooting.md", "checkpoints.md", "mixed_precision.md", "losses.md", "adam.md", "which.md"}


# Of the recipes in docs/losses.md: a word of the block -> rows of A and loss terms of the first and the last layer in a step.
COUNTS: dict[str, list[list[float]]] = {
    "own_terms": [[4, 3], [4, 3]],
    "pinn()": [[96, 96], [32, 32]],
    'lr="auto"': [[96, 96], [32, 96]],
    "potential": [[32, 32], [32, 32]],
    "tagger": [[24, 24], [24, 24]],
    "classifier": [[25, 25], [25, 25]],
    "for_critic": [[32, 32], [32, 32]],
    "ActorCritic(": [[64, 64], [64, 64]],
    "fisher_loss": [[64, 64], [64, 64]],
    "policy": [[16, 16], [16, 16]],
    "looped": [[40, 8], [8, 8]],
    "learner": [[40, 40], [40, 40]],
    "attacked": [[8, 8], [8, 8]],
}


@pytest.mark.filterwarnings("error::UserWarning")
def test_recipes_for_losses_take_the_statistics_that_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[float]]] = []
    update = Engine._update_factors

    def counted(engine: Engine) -> None:
        seen.append([engine.statistics[place].counts.tolist() for place in (0, -1)])
        update(engine)

    monkeypatch.setattr(Engine, "_update_factors", counted)
    blocks, names = _blocks(ROOT / "docs" / "losses.md"), {}
    assert len(blocks) == len(COUNTS)
    for block, (word, expected) in zip(blocks, COUNTS.items(), strict=True):
        assert word in block
        names.update(_given())
        seen.clear()
        exec(block, names)
        assert seen[0] == expected, word
        assert all(counts == seen[0] for counts in seen) or word == "for_critic"


def _options(text: str, head: str) -> list[tuple[str, list[Any]]]:
    """Names and defaults in tables whose first column has this head: one value each, or none where the cell is empty."""
    result: list[tuple[str, list[Any]]] = []
    for table in re.findall(rf"^\| {head} \| default \|.*\n\|[-|:]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        for line in table.splitlines():
            cells = line.strip("|").split("|")
            names = re.findall(r"`(\w+)`", cells[0])
            values = ast.literal_eval(f"[{cells[1].replace('`', '')}]")
            assert len(values) in {0, 1, len(names)}, line
            result += [(name, values if len(values) < 2 else [values[i]]) for i, name in enumerate(names)]
    return result


def _own_defaults(optimizer: Any) -> dict[str, Any]:
    parameters = inspect.signature(optimizer).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_every_option_is_in_one_table_with_its_default() -> None:
    found, expected = _options((ROOT / "docs" / "options.md").read_text(), "option"), _own_defaults(KFAC)
    options = dict(found)
    assert sorted(name for name, _ in found) == sorted(expected)
    assert {name: [expected[name]] for name in options if options[name]} == {k: v for k, v in options.items() if v}
    assert [name for name in options if not options[name]] == ["skip", "include"]  # () and "*"


def test_every_argument_of_kfac_adam_is_in_its_table_with_its_default() -> None:
    """In the order of the signature. What it passes on to `KFAC` is in the tables of that."""
    found = _options((ROOT / "docs" / "adam.md").read_text(), "argument")
    assert found == [(name, [default]) for name, default in _own_defaults(KFACAdam).items()]


def test_what_kfac_adam_takes_of_kfac_is_on_its_page() -> None:
    """It has each argument of `KFAC` under this or another name, or refuses it; the page names those that it passes on."""
    text = (ROOT / "docs" / "adam.md").read_text()
    named = set(re.findall(r"`(\w+)`", text.partition("\nOther arguments are those of")[2].partition(". `loss_terms` and")[0]))
    model, passed = nn.Linear(2, 2), set()
    for name, default in _own_defaults(KFAC).items():
        if name in _own_defaults(KFACAdam):
            continue
        with contextlib.suppress(TypeError):
            KFACAdam(model, **{name: default}).close()
            passed.add(name)
    assert named - {"KFAC"} == passed


@pytest.mark.parametrize("page", LINKED, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.is_file(), target
        if anchor and other.parent.name != "api":  # whose anchors the strict build checks
            assert anchor in _anchors(other), target


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=_name)
def test_files_targets_and_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths from the top of the repository, bare names of sources in the text, `make` targets and `kfac-triton` commands."""
    code = CODE.findall(page.read_text())
    words = [word for span in code for word in re.findall(r"[\w./<>-]+", span)]
    paths = [word for word in words if re.match(r"(?:tests|docs|benchmarks|kfac_triton|kernels)/", word) and "<" not in word]
    missing = [path for path in paths if not (ROOT / path).exists()]
    sources = {file.name for top in ("kfac_triton", "kernels", "benchmarks", "tests") for file in (ROOT / top).rglob("*.py")}
    bare = re.findall(r"`(\w+\.py)\b", page.read_text())
    missing += [name for name in bare if name not in sources]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing += [name for span in code for name in re.findall(r"\bmake ([a-z-]+)", span) if name not in targets]
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)
    assert commands is not None
    known = commands[1].split(",")
    missing += [name for span in code for name in re.findall(r"\bkfac-triton (\w+)", span) if name not in known]
    assert missing == []


def test_the_site_has_every_page() -> None:
    """And no other, but for the benchmarks' page, which is brought in from beside the docs."""
    pages = re.findall(r"^ +- .*?([\w/]+\.md)$", (ROOT / ".mkdocs.yml").read_text(), re.MULTILINE)
    assert len(pages) == len(set(pages))
    own = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md"}
    assert set(pages) == own | {"benchmarks.md"}


def test_the_site_has_what_the_benchmarks_link_to() -> None:
    """Its hook brings benchmarks/README.md and benchmarks/results/ into the site, and changes links to the pages in docs/."""
    page = (ROOT / "benchmarks" / "README.md").read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!http)([^)]+)\)", page) if not link.startswith("#")]
    assert [link for link in links if not link.startswith(("../docs/", "results/")) and link != "../README.md"] == []
    assert [link for link in links if not (ROOT / "benchmarks" / link).exists()] == []


def test_troubleshooting_names_what_there_is() -> None:
    """Each word in code is a key of the diagnostics, an option, an attribute or a method."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with KFAC(model, lr="auto", loss=nn.CrossEntropyLoss()) as optimizer:
        optimizer.step(lambda: (model(torch.randn(8, 4)), torch.randint(3, (8,))))
        report = optimizer.diagnostics()
    options = {*inspect.signature(KFAC).parameters, *inspect.signature(KFACAdam).parameters}
    known = {*report, *report["layers"]["0"], *options, *dir(KFAC)}
    text = re.sub(r"^```.*?^```", "", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    words = [re.match(r'"?(\w+)', span) for span in re.findall(r"`([^`\n]+)`", text)]
    others = {
        "GradScaler",
        "KFAC",
        "KFACAdam",
        "None",
        "backward",
        "ggn",
        "kfac",
        "make",
        "mc",
        "reset_running_stats",
        "tail",
        "torch",
    }
    assert sorted({word[1] for word in words if word is not None} - known - others) == []


def test_docstrings_of_the_reference_are_shown_as_they_are_meant() -> None:
    """Outside code, `<V` would be an HTML tag and not be shown. Only `Examples:` is code, and long lines of it are clipped."""
    reference = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    objects = [_found(path) for path in re.findall(r"^::: (\S+)", reference, re.MULTILINE)]
    members = [
        value
        for owner in objects
        if inspect.isclass(owner) or inspect.ismodule(owner)
        for name, value in inspect.getmembers(owner)
        if name[0] != "_" and str(getattr(value, "__module__", "")).startswith("kfac_triton")
    ]
    assert {KFAC.step, KFAC.factors, preset, ops.precondition} <= {x for x in objects + members if callable(x)}
    examples = 0
    for thing in objects + members:
        text, _, example = (inspect.getdoc(thing) or "").partition("\nExamples:\n")
        assert ">>>" not in text, text
        examples += ">>>" in example
        assert [line for line in example.splitlines() if len(line) > 78 + len("    >>> ")] == []
        plain = re.sub(r"`[^`]*`", "", text)
        assert re.search(r"<[A-Za-z/]", plain) is None, plain
    assert examples >= 6


@pytest.mark.filterwarnings("ignore:CUDA graphs need a GPU:UserWarning")
@pytest.mark.parametrize("module", ["kfac_triton.adam", "kfac_triton.training_graph"])
def test_examples_of_the_reference_run(module: str) -> None:
    """Those of other modules run in the tests of these."""
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def _found(path: str) -> Any:
    """The object of a page's `:::` line; the kernels stand at the top there, where the sources are."""
    names = path.removeprefix("kfac_triton.").split(".")
    for end in range(len(names), -1, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(["kfac_triton", *names[:end]]))
            for name in names[end:]:
                found = getattr(found, name)
            return found
    raise AssertionError(path)
