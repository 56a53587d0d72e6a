"""Benchmarks are read beside the benchmarks: this brings their page into the site, and turns the links to it."""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files

SOURCE, PAGE = "benchmarks/README.md", "benchmarks.md"


def on_files(files: Files, config: Any) -> Files:
    """Adds the page."""
    files.append(File.generated(config, PAGE, abs_src_path=SOURCE))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and what is beside it, as they are in the site."""
    if page.file.src_uri == PAGE:
        return markdown.replace("](../docs/", "](").replace("](../README.md)", "](index.md)")
    return markdown.replace(f"](../{SOURCE}", f"]({PAGE}")
