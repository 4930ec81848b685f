"""Polygraphy without torch.

Polygraphy asks of every array whether it is one of torch's, and imports torch to know: two seconds and 200 MB in every compile, wherever
torch happens to be installed. As long as nobody has imported torch, no array is one of its tensors.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Let ``import torch`` fail inside, unless torch is in the process already. Polygraphy remembers nothing of it."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
