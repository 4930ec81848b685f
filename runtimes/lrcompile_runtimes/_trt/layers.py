"""The layers that an engine really has, and the types they compute in: from the inspector's JSON or from the builder's log."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# What the libraries call a type, in three places, and what ONNX calls it.
_TYPES = {
    "float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bf16": "bfloat16",
    "bfloat16": "bfloat16", "fp8": "float8", "fp4": "float4", "int64": "int64", "int32": "int32", "int8": "int8",
    "int4": "int4", "uint8": "uint8", "bool": "bool",
}  # fmt: skip

_NARROW = frozenset({"float16", "bfloat16", "float8", "float4"})

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], (?:Constants: \[.*?\], )?"
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<rest>.*)$",
    re.M,
)
_TENSOR_TYPE = re.compile(r"Data[Tt]ype: (\w+)")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True, slots=True)
class Layer:
    """origins: names of the ONNX nodes that it computes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    origins: tuple[str, ...] = ()

    @property
    def types(self) -> frozenset[str]:
        return frozenset((*self.inputs, *self.outputs))

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(self.inputs) or 'nothing'} -> {', '.join(self.outputs) or 'nothing'}"


def type_name(text: str) -> str:
    """``Half``, ``HALF`` and ``Row major linear FP16 format`` are float16."""
    words = re.findall(r"[A-Za-z]+\d*", text.lower())
    return next((_TYPES[word] for word in words if word in _TYPES), text.lower())


def from_log(text: str) -> tuple[Layer, ...]:
    """Layers of what a builder that is asked for details prints when it is done."""
    return tuple(
        Layer(
            match["name"],
            match["kind"],
            tuple(map(type_name, _TENSOR_TYPE.findall(match["inputs"]))),
            tuple(map(type_name, _TENSOR_TYPE.findall(match["outputs"]))),
            tuple(_ORIGIN.findall(match["rest"])),
        )
        for match in _LAYER.finditer(text)
    )


def from_json(text: str) -> tuple[Layer, ...]:
    """Layers of an `EngineInspector`'s JSON; only names where the engine was built without details."""
    layers = []
    for entry in json.loads(text)["Layers"]:
        if isinstance(entry, str):
            layers.append(Layer(entry, "unknown", (), ()))
            continue
        inputs, outputs = (
            tuple(_tensor_type(tensor) for tensor in entry.get(side, ())) for side in ("Inputs", "Outputs")
        )
        origins = tuple(_ORIGIN.findall(entry.get("Metadata", "")))
        layers.append(Layer(entry["Name"], entry.get("LayerType", "unknown"), inputs, outputs, origins))
    return tuple(layers)


def _tensor_type(tensor: Mapping[str, object]) -> str:
    # one field for format and type up to TensorRT 10, two since
    fields = ("Datatype", "DataType", "Format/Datatype", "Format/DataType")
    return type_name(next((str(tensor[field]) for field in fields if field in tensor), "unknown"))


def kinds(layers: Iterable[Layer]) -> dict[str, int]:
    """How many layers there are of each kind."""
    return dict(sorted(Counter(layer.kind for layer in layers).items()))


def widened(layers: Iterable[Layer], wanted: Mapping[str, frozenset[str]]) -> tuple[Layer, ...]:
    """Layers that touch float32 tensors though the nodes they compute have narrower floats only.

    wanted: types of inputs and outputs of every node in the network, by its name: of a Pad only the integers that say how far are
    under its name. A layer without origins is left out.
    """

    def is_widened(layer: Layer) -> bool:
        if "float32" not in layer.types or not all(name in wanted for name in layer.origins):
            return False
        types = frozenset[str]().union(*(wanted[name] for name in layer.origins))
        return "float32" not in types and bool(types & _NARROW)

    return tuple(filter(is_widened, layers))
