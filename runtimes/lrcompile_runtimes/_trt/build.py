"""Parse, configure, build, and look at what was built. The builder's words go to the log as they come, and into its errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lrcompile.errors import BuildError, UsageError
from lrcompile.folding import folded_constants
from lrcompile.interfaces import BuildOptions
from lrcompile.records import EngineOptions, ShapeRange
from lrcompile_runtimes import _cuda
from lrcompile_runtimes._trt.engine import replace_file
from lrcompile_runtimes._trt.layers import Layer, from_json, from_log, type_name, widened
from lrcompile_runtimes._trt.library import (
    LEVELS,
    LIBRARIES,
    Library,
    capabilities,
    check,
    load,
    unrunnable,
    version,
)
from lrcompile_runtimes._trt.log import NOISE, Words, listen, log_of, uncollected

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

_OPSET = 22  # every operator up to here is parsed; of later opsets only some are


@dataclass(frozen=True, slots=True, eq=False)
class Serialized:
    """A built engine that lies in memory. describe: as `records.Built` has it."""

    data: memoryview
    describe: Mapping[str, str]
    layers: tuple[Layer, ...]


@uncollected()
def serialize(model: Path, options: BuildOptions) -> Serialized:
    """Parse, configure, build, look at what was built. Raises BuildError in the builder's words, UsageError for options."""
    target, module = options.target, load(options.target)
    product = version(target, module)
    check(options.engine, target, module)
    if not model.is_file():
        raise BuildError(f"there is no model file {model}")
    builder: Any = module.Builder(log_of(module))
    log, words = builder.logger, listen(builder.logger)
    builder.max_threads = max(1, options.threads)
    # TensorRT 11 knows no other network, and may lack the flag
    typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    _parse(module, network, log, words, model, LIBRARIES[target])
    words.errors.clear()
    config = _configure(builder, network, module, options)
    if words.errors:
        raise BuildError(f"{product} refuses an option for {model.name}: {words}")
    _use_timings(config, module, options)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"{product} cannot build {model.name}: {words}")
    _keep_timings(config, module, options)
    layers, source = _layers(module, log, words, data, target)
    describe = {
        "runtime": "trt",
        "library": product,
        "devices": ", ".join(options.engine.capabilities) or str(_cuda.capability()),
        "weights": f"{words.weights or 'unknown number of'} bytes",
        "layers": source,
    }
    if wide := widened(layers, _types_of(network)):
        names = ", ".join(layer.name for layer in wide[:3])
        describe["widened"] = (
            f"{len(wide)} layers compute in float32 what the graph has in another type: {names}"
        )
        logger.warning("%s: %s", model.name, describe["widened"])
    return Serialized(memoryview(data), describe, layers)


def _parse(
    module: Any,
    network: trt.INetworkDefinition,
    log: trt.ILogger,
    words: Words,
    model: Path,
    library: Library,
) -> None:
    parser: trt.OnnxParser = module.OnnxParser(network, log)
    folded = _folded(model)
    parsed = parser.parse_from_file(str(model)) if folded is None else parser.parse(folded, str(model))
    # of what is no model at all it parses nothing, and is content
    if parsed and network.num_outputs:
        return
    said = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"{error.node_operator()} {error.node_name()!r}: " if error.node_operator() else ""
        text = " ".join(error.desc().partition(NOISE)[0].split())
        said.append(where + ("the operator is not supported" if text in ("", "false") else text))
    opset = _opset(model)
    if opset > _OPSET:
        said.append(
            f"the model is of opset {opset}, and of those above {_OPSET} not every operator is parsed"
        )
    raise BuildError(f"{library.product} cannot parse {model.name}: {'; '.join(said) or words}")


def _folded(model: Path) -> bytes | None:
    """The graph with its products of constants multiplied out, as ONNX Runtime does by itself; None where there are none.

    The builder would keep the products and compute them at every call. External data stays where it is.
    """
    try:
        loaded = ir.load(model)
    except Exception:  # what is no model is refused by the parser, in better words
        return None
    if not folded_constants(loaded):
        return None
    try:
        folded: bytes = ir.to_proto(loaded).SerializeToString()
    except ValueError as error:
        raise BuildError(
            f"the weights that {model.name} keeps as cores are too large for one graph: {error}"
        ) from error
    return folded


