"""The published model in Polygraphy: its loaders and runners take it as they take any other file.

    python examples/polygraphy_compare.py

The same on the command line, with what the folder itself holds:

    polygraphy run out/model.onnx --onnxrt --load-inputs out/inputs.json --load-outputs out/outputs.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import tiny_model
from polygraphy.backend.onnx import BytesFromOnnx, OnnxFromPath
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, RunResults, SimpleCompareFunc
from polygraphy.json import load_json
from polygraphy.logger import G_LOGGER

from lrcompile import Budget, Options, compile  # noqa: A004

G_LOGGER.module_severity = G_LOGGER.ERROR

with tempfile.TemporaryDirectory() as name:
    path = tiny_model.write(Path(name))
    options = Options(budget=Budget(keep=0.6), data=path.with_name("calib.npz"))
    out = compile(path, Path(name, "out"), options).path

    def runner(file: Path, title: str) -> OnnxrtRunner:
        """Loaders are lazy: nothing is read before the runner is activated."""
        return OnnxrtRunner(SessionFromOnnx(BytesFromOnnx(OnnxFromPath(str(file)))), name=title)

    # 1. The folder proves itself: stored inputs, stored outputs.
    stored = RunResults.load(str(out / "outputs.json"))
    inputs = load_json(str(out / "inputs.json"))
    replayed = Comparator.run([runner(out / "model.onnx", "replayed")], data_loader=inputs)
    replayed.extend(stored)
    same = Comparator.compare_accuracy(replayed, compare_func=SimpleCompareFunc(atol=1e-5, rtol=1e-5))
    print("stored outputs:", "reproduced" if same else "NOT reproduced", f"on {len(inputs)} feeds")

    # 2. How far it moved, on feeds of one's own, by a policy of one's own.
    runners = [runner(path, "original"), runner(out / "model.onnx", "compiled")]
    results = Comparator.run(runners, data_loader=tiny_model.feeds(4))
    close = Comparator.compare_accuracy(results, compare_func=CosineSimilarityCompareFunc(0.99))
    print("original and compiled:", "within" if close else "NOT within", "cosine 0.99")
