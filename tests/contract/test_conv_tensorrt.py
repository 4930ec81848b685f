"""Every form of a kernel builds in TensorRT-RTX for two generations of GPUs: the builder itself needs none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import pytest

from lrcompile import registry
from lrcompile.factorize import factorize
from lrcompile.lower import lower
from lrcompile.records import Plan
from lrcompile.rewrite import rewrite
from lrcompile.store import Cache
from tests.contract.test_conv import METHODS, Case, candidates, decision

trt = pytest.importorskip("tensorrt_rtx")

CAPABILITIES = ("SM86", "SM120")
CASES = {
    "asymmetric padding and strides": Case((3, 3), 8, 8, strides=(2, 1), pads=(1, 0, 0, 1)),
    "groups and dilations": Case((3, 3), 4, 4, group=2, dilations=(1, 2), pads=(1, 2, 1, 2)),
    "SAME_LOWER": Case((3, 3), 8, 8, strides=(2, 2), auto_pad="SAME_LOWER"),
    "half precision": Case((3, 3), 8, 8, pads=(1, 1, 1, 1), dtype="float16", bias=False),
    "three axes": Case((3, 3, 3), 4, 4, pads=(1,) * 6, size=6),
    "one axis": Case((3,), 8, 8, pads=(1, 1)),
    "a point": Case((1, 1), 8, 8, strides=(2, 2)),
}


def built(model: ir.Model, shape: Sequence[int]) -> int:
    """Bytes of the engine for both capabilities. What the builder says when it refuses is the message of the failure."""
    log: Any = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    accepted = parser.parse(ir.to_proto(model).SerializeToString())
    assert accepted, "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
    profile = builder.create_optimization_profile()
    profile.set_shape("x", tuple(shape), tuple(shape), tuple(shape))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(CAPABILITIES)
    for index, name in enumerate(CAPABILITIES):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    plan = builder.build_serialized_network(network, config)
    return 0 if plan is None else int(plan.nbytes)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_builds(tmp_path: Any, name: str, case: str) -> None:
    method = registry.factorization(name)
    found = list(candidates(method, CASES[case], Cache(tmp_path)))
    if not found:
        assert case in ("one axis", "a point")  # the only windows that a form may refuse here
        return
    model, group, weights, statistics, candidate = found[len(found) // 2]
    plan = Plan("reference", (decision(group, candidate),))
    (factors,) = factorize(plan, {group.name: group}, weights, statistics, {name: method}, 0)
    lowered = lower(rewrite(model, (factors,)), ())
    assert built(lowered, CASES[case].picture(0).shape) > 1000
