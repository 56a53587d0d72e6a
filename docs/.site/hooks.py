"""The pages of the benchmarks are beside the benchmarks: this adds them to the site, and changes the links to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

SOURCE, PAGE = "benchmarks/README.md", "benchmarks.md"


def on_files(files: Files, config: Any) -> Files:
    """Adds the page, and the results with their pictures and data."""
    files.append(File.generated(config, PAGE, abs_src_path=SOURCE))
    for path in sorted(Path("benchmarks/results").rglob("*.*")):
        files.append(File.generated(config, path.relative_to("benchmarks").as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and what is beside it, as they are in the site."""
    if page.file.src_uri == PAGE:
        return markdown.replace("](../docs/", "](").replace("](../README.md)", "](index.md)")
    return markdown.replace(f"](../{SOURCE}", f"]({PAGE}")
