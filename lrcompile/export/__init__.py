"""Export: a Hugging Face folder, a GGUF file, `file.py:make` or a torch module becomes one ONNX file.

What can be exported, and through what:

1. a transformers model (folder with `config.json`, `*.gguf`, or a `PreTrainedModel` in hand): transformers' own exporter.
   - text decoders: `input_ids`, `attention_mask`, `position_ids`, `past_key_values.N.key|value` ->
     `logits`, `present.N.key|value`; batch, sequence and past are dynamic, a past of length 0 is legal;
   - text encoders: `input_ids`, `attention_mask` (and `token_type_ids` where the model has segments);
   - image encoders: `pixel_values`, dynamic in the batch.
2. any other torch module: `torch.onnx.export(dynamo=True)`, with example inputs, and dynamic where `axes` says so.

Then `names.py` gives nodes, weights and dimensions the names a person knows from the torch module, and the file is
written without times, paths and stack traces: exporting twice gives the same bytes.
torch, transformers and onnxscript are imported inside functions: they are the extra `torch`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lrcompile.errors import LrcompileError, ModelError, PluginError, UsageError
from lrcompile.export import names
from lrcompile.export.hub import (
    Axes,
    example_inputs,
    from_folder,
    from_gguf,
    is_transformers,
    require,
)

if TYPE_CHECKING:
    import torch

__all__ = ["Axes", "export"]

logger = logging.getLogger(__name__)

_DTYPES = ("float32", "float16", "bfloat16", "auto")
_INLINE_LIMIT = (
    1 << 30
)  # above 1 GiB of weights the file gets `NAME.onnx.data` beside it (protobuf ends at 2 GiB)


@dataclass(frozen=True, slots=True)
class _Source:
    """A module in evaluation mode, its example inputs by name, and which of their axes are dynamic."""

    module: Any
    inputs: dict[str, Any]
    axes: Axes


def export(
    model: str | Path | torch.nn.Module,
    output: str | Path,
    *,
    inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    axes: Axes | None = None,
    dtype: str = "float32",
    opset: int | None = None,
) -> Path:
    """Write `model` as ONNX to `output` and return that path; an existing file is replaced.

    model: a Hugging Face folder, a `.gguf` file, `file.py:make`, or a module. `make()` returns the module, or
      `(module, inputs)`, or `(module, inputs, axes)`.
    inputs: example inputs of a module, by name or in the order of its `forward`; transformers models of the kinds
      listed above need none. Sizes of dynamic axes must be at least 2 in them.
    axes: which axes of the inputs are dynamic, and their names.
    dtype: floating type of the weights of a folder or GGUF file: float32, float16, bfloat16, or auto (as stored).
    opset: ONNX opset; by default the exporter's own (20 in torch 2.13).

    Raises PluginError (an optional package is missing), UsageError (no such model, inputs missing) and ModelError
    (torch cannot export it, an axis asked to be dynamic is fixed by the model).
    """
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    require("torch", "onnxscript", "transformers", "transformers.exporters")
    output = Path(output)
    with _quiet():
        source = _source(model, inputs, axes, dtype)
        try:
            exported = _trace(source, opset)
        except LrcompileError:
            raise
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"torch could not export {_describe(model)}: {first}") from error
    names.name_dimensions(exported, source.axes)
    names.name_weights(exported, source.module)
    names.name_nodes(exported)
    names.strip_metadata(exported)
    _save(exported, output)
    return output


# -- where the model comes from ------------------------------------------------------------------------------------


def _source(
    model: Any, inputs: Mapping[str, Any] | Sequence[Any] | None, axes: Axes | None, dtype: str
) -> _Source:
    if isinstance(model, (str, Path)):
        module, made_inputs, made_axes = _load(str(model), dtype)
        inputs, axes = (made_inputs if inputs is None else inputs), (made_axes if axes is None else axes)
    else:
        module = model
    module = module.eval()
    if inputs is None:
        if not is_transformers(module):
            raise UsageError(f"{_describe(model)} needs example inputs: let make() return (module, inputs)")
        inputs, known_axes = example_inputs(module)
        axes = known_axes if axes is None else axes
    if not isinstance(inputs, Mapping):
        inputs = dict(inspect.signature(module.forward).bind(*inputs).arguments)
    return _Source(module, dict(inputs), axes or {})


def _load(model: str, dtype: str) -> tuple[Any, Any, Axes | None]:
    """The module that a path stands for, with inputs and axes where its author gave them."""
    path, colon, function = model.rpartition(":")
    if colon and path.endswith(".py"):
        made = _make(Path(path), function)
        module, made_inputs, made_axes, *_ = (
            (*made, None, None) if isinstance(made, tuple) else (made, None, None)
        )
        return module, made_inputs, made_axes
    if not Path(model).exists():
        raise UsageError(f"{model}: no such file or folder (MODEL is a folder, a .gguf file or file.py:make)")
    if Path(model).is_dir():
        return from_folder(Path(model), dtype), None, None
    if model.endswith(".gguf"):
        return from_gguf(Path(model), dtype), None, None
    raise UsageError(
        f"{model}: cannot export this file; MODEL is a Hugging Face folder, a .gguf file or file.py:make"
    )


def _make(path: Path, function: str) -> Any:
    """Call `function` of the Python file at `path`; its folder is importable meanwhile, as for a script."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    name = f"lrcompile_make_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # holds for every name that ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look their module up there
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        if not callable(make):
            raise UsageError(f"{path} has no function {function!r}")
        return make()
    except LrcompileError:
        raise
    except Exception as error:
        raise PluginError(f"{path}:{function} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))


# -- tracing and writing -----------------------------------------------------------------------------------------------


def _trace(source: _Source, opset: int | None) -> ir.Model:
    """The ONNX model, still with torch's names for nodes, weights and dimensions."""
    import torch

    if (
        unknown := set(source.axes)
        - set(source.inputs)
        - {n for n in source.axes if n.startswith("past_key_values.")}
    ):
        raise UsageError(f"axes name the inputs {sorted(unknown)}, but there are {sorted(source.inputs)}")
    shapes = {
        name: _dynamic(name, value, source.axes)
        for name, value in source.inputs.items()
        if name != "use_cache"
    }
    if is_transformers(source.module):
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset)
        model: ir.Model = OnnxExporter().export(source.module, source.inputs, config=config).program
        names.name_cache(model)
        return model
    with torch.no_grad():
        outputs = source.module(**source.inputs)
        program = torch.onnx.export(
            source.module,
            kwargs=source.inputs,
            input_names=list(source.inputs),
            output_names=list(outputs) if isinstance(outputs, Mapping) else None,
            dynamic_shapes=shapes,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    traced: ir.Model = program.model
    return traced


def _dynamic(name: str, value: Any, axes: Axes) -> Any:
    """torch's description of the dynamic axes of one input: a cache is a flat list of keys and values."""
    import torch

    def free(names: Mapping[int, str]) -> dict[int, Any]:
        return dict.fromkeys(names, torch.export.Dim.AUTO)

    if isinstance(value, torch.Tensor):
        return free(axes.get(name, {}))
    layers = getattr(value, "layers", ())
    return [
        free(axes.get(f"{name}.{i}.{part}", {})) for i in range(len(layers)) for part in ("key", "value")
    ] or None


def _save(model: ir.Model, output: Path) -> None:
    """Write beside the target first, so that a killed export leaves the old file or the new one."""
    weights = (v.const_value for v in model.graph.initializers.values())
    external = sum(tensor.nbytes for tensor in weights if tensor is not None) > _INLINE_LIMIT
    data = f"{output.name}.data" if external else None
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as stage:
        ir.save(model, Path(stage) / output.name, external_data=data, alignment=4096 if external else None)
        for name in filter(None, (data, output.name)):
            (Path(stage) / name).replace(output.parent / name)
    logger.info("wrote %s", output)


# -- surroundings --------------------------------------------------------------------------------------------------------


def _describe(model: Any) -> str:
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the chatter of torch and transformers (prints, warnings, progress) off the user's terminal."""
    import transformers

    noisy = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "transformers")]
    levels = [log.level for log in noisy]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for log in noisy:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(noisy, levels, strict=True):
                log.setLevel(level)
            if bars:
                transformers.utils.logging.enable_progress_bar()
