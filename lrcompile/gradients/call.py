"""What an operator's function knows of its node."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

Tensor = Any  # torch's, which has no types here


class Call:
    """A node, its attributes' values, its opset, and how many outputs are asked for."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.node, self.opset = node, opset
        self.outputs = len(node.outputs)
        while self.outputs > 1 and not node.outputs[self.outputs - 1].name:
            self.outputs -= 1

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute's value; lists as Python's."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        return list(attribute.value) if isinstance(attribute.value, (list, tuple)) else attribute.value


def axes_of(o: Call, given: Tensor = None, name: str = "axes") -> list[int]:
    """Numbers that are an input in newer opsets and an attribute in older ones; none when neither is there."""
    if given is not None:
        return [int(n) for n in given.reshape(-1).tolist()]
    return [int(n) for n in o.get(name, ())]
