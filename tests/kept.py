"""What backends make of a model, in a child process: nothing is imported here that would slow its start."""

from __future__ import annotations

from pathlib import Path


def by_ort(path: str) -> str:
    """The graph that ONNX Runtime runs on the CPU, in a file. Raises what it raises where it refuses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{path}.optimized"
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return options.optimized_model_filepath


def by_rtx(path: str, capabilities: tuple[str, ...], name: str, dims: tuple[int, ...]) -> dict[str, str]:
    """What TensorRT-RTX says of its engine. dims: of the one input, 0 for what varies. Raises BuildError where it refuses."""
    from lrcompile.interfaces import BuildOptions
    from lrcompile.records import EngineOptions, ShapeRange
    from lrcompile.registry import runtime_of

    least, usual, most = (tuple(dim or rows for dim in dims) for rows in (1, 8, 32))
    options = EngineOptions(shapes=(ShapeRange(name, least, usual, most),), capabilities=capabilities)
    engine = Path(path).with_suffix(".rtx")
    built = runtime_of("trt-rtx").serialize(Path(path), engine, BuildOptions("trt-rtx", engine=options))
    return dict(built.describe)


def by_rtx_beside_an_old_builder(
    path: str, capabilities: tuple[str, ...], name: str, dims: tuple[int, ...]
) -> int:
    """The same while a builder waits for the garbage collector, which starts whenever something is logged. Bytes of weights."""
    import gc

    import tensorrt_rtx

    from lrcompile_runtimes._trt.log import Words

    take = Words.take

    def collecting(self: Words, severity: int, message: str) -> None:
        if gc.isenabled():
            gc.collect()
        take(self, severity, message)

    Words.take = collecting  # type: ignore[method-assign]
    gc.set_threshold(0)
    cycle: list[object] = [tensorrt_rtx.Builder(tensorrt_rtx.Logger())]
    cycle.append(cycle)
    del cycle
    return int(by_rtx(path, capabilities, name, dims)["weights"].split()[0])