def _opset(model: Path) -> int:
    """The version of the default domain; 0 where that cannot be read."""
    import onnx

    try:
        proto = onnx.load(model, load_external_data=False)
    except Exception:  # what is no model has been refused by the parser, in better words
        return 0
    return max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _configure(
    builder: trt.Builder, network: trt.INetworkDefinition, module: Any, options: BuildOptions
) -> trt.IBuilderConfig:
    wanted, offline = options.engine, LIBRARIES[options.target].offline
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if wanted.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, wanted.workspace)
    if not options.optimize:
        config.builder_optimization_level = LEVELS[0]
    elif wanted.level is not None:
        config.builder_optimization_level = wanted.level
    flags = {
        "VERSION_COMPATIBLE": wanted.version_compatible,
        "REFIT": wanted.refittable,
        "WEIGHT_STREAMING": wanted.streaming is not None,
    }
    for name in (name for name, on in flags.items() if on):
        config.set_flag(getattr(module.BuilderFlag, name))
    if options.exact:
        config.clear_flag(module.BuilderFlag.TF32)
    if offline:
        _set_capabilities(config, module, wanted)
    profile: Any = builder.create_optimization_profile()  # its stubs do not know that tuples serve as shapes
    for name, shapes in _ranges(network, wanted.shapes).items():
        profile.set_shape(name, *shapes)
    if any(-1 in network.get_input(index).shape for index in range(network.num_inputs)):
        config.add_optimization_profile(profile)
    return config


def _set_capabilities(config: Any, module: Any, wanted: EngineOptions) -> None:
    known = capabilities(module)
    constants = [known[c] for c in wanted.capabilities] or [module.ComputeCapability.CURRENT]
    config.num_compute_capabilities = len(constants)
    for index, constant in enumerate(constants):
        config.set_compute_capability(constant, index)


def _ranges(
    network: trt.INetworkDefinition, given: tuple[ShapeRange, ...]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Least, usual and largest shape of every dynamic input. Raises UsageError for what is missing or does not fit."""
    inputs = {(tensor := network.get_input(i)).name: tensor for i in range(network.num_inputs)}
    ranges = {entry.input: entry for entry in given}
    if unknown := sorted(ranges.keys() - inputs.keys()):
        raise UsageError(
            f"--shape names {unknown[0]!r}; the model's inputs are {', '.join(inputs) or 'none'}"
        )
    found = {}
    for name, tensor in inputs.items():
        dims = tuple(tensor.shape)
        written = "x".join("?" if d < 0 else str(d) for d in dims)
        if tensor.is_shape_tensor:
            raise UsageError(
                f"the values of input {name!r} decide shapes: no target of TensorRT takes that here"
            )
        if name not in ranges:
            if -1 in dims:
                raise UsageError(
                    f"input {name!r} ({written}) is dynamic: give its least, usual and largest shape with --shape"
                )
            continue
        least, usual, most = ranges[name].least, ranges[name].usual, ranges[name].most
        for shape in (least, usual, most):
            fits = len(shape) == len(dims) and all(d in (-1, s) for d, s in zip(dims, shape, strict=True))
            if not fits:
                raise UsageError(
                    f"--shape gives {name!r} {'x'.join(map(str, shape))}; the model has {written}"
                )
        if not all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
            raise UsageError(f"--shape of {name!r}: least, usual and largest do not rise in every dimension")
        if -1 in dims:
            found[name] = (least, usual, most)
    return found


def _timings(module: Any, options: BuildOptions) -> Path | None:
    """The file that keeps how fast TensorRT found its kernels. RTX chooses them where it runs, and keeps no such thing."""
    if options.cache is None or LIBRARIES[options.target].offline:
        return None
    return options.cache / f"tensorrt-{module.__version__}.timings"


def _use_timings(config: trt.IBuilderConfig, module: Any, options: BuildOptions) -> None:
    """What is kept there, unless the library finds that it is another GPU's."""
    if (timings := _timings(module, options)) is None:
        return
    known = timings.read_bytes() if timings.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: trt.IBuilderConfig, module: Any, options: BuildOptions) -> None:
    if (timings := _timings(module, options)) is not None:
        replace_file(timings, bytes(memoryview(config.get_timing_cache().serialize())))


# --- what was built -----------------------------------------------------------------------------------------------


def _layers(
    module: Any, log: trt.ILogger, words: Words, data: Any, target: str
) -> tuple[tuple[Layer, ...], str]:
    """The engine's layers, and where that is known from: an engine can only be asked where it can be loaded."""
    if not unrunnable(target, module) and (engine := module.Runtime(log).deserialize_cuda_engine(data)):
        text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
        return from_json(text), "from the engine's inspector"
    return from_log(words.layers), "from the builder's log"


def _types_of(network: trt.INetworkDefinition) -> Mapping[str, frozenset[str]]:
    """Types of all that goes into and comes out of every layer of the network, which is named after its ONNX node."""
    types: dict[str, frozenset[str]] = {}
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        tensors += [layer.get_output(i) for i in range(layer.num_outputs)]
        names = frozenset(type_name(str(t.dtype).rpartition(".")[2]) for t in tensors if t is not None)
        types[layer.name] = types.get(layer.name, frozenset()) | names
    return types
