"""Report: one HTML file that a person reads, made from the manifest alone.

It needs no script, no network and no other file; equal manifests give equal bytes. `view` says what is worth saying, `pictures`
`curve` and `families` draw, `report.html.j2` and `style.css` set it out, `text` writes numbers and strange names. Everything is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lrcompile.report.curve import tradeoff_file
from lrcompile.report.families import families_file
from lrcompile.report.text import breakable, clean, cosine, count, figure, percent, short
from lrcompile.report.view import view

__all__ = ["families_file", "render", "tradeoff_file"]


def render(document: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The page for a manifest (`lrcompile.json`; its `files` are not read: the page is one of them).

    notes: sentences about this run which the manifest has no place for. Where the manifest holds a `config` (what `config.yaml`
    says), the page also tells what was asked for and whether a limit was set; where it holds a `tradeoff`, what else was tried.
    """
    return _page().render(view=view(document, notes), document=document)


@cache
def _page() -> Template:
    """Compiled once: that takes as long as all the rest of the page."""
    page = Environment(
        loader=PackageLoader("lrcompile.report", ""), autoescape=True, finalize=clean, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    page.filters.update(
        cosine=cosine, count=count, figure=figure, percent=percent, short=short, breakable=breakable
    )
    return page.get_template("report.html.j2")
