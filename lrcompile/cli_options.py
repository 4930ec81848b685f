"""The flags of the command line. Each list of them is the signature of a function that is never called: `takes` lends it to
commands, which receive the values by name. A flag that is not given is None, so that a configuration file can speak.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

Template = Callable[..., None]


def takes(*templates: Template) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with ``**flags`` gets the flags of these templates."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            command(**values)

        parameters: dict[str, inspect.Parameter] = {}
        for function in (command, *templates):
            for p in inspect.signature(function, eval_str=True).parameters.values():
                if p.kind is not p.VAR_KEYWORD:
                    parameters.setdefault(p.name, p.replace(kind=p.KEYWORD_ONLY))
        wrapper.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        wrapper.__annotations__ = {}
        return wrapper

    return decorate


def output(
    json: Annotated[
        bool, Option("--json", help="Print one JSON document on stdout; logs go to stderr.")
    ] = False,
    verbose: Annotated[
        int,
        Option("-v", "--verbose", count=True, show_default=False, help="Say more on stderr; -vv says all."),
    ] = 0,
    quiet: Annotated[bool, Option("-q", "--quiet", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Flags of every command."""


def machine(
    threads: Annotated[int | None, Option(help="Threads of BLAS and of the runtime. [default: 1]")] = None,
    timeout: Annotated[
        float | None,
        Option(help="Seconds that building and running may take. [default: 20, more for big models]"),
    ] = None,
    memory: Annotated[
        str | None, Option(metavar="SIZE", help="Memory that building and running may take, for example 4GB.")
    ] = None,
    allow_hardlinks: Annotated[
        bool | None,
        Option("--allow-hardlinks", help="Take external data from files that have several hard links."),
    ] = None,
    gs_script: Annotated[
        str | None, Option(metavar="FILE.py:FUNC", help="A graphsurgeon function to run on the model first.")
    ] = None,
    cache: Annotated[
        Path | None,
        Option(envvar="LRCOMPILE_CACHE", help="Folder for factors and moments. [default: the user's cache]"),
    ] = None,
) -> None:
    """Flags of every command that runs a model."""


def drawing(
    data: Annotated[
        str | None,
        Option(
            metavar="DATA",
            help="Calibration data: a .npz file, a folder of them, or file.py[:load_data]. A quarter is held out.",
        ),
    ] = None,
    batch: Annotated[int | None, Option(help="Rows of a .npz array that make one feed. [default: 8]")] = None,
    dim: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=N",
            help="Value of a symbolic dimension where inputs are drawn and costs counted. Repeatable.",
        ),
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of all that is drawn. [default: 0]")] = None,
) -> None:
    """Flags of commands that need inputs."""


def choosing(
    target: Annotated[
        str | None, Option(help="RUNTIME[-DEVICE] to compile for; doctor lists them. [default: ort-cpu]")
    ] = None,
    methods: Annotated[
        str | None,
        Option(metavar="A,B", help="Factorizations to choose from; dense is always allowed. [default: auto]"),
    ] = None,
    storage: Annotated[
        str | None,
        Option(
            metavar="A,B",
            help="Types that factors and weights may be stored in: auto, or int8, int4, uint4, uint3, uint2 and others, groups and "
            "scales in the name as in int4-64s16. Fewer than 4 bits take 4 in ONNX Runtime's memory. [default: the weight's own; auto with --bits]",
        ),
    ] = None,
    activations: Annotated[
        str | None,
        Option(
            metavar="A,B",
            help="Types that inputs of weights may be rounded to before they are multiplied: auto, int8, or float8 on TensorRT. "
            "[default: as they are]",
        ),
    ] = None,
    include: Annotated[
        str | None,
        Option(metavar="REGEX", help="Exactly the weights whose name matches are eligible, tables too."),
    ] = None,
    exclude: Annotated[
        str | None, Option(metavar="REGEX", help="Weights whose name matches stay as they are.")
    ] = None,
    config: Annotated[
        Path | None, Option(metavar="FILE.yaml", help="Options in a file; those given here go before.")
    ] = None,
) -> None:
    """Flags that say which weights may become what."""


