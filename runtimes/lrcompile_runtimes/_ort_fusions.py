"""Fusions that ONNX Runtime's kernels serve and its own optimizer does not find in graphs from torch's exporter: onnxscript's.

Attention (``Attention``, ``MultiHeadAttention``), norms that add (``SkipLayerNormalization``, ``SkipSimplifiedLayerNormalization``) and
``BiasGelu``, all of domain ``com.microsoft`` with kernels for CPU and CUDA. A root-mean-square norm that nothing is added to is
written in standard operators again: ONNX Runtime fuses these when it loads the file, and the file stays legal ONNX.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from lrcompile.graph import Builder, is_overridable, nodes, opset_of

logger = logging.getLogger(__name__)

_LIBRARIES = ("onnxscript", "onnx_ir")


class TransformerFusions:
    """Fuse attention, norms and GELU, in place. Whatever the library does wrong leaves the model as it was, and is logged."""

    name = "transformer-fusions"

    def __call__(self, model: ir.Model) -> int:
        twin = model.clone()
        try:
            with _quiet():
                counts = _fuse(twin)
        except Exception as error:  # a pattern library raises of all kinds on graphs that it did not expect
            logger.warning(
                "%s: onnxscript failed, the model stays as it was: %s: %s",
                self.name,
                type(error).__name__,
                error,
            )
            logger.debug("%s", self.name, exc_info=True)
            return 0
        if wrong := _damage(model, twin):
            logger.warning("%s: the model stays as it was: %s", self.name, wrong)
            return 0
        logger.info("%s: %s", self.name, ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "nothing")
        if counts:
            _take(model, twin)
        return sum(counts.values())


def _fuse(model: ir.Model) -> dict[str, int]:
    # of optimize_for_ort only this part: the rest makes operators that have no kernel for the CPU (GroupNorm)
    from onnxscript.rewriter.ort_fusions._core import fuse_xformers

    if any(map(is_overridable, model.graph.initializers.values())):
        raise ValueError("a caller may override a weight, which the library would take for a constant")
    opset = opset_of(model)
    metadata = {
        value.name: dict(node.metadata_props) for _, node in nodes(model) for value in node.outputs
    }  # the library drops it from nodes that it makes anew
    fused, counts = fuse_xformers(model)
    if fused is not model:
        raise ValueError("it gave back another model")
    for node in list(model.graph):
        if node.op_type == "SimplifiedLayerNormalization" and not node.domain:
            _spell_out(model, node, opset)
    for _, node in nodes(model):
        for value in node.outputs:
            for key, text in metadata.get(value.name, {}).items():
                node.metadata_props.setdefault(key, text)
        if node.domain == "com.microsoft":
            node.name = node.name or f"{node.outputs[0].name}/{node.op_type}"
            node.metadata_props.setdefault("lrcompile.fusion", "onnxscript.rewriter.ort_fusions")
    return {kind: count for kind, count in counts.items() if count}


def _spell_out(model: ir.Model, node: ir.Node, opset: int) -> None:
    """x / sqrt(mean(x^2) + epsilon) * scale, in the order in which ONNX Runtime looks for it. x computes in float32."""
    x, scale = node.inputs[0], node.inputs[1]
    assert x is not None and scale is not None and node.graph is not None
    if x.dtype is None:
        raise ValueError(f"the type of {x.name} is not known")
    op = Builder(f"{node.outputs[0].name}/rms_norm", {})
    compute, wide = ir.DataType.FLOAT, x
    if narrow := x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        wide = op("Cast", x, name="wide", to=compute)
    else:
        compute = x.dtype
    axis, epsilon = node.attributes.get_int("axis", -1), node.attributes.get_float("epsilon", 1e-5)
    if axis != -1:
        raise ValueError(f"a norm over more than the last axis, from {axis}")
    square = op("Pow", wide, op.constant(np.asarray(2, compute.numpy()), "two"), name="square")
    if opset >= 18:
        mean = op("ReduceMean", square, op.constant(np.array([-1], np.int64), "axis"), name="mean")
    else:
        mean = op("ReduceMean", square, name="mean", axes=[-1])
    shifted = op("Add", mean, op.constant(np.asarray(epsilon, compute.numpy()), "epsilon"), name="shifted")
    y = op("Div", wide, op("Sqrt", shifted, name="root"), name="normalized")
    if narrow:
        y = op("Cast", y, name="narrow", to=x.dtype)
    y = op("Mul", y, scale, name="scaled")
    old = node.outputs[0]
    y.name, y.type, y.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], op.nodes, [old], [y])


def _damage(model: ir.Model, fused: ir.Model) -> str:
    """What would make the fused model another one, or no legal file; empty where nothing would."""
    for what in ("inputs", "outputs"):
        if [_face(v) for v in getattr(model.graph, what)] != [_face(v) for v in getattr(fused.graph, what)]:
            return f"its {what} changed"
    if opset_of(model) != opset_of(fused) or model.ir_version != fused.ir_version:
        return "its opset or IR version changed"
    opset = opset_of(fused)
    for body, node in nodes(fused):
        domain = node.domain or "ai.onnx"
        if domain in ("ai.onnx", "ai.onnx.ml"):
            if domain == "ai.onnx" and not onnx.defs.has(node.op_type, opset, ""):
                return f"{node.op_type} is no operator of opset {opset}"
        elif domain not in body.graph.opset_imports and domain not in fused.graph.opset_imports:
            return f"domain {domain} of {node.op_type} is not imported"
    return ""


def _face(value: ir.Value) -> tuple[str | None, ir.DataType | None, str]:
    return value.name, value.dtype, str(value.shape)


def _take(model: ir.Model, fused: ir.Model) -> None:
    """Let a model have another one's graph and functions."""
    functions = list(fused.functions.values())
    model.graph = fused.graph
    model.functions.clear()
    for function in functions:
        model.functions[function.identifier()] = function


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries print, warn and log is nothing that a user could act on."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        for library in loggers:
            library.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for library, level in zip(loggers, levels, strict=True):
                library.setLevel(level)
            if text := said.getvalue().strip():
                logger.debug("onnxscript: %s", text)
