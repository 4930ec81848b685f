"""Numbers that people read, and names that may hold anything."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

from markupsafe import Markup, escape

NOTHING = "–"

# What would break a page or turn its reading order around: control characters get their pictures, the rest a mark.
_SAFE = {
    **{i: chr(0x2400 + i) for i in range(0x20)},
    0x7F: "\u2421",
    **dict.fromkeys(
        (*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)), "\ufffd"
    ),
    **dict.fromkeys((*range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd"),
}


def clean(value: Any) -> Any:
    """What the template is about to escape and print: text made harmless, None as a dash, markup of ours as it is."""
    if value is None:
        return NOTHING
    return value if hasattr(value, "__html__") or not isinstance(value, str) else value.translate(_SAFE)


def short(text: str, limit: int = 240) -> str:
    """The text, or its beginning and its end where it is longer than any name that a person would read."""
    head = 2 * limit // 3
    if len(text) <= limit:
        return text
    return f"{text[:head]} … {text[head - limit :]} ({len(text):,} characters)"


def breakable(name: str) -> Markup:
    """A name which the browser may break after a slash or a dot before it breaks it anywhere."""
    return Markup(re.sub(r"([/.]+)(?=\w)", r"\1<wbr>", str(escape(clean(name)))))


def tail(text: str, columns: int) -> str:
    """The end of a name, which tells layers apart, in at most so many columns (wide characters take two)."""
    text = text.translate(_SAFE)
    used = 0
    for i in range(len(text) - 1, -1, -1):
        used += 2 if unicodedata.east_asian_width(text[i]) in "WF" else 1
        if used > columns:
            return f"…{text[i + 2 :]}"
    return text


def count(value: float | None) -> str:
    """A whole number with its thousands apart."""
    return NOTHING if value is None else f"{value:,.0f}"


def figure(value: float | None) -> str:
    """Three digits: 0.0453, 12.3, 4,310, 8.4e-7."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "not a number"
    if value == 0:
        return "0"
    size = abs(value)
    if 1e-3 <= size < 999.5:
        return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}".replace("-", "−")
    if 999.5 <= size < 1e7:
        return f"{value:,.0f}".replace("-", "−")
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−", 1) if value < 0 else f"{mantissa}e{int(exponent)}"


def percent(value: float | None) -> str:
    """A share: 76.2 %, 0.31 %, 8.4e-5 %."""
    return NOTHING if value is None else f"{figure(100 * value)}\u00a0%"


def cosine(value: float | None) -> str:
    """Four digits, or how far below one where they would all be nines."""
    if value is None or not 0.9999 < value < 1:
        return NOTHING if value is None else f"{value:.4f}".replace("-", "−")
    return f"1 − {figure(1 - value)}"


def change(before: float, after: float) -> str:
    """What became of a total, as a signed share of what it was."""
    if before == after:
        return "the same"
    if before == 0:
        return "new"
    share = 100 * (after - before) / before
    return f"{'+' if share > 0 else '−'}{abs(share):,.{1 if abs(share) >= 0.1 else 3}f}\u00a0%"


def in_bytes(value: float) -> str:
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "bytes")


def in_short(value: float) -> str:
    """147 k, 11.7 M."""
    return _scaled(value, (("G", 1e9), ("M", 1e6), ("k", 1e3)), "").strip()


def _scaled(value: float, units: tuple[tuple[str, float], ...], one: str) -> str:
    for name, size in units:
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:,.{2 if scaled < 10 else 1 if scaled < 1000 else 0}f}\u00a0{name}"
    return f"{value:,.0f}\u00a0{one}"