def budget(
    keep: Annotated[
        float | None,
        Option(
            metavar="F",
            help="Parameters of all eligible weights, after over before: at most F. Each weight is counted once, those left dense "
            "too; eligible are the constant weights of MatMul, Gemm and Conv, not tables nor heads tied to one (--include and --exclude "
            "change that).",
        ),
    ] = None,
    size: Annotated[
        str | None,
        Option(
            metavar="SIZE",
            help="Bytes of all constants that the engine keeps in memory, tables, biases and norms too: at most 60MB, 1.2GB or "
            "500KB (decimal units), or 0.5x, half of the original's.",
        ),
    ] = None,
    flops: Annotated[
        str | None,
        Option(
            metavar="N",
            help="FLOPs at the first feed, 2 for each multiply-accumulate of a constant weight, rewritten or not: at most 1.2G, or "
            "0.5x, half of the original's.",
        ),
    ] = None,
    latency: Annotated[
        str | None,
        Option(
            metavar="T",
            help="Time of one run at the first feed: at most 5ms, or 0.7x of what the original takes; planned by measured costs, "
            "and measured at the end.",
        ),
    ] = None,
    bits: Annotated[
        float | None,
        Option(
            metavar="N",
            help="Stored bits per number of all eligible weights, scales, zero points and levels counted: at most N, such as 4.5.",
        ),
    ] = None,
    energy: Annotated[
        float | None,
        Option(metavar="F", help="Smallest rank of each weight that holds this share of its energy."),
    ] = None,
    rank: Annotated[
        str | None,
        Option(metavar="N|full", help="This rank everywhere; full: every weight, unchanged to rounding."),
    ] = None,
    max_error: Annotated[
        str | None,
        Option(
            metavar="LIMITS",
            help="How far outputs may move, as in snr=30,cosine=0.99,kl=0.05,metric=1.05x. Alone it is searched for: plans are "
            "compiled and verified until the smallest that holds is known; beside a budget it only judges. "
            "[default: cosine=0.99]",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="What gets small under --max-error: size (bytes in memory), disk (bytes of the published files), latency (which is "
            "measured) or flops; beside a budget it decides which forms are legal. [default: size]",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        Option(
            metavar="R",
            help="How many times faster an engine must be where speed was asked for. [default: 1.02]",
        ),
    ] = None,
    refit: Annotated[
        bool | None,
        Option(
            "--refit/--no-refit",
            help="Fit each weight to what the compressed part before it gives. [default: where there is data]",
        ),
    ] = None,
    gradients: Annotated[
        bool | None,
        Option(
            "--gradients/--no-gradients",
            help="Weigh errors by how the outputs react to them, where gradients can be computed. [default: yes]",
        ),
    ] = None,
    pareto: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Write the trade-off of size and error to FILE.json or FILE.svg, beside OUT: every plan that was compiled and "
            "verified (several under --max-error, one under a budget), and, marked as predicted, where there is data, what the "
            "outputs would move by at 30 to 100 % of what can shrink.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        Option(
            "--plan",
            metavar="FILE",
            help="Carry out this plan, as plan --json wrote it; ranks may be edited.",
        ),
    ] = None,
    verify_data: Annotated[
        str | None, Option(metavar="DATA", help="Data to judge by, instead of a held-out quarter of --data.")
    ] = None,
    metric: Annotated[
        str | None, Option(metavar="FILE.py:FUNC", help="Your own figure, func(run, feeds) -> float.")
    ] = None,
) -> None:
    """Flags that say how much, and how it is judged."""


def building(
    precision: Annotated[
        str | None,
        Option(
            metavar="TYPE", help="fp32, fp16 or bf16: what the whole graph computes in. [default: as it is]"
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        Option(
            metavar="X:1x64",
            help="Shape of an input that the engine is built for, as x:1x64 or x:[1,64]; x:1x8,1x64,8x64 is a range: smallest, "
            "usual, largest. Repeatable. [default: that of the first feed]",
        ),
    ] = None,
    workspace: Annotated[
        str | None, Option(metavar="SIZE", help="Scratch memory of a TensorRT engine, for example 1GB.")
    ] = None,
    level: Annotated[int | None, Option(help="Optimisation level of the TensorRT builder, 0 to 5.")] = None,
    capabilities: Annotated[
        str | None,
        Option(
            "--compute-capability",
            metavar="8.6,12.0",
            help="GPUs that a TensorRT-RTX engine is built for, none of which need be here. [default: the one at hand]",
        ),
    ] = None,
    streaming: Annotated[
        str | None,
        Option(
            "--weight-streaming",
            metavar="SIZE",
            help="Bytes of weights that a TensorRT engine keeps on the GPU; it streams the rest.",
        ),
    ] = None,
    version_compatible: Annotated[
        bool | None,
        Option("--version-compatible", help="A TensorRT engine that later versions load as well."),
    ] = None,
    refittable: Annotated[
        bool | None, Option("--refittable", help="A TensorRT engine whose weights can be exchanged.")
    ] = None,
    cuda_graph: Annotated[
        bool | None, Option("--cuda-graph", help="Record the kernels of a run once, and replay them.")
    ] = None,
    provider: Annotated[
        list[str] | None,
        Option(
            "--provider-option",
            metavar="NAME=VALUE",
            help="An option of the execution provider of ONNX Runtime. Repeatable.",
        ),
    ] = None,
    cpu_nodes: Annotated[
        bool | None,
        Option("--cpu-nodes", help="Let nodes for which a GPU target has no kernel run on the CPU."),
    ] = None,
) -> None:
    """Flags that say how an engine is built."""


def publishing(
    external_data: Annotated[
        bool | None,
        Option(
            "--external-data/--no-external-data", help="Weights in model.onnx.data. [default: above 1 GiB]"
        ),
    ] = None,
    keep_functions: Annotated[
        bool | None,
        Option("--keep-functions", help="Publish neutral.onnx too: one function a rewritten weight."),
    ] = None,
    force: Annotated[bool | None, Option("--force", help="Replace OUT if it is a folder of ours.")] = None,
) -> None:
    """Flags that say what is written."""


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.", show_default=False)]
Folder = Annotated[
    Path, typer.Argument(metavar="OUT", help="A folder that compile wrote.", show_default=False)
]
