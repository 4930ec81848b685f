"""The report: one HTML file that a person reads, made from the manifest alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>lrcompile report</title>
<body><h1>{{ verdict }}</h1>
<table>{% for name, o in outputs.items() %}<tr><td>{{ name }}</td><td>{{ o.cosine }}</td><td>{{ o.relative_l2 }}</td></tr>{% endfor %}</table>
<table>{% for s in sites %}<tr><td>{{ s.name }}</td><td>{{ s.method }}</td><td>{{ s.rank }}</td><td>{{ s.reason }}</td></tr>{% endfor %}</table>
{% for n in notes %}<p>{{ n }}</p>{% endfor %}</body></html>
"""


def render(document: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The page for a manifest (`lrcompile.json` without its files)."""
    template = Environment(autoescape=True).from_string(_PAGE)
    evidence = document["evidence"]
    return template.render(verdict=evidence["verdict"], outputs=evidence["outputs"], sites=document["sites"], notes=notes)
