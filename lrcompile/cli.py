"""The command line. What takes long to import is imported inside the commands: ``--help`` must be quick."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer import Argument, Option
from typer.core import TyperGroup

import lrcompile
from lrcompile.cli_options import (
    Folder,
    Model,
    budget,
    building,
    choosing,
    drawing,
    machine,
    output,
    publishing,
    takes,
)  # fmt: skip
from lrcompile.errors import LrcompileError, UsageError

if TYPE_CHECKING:
    from types import FrameType

    from lrcompile.cli_screen import Screen
    from lrcompile.options import Options

_BUG, _INTERRUPTED = 70, 130
_ClickError: type[Exception] = typer.BadParameter.__mro__[
    2
]  # the base of what typer raises about the command line
_SHOWN = frozenset({"json", "verbose", "quiet"})


class _Group(TyperGroup):
    """Turns whatever ends a command into an exit code and one line, the last one on stderr."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **{"prog_name": "lrcompile", **kwargs})
            if code == _INTERRUPTED:  # typer's word for KeyboardInterrupt
                _say("interrupted; nothing is left behind")
        except LrcompileError as error:
            _say(f"error: {error}")
            code = error.exit_code
        except (KeyboardInterrupt, typer.Abort):
            _say("interrupted; nothing is left behind")
            code = _INTERRUPTED
        except _ClickError as error:
            _say(f"error: {_usage(error)}")
            code = UsageError.exit_code
        except Exception as error:
            traceback.print_exc()
            _say(
                f"error: this is a bug of lrcompile, please report it with the lines above: {type(error).__name__}: {error}"
            )
            code = _BUG
        sys.exit(code if isinstance(code, int) else 0)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        sys.stdout.flush()
    typer.echo(" ".join(line.split()), err=True)


def _usage(error: Exception) -> str:
    message = getattr(error, "format_message", error.__str__)()
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "lrcompile"
    return f"{message} ({command} --help lists what there is)"


app = typer.Typer(cls=_Group, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lrcompile {lrcompile.__version__}")
        raise typer.Exit


@app.callback()
def _lrcompile(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make an ONNX model smaller or faster, and prove how far its outputs moved."""


@contextlib.contextmanager
def _screen(flags: Mapping[str, Any]) -> Iterator[Screen]:
    from lrcompile.cli_screen import screen

    with screen(**{name: flags[name] for name in _SHOWN}) as made:
        yield made


def _said(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are options."""
    return {name: value for name, value in flags.items() if name not in _SHOWN | {"config"}}


def _options(flags: Mapping[str, Any]) -> Options:
    from lrcompile.config import options_from

    return options_from(_said(flags), flags.get("config"))


def _published(out: Path, flags: Mapping[str, Any]) -> Options:
    """The options of a folder's own config.yaml, with the flags before them."""
    from lrcompile.config import options_from, published_options

    try:
        return published_options(out, _said(flags))
    except UsageError:  # it is damaged, which the command says, or a flag is wrong, which comes up again
        return options_from(_said(flags))


@app.command()
@takes(output)
def export(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL", help="A Hugging Face folder, a .gguf file, or file.py:make.", show_default=False
        ),
    ],
    out: Annotated[
        Path, Option("-o", "--output", metavar="FILE.onnx", help="The file to write.", show_default=False)
    ],
    dtype: Annotated[
        str, Option(help="Type of the weights: float32, float16, bfloat16, or auto (as stored).")
    ] = "float32",
    opset: Annotated[int | None, Option(help="ONNX opset. [default: the exporter's own]")] = None,
    **flags: Any,
) -> None:
    """Turn a Hugging Face folder, GGUF file or torch module into ONNX."""
    with _screen(flags) as screen:
        from lrcompile.export import export as run

        screen("export", 0, 1)
        path = run(model, out, dtype=dtype, opset=opset)
        screen("export", 1, 1)
        screen.show(
            f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)",
            {"path": str(path), "bytes": path.stat().st_size},
        )


@app.command()
@takes(drawing, choosing, machine, output)
def inspect(
    model: Model,
    site: Annotated[
        str | None,
        Option(
            metavar="REGEX",
            help="Only weights whose name matches, with the error against the parameters of each method.",
        ),
    ] = None,
    curve: Annotated[
        Path | None, Option(metavar="FILE.svg", help="Draw these curves; of all weights without --site.")
    ] = None,
    **flags: Any,
) -> None:
    """List the weights, and what making them smaller would cost."""
    with _screen(flags) as screen:
        from lrcompile.commands import inspect as run
        from lrcompile.inspection import write_curves

        if curve is not None and curve.suffix.lower() != ".svg":
            raise UsageError(f"--curve {curve}: the picture is an .svg file")
        whole = "" if curve is not None and site is None else site
        found = run(model, _options(flags), site=whole, progress=screen)
        if curve is not None:
            write_curves(curve, found)
        screen.show(found, found.to_json())


@app.command()
@takes(budget, drawing, choosing, building, machine, output)
def plan(
    model: Model,
    why: Annotated[bool, Option("--why", help="Say of each weight why it is or is not rewritten.")] = False,
    **flags: Any,
) -> None:
    """Print what compile would do; --plan reads its --json back."""
    with _screen(flags) as screen:
        from lrcompile.commands import plan as run
        from lrcompile.tables import plan_table

        made = run(model, _options(flags), progress=screen)
        screen.show(plan_table(made, why), made.to_json())


