"""What export knows of transformers models: loading them, and example inputs of each kind.

torch and transformers are imported inside functions: they are the extra `torch`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lrcompile.errors import ModelError, PluginError, UsageError

__all__ = ["Axes", "example_inputs", "from_folder", "from_gguf", "is_transformers", "require"]

Axes = Mapping[str, Mapping[int, str]]
"""Input name -> axis -> name of the dimension, e.g. `{"x": {0: "batch"}}`; all other axes are fixed."""

_BATCH, _SEQUENCE, _PAST = 2, 3, 5  # of example inputs; 0 and 1 would be taken as constants while tracing
_FROM_DISK = {"local_files_only": True, "output_loading_info": True}


def require(*packages: str) -> None:
    """Raise PluginError, with what to install, unless all `packages` can be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            hint = 'pip install "lrcompile[torch]"'
            raise PluginError(f"export needs the package {package}: {hint} ({error})") from error


def from_folder(folder: Path, dtype: str) -> Any:
    """The model in a Hugging Face folder, of the class that its config names."""
    import transformers

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: not a Hugging Face model folder, config.json is missing")
    with _loading(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        names = config.architectures or [""]
        loader = getattr(transformers, names[0], transformers.AutoModel)
        return _complete(folder, loader.from_pretrained(folder, dtype=dtype, **_FROM_DISK))


def from_gguf(path: Path, dtype: str) -> Any:
    """The decoder in a GGUF file, its weights dequantized."""
    require("gguf", "accelerate")
    import transformers

    with _loading(path):
        loader = transformers.AutoModelForCausalLM
        return _complete(
            path, loader.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **_FROM_DISK)
        )


@contextlib.contextmanager
def _loading(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise PluginError(f"{path} needs another package: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: transformers cannot load it: {error}") from error


def _complete(path: Path, loaded: tuple[Any, dict[str, Any]]) -> Any:
    """The model, unless transformers had to invent weights for it, which it does with a warning only."""
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path}: {len(missing)} weights of {type(model).__name__} are missing, such as {missing[0]}"
        )
    return model


def is_transformers(module: Any) -> bool:
    import transformers

    return isinstance(module, transformers.PreTrainedModel)


def example_inputs(module: Any) -> tuple[dict[str, Any], Axes]:
    """Example inputs and dynamic axes of a text decoder, text encoder or image encoder."""
    import torch
    from transformers.exporters.utils import is_multimodal

    config, name = module.config, type(module).__name__
    if config.is_encoder_decoder or is_multimodal(module):
        raise UsageError(
            f"{name} has several parts: write file.py:make that returns (module, inputs, axes) for one"
        )
    if module.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.zeros(_BATCH, config.num_channels, size, size)}, {
            "pixel_values": {0: "batch"}
        }
    if module.main_input_name != "input_ids":
        raise UsageError(
            f"{name} reads {module.main_input_name}: write file.py:make that returns (module, inputs, axes)"
        )
    if module.can_generate():
        return _decoder(module)
    tokens = torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    if (
        getattr(config, "type_vocab_size", 0) > 1
        and "token_type_ids" in inspect.signature(module.forward).parameters
    ):
        names.append("token_type_ids")
    return {name: tokens.clone() for name in names}, {name: {0: "batch", 1: "sequence"} for name in names}


def _decoder(module: Any) -> tuple[dict[str, Any], Axes]:
    """Example inputs of a decoder with a cache, whose shapes are learnt by running it once."""
    import torch

    ids = torch.ones(_BATCH, _PAST, dtype=torch.int64)
    with torch.no_grad():
        cache = getattr(module(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers or not all(getattr(layer, "keys", None) is not None for layer in layers):
        raise UsageError(
            f"{type(module).__name__} keeps no cache of keys and values: write file.py:make for it"
        )
    positions = torch.arange(_PAST, _PAST + _SEQUENCE)
    inputs = {
        "input_ids": ids[:, :_SEQUENCE].clone(),
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64),
        "position_ids": positions.repeat(_BATCH, 1),
        "past_key_values": cache,
        "use_cache": True,
    }
    if "position_ids" not in inspect.signature(module.forward).parameters:
        del inputs["position_ids"]
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "position_ids")}
    axes["attention_mask"] = {0: "batch", 1: "past + sequence"}
    for index in range(len(layers)):
        axes |= {f"past_key_values.{index}.{part}": {0: "batch", 2: "past"} for part in ("key", "value")}
    return inputs, axes