@app.command()
@takes(budget, drawing, choosing, building, publishing, machine, output)
def compile(  # noqa: A001 - the verb of this tool
    model: Model,
    out: Annotated[
        Path, Option("-o", "--output", metavar="OUT", help="The folder to write.", show_default=False)
    ],
    **flags: Any,
) -> None:
    """Turn a model into a folder: factorized, built, verified."""
    with _screen(flags) as screen:
        from lrcompile.compile import compile as run
        from lrcompile.tables import result_table

        result = run(model, out, _options(flags), progress=screen)
        screen.show(result_table(result), dict(result.manifest))


@app.command()
@takes(drawing, machine, output)
def verify(
    out: Folder,
    original: Annotated[
        Path | None,
        Option(metavar="MODEL", help="The model that was compiled: then everything is asked again."),
    ] = None,
    max_error: Annotated[
        str | None,
        Option(metavar="LIMITS", help="How far outputs may move. [default: as when it was compiled]"),
    ] = None,
    metric: Annotated[
        str | None, Option(metavar="FILE.py:FUNC", help="Your own figure, func(run, feeds) -> float.")
    ] = None,
    **flags: Any,
) -> None:
    """Check a folder; with the original, ask everything again."""
    with _screen(flags) as screen:
        from lrcompile.commands import verify as run

        options = _published(out, {**flags, "max_error": max_error, "metric": metric})
        held = run(out, original=original, options=options, progress=screen)
        screen.show(held, held.to_json())


@app.command()
@takes(drawing, choosing, building, machine, output)
def tune(
    model: Annotated[
        Path | None, Argument(metavar="[MODEL]", help="Measure the sizes of its weights.", show_default=False)
    ] = None,
    **flags: Any,
) -> None:
    """Measure what forms of weights cost on a target."""
    with _screen(flags) as screen:
        from lrcompile.commands import tune as run
        from lrcompile.tables import cost_table

        table = run(model, _options(flags), progress=screen)
        screen.show(cost_table(table), table.to_json())


@app.command()
@takes(drawing, building, machine, output)
def bench(
    out: Folder,
    original: Annotated[
        Path, Option(metavar="MODEL", help="The model that was compiled.", show_default=False)
    ],
    shape: Annotated[
        list[str] | None,
        Option(
            metavar="X:1x64",
            help="Shapes of inputs, as x:1x64,y:1x8 or x:[1,64]. Repeatable: an input that is named again begins another workload. "
            "[default: inputs.json]",
        ),
    ] = None,
    batches: Annotated[
        str | None, Option(metavar="1,8", help="Lengths of the batch axis; every workload is run at each.")
    ] = None,
    prefill: Annotated[
        str | None, Option(metavar="N,..", help="Of a decoder: N tokens at once, the cache empty.")
    ] = None,
    decode: Annotated[
        str | None, Option(metavar="N,..", help="Of a decoder: one token, N in the cache.")
    ] = None,
    plot: Annotated[Path | None, Option(metavar="FILE.svg", help="Write a picture.")] = None,
    seconds: Annotated[float, Option(help="How long to measure each workload.", min=0)] = 5.0,
    **flags: Any,
) -> None:
    """Race the compiled model against the original, interleaved."""
    with _screen(flags) as screen:
        from lrcompile.benchmark import write_plot
        from lrcompile.commands import bench as run
        from lrcompile.workloads import numbers

        if plot is not None and plot.suffix != ".svg":
            raise UsageError(f"--plot {plot}: the picture is an .svg file")
        raced = run(
            out, original, shapes=shape or (), batches=numbers("batches", batches), prefill=numbers("prefill", prefill),
            decode=numbers("decode", decode), seconds=seconds, options=_published(out, flags), progress=screen,
        )  # fmt: skip
        if plot is not None:
            write_plot(plot, raced)
        screen.show(raced, raced.to_json())


@app.command()
@takes(output)
def doctor(
    cache: Annotated[
        Path | None, Option(envvar="LRCOMPILE_CACHE", help="The cache folder to look at.")
    ] = None,
    **flags: Any,
) -> None:
    """Say what works here, and how to get the rest."""
    with _screen(flags) as screen:
        from lrcompile.doctor import doctor as run
        from lrcompile.doctor import healthy
        from lrcompile.errors import PluginError

        checks = run(cache)
        screen.show(
            "\n".join(map(str, checks)), {"healthy": healthy(checks), "checks": [c.to_json() for c in checks]}
        )
    if not healthy(checks):
        broken = [c.name for c in checks if c.needed and not c.ok] or ["no target works"]
        raise PluginError(f"lrcompile cannot work here: {', '.join(broken)}")


def main() -> NoReturn:
    """The entry point. Ctrl-C and SIGTERM end a command alike: it cleans up and exits with 130."""
    last = -10.0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > 2:  # an impatient second Ctrl-C must not stop the cleaning up
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    app()
    raise AssertionError("the group exits")
