"""The command line on tiny models: what it prints and where, exit codes, what it leaves behind, how quickly it helps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

import lrcompile
from lrcompile import cli
from lrcompile.records import EngineOptions, flag_of
from tests.graphs import node, normal, proto

Run = Callable[..., Result]

ROWS = 64
COMMANDS = ("export", "inspect", "plan", "compile", "verify", "tune", "bench", "doctor")


def write_model(folder: Path) -> Path:
    """y = relu(x A + c) B, A (16, 24), and rows of x that lie near a space of four dimensions."""
    nodes = [
        node("MatMul", ["x", "a"], ["h"], name="layer/up"),
        node("Add", ["h", "c"], ["s"], name="layer/add"),
        node("Relu", ["s"], ["r"], name="layer/relu"),
        node("MatMul", ["r", "b"], ["y"], name="layer/down"),
    ]
    constants = {"a": normal(16, 24), "b": normal(24, 16), "c": normal(24)}
    onnx.save(proto(nodes, {"x": ("n", 16)}, ["y"], constants), folder / "model.onnx")
    x = normal(ROWS, 4) @ normal(4, 16, seed=1) + 0.05 * normal(ROWS, 16, seed=2)
    np.savez(folder / "data.npz", x=x)
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx, data.npz, a cache, and a published folder out/."""
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder)
    result = invoke(
        folder, "compile", "model.onnx", "-o", "out", "--data", "data.npz", "--keep", "0.7", "--seed", "3"
    )
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def run(home: Path) -> Run:
    return lambda *words: invoke(home, *words)


def invoke(folder: Path, *words: str) -> Result:
    """The command line, in a folder."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(
            cli.app, list(words), env={"LRCOMPILE_CACHE": str(folder / "cache"), "COLUMNS": "200"}
        )
    finally:
        os.chdir(here)


def said(result: Result, code: int = 0) -> Any:
    """The one document on stdout."""
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def failed(result: Result, code: int) -> str:
    """The last line of stderr; nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_has_a_line_for_each_command(run: Run) -> None:
    text = run("--help").stdout
    for command in COMMANDS:
        (line,) = (part for part in text.splitlines() if part.strip().startswith(command))
        assert line.rstrip().endswith(".") and "..." not in line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout and "--quiet" in result.stdout


def test_every_option_has_a_flag(run: Run) -> None:
    text = run("compile", "--help").stdout
    names = {n for n in lrcompile.Options.__dataclass_fields__ if n not in ("budget", "dims", "engine")}
    budget = set(lrcompile.Budget.__dataclass_fields__)
    for name in names | budget | {"dim", "config"}:
        assert f"--{name.replace('_', '-')}" in text, name
    for name in EngineOptions.__dataclass_fields__:
        assert flag_of(name) in text, name
    for words in (
        "eligible",
        "constants",
        "FLOPs at the first feed",
    ):  # --keep, --size and --flops say what they count
        assert words in text


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"lrcompile {lrcompile.__version__}\n"


@pytest.mark.parametrize("words", ["--help", "--version", "compile --help"])
def test_help_imports_nothing_heavy(words: str) -> None:
    code = (
        "import sys, lrcompile.cli\n"
        "try: lrcompile.cli.main()\n"
        "finally: print('FOUND', *{'numpy', 'onnx', 'onnx_ir', 'pydantic', 'rich', 'yaml'} & set(sys.modules))"
    )
    typers = " pydantic" if words.startswith("compile") else ""  # typer itself looks at typed flags with it
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] in ("FOUND", f"FOUND{typers}")


def test_help_takes_at_most_twice_as_long_as_typer_and_rich() -> None:
    def seconds(*words: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    pairs = [(seconds("-m", "lrcompile", "--help"), seconds("-c", "import typer, rich")) for _ in range(7)]
    ours, theirs = (min(column) for column in zip(*pairs, strict=True))
    assert ours <= 2 * theirs


# --- what each command prints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [(), ("--data", "data.npz")])
def test_inspect(run: Run, data: tuple[str, ...]) -> None:
    document = said(run("inspect", "model.onnx", *data, "--json"))
    assert [s["name"] for s in document["sites"]] == ["layer/up", "layer/down"]
    (up,) = (g for g in document["groups"] if g["sites"] == ["layer/up"])
    (curve,) = (
        c for c in up["curves"] if c["refusal"] is None and c["method"] == ("svd" if data else "svd-plain")
    )
    assert curve["break_even"] == 10  # the smallest r with r (16 + 24) >= 16 x 24
    energies = [curve["at_energy"][e]["rank"] for e in ("0.5", "0.9", "0.99")]
    assert energies == sorted(energies)
    if data:
        assert curve["at_energy"]["0.99"]["rank"] <= 5  # the data is nearly of rank 4
    assert "layer/up" in run("inspect", "model.onnx", *data).stdout


def test_inspect_draws_curves(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    asked = (
        "inspect",
        "model.onnx",
        "--methods",
        "svd-plain,monarch",
        "--site",
        "up",
        "--curve",
        str(picture),
    )
    shown = run(*asked).stdout
    assert "error at a share of them" in shown and "layer/down" not in shown
    drawn = picture.read_text()
    assert drawn.startswith("<svg") and "svd-plain" in drawn and "layer/up" in drawn
    assert "picture is an .svg file" in failed(run(*asked[:-1], "curve.png"), 2)


def test_plan(run: Run) -> None:
    words = ("plan", "model.onnx", "--data", "data.npz", "--keep", "0.7")
    document = said(run(*words, "--json"))
    methods = {d["method"] for d in document["decisions"]} - {"dense"}
    assert methods and "svd-plain" not in methods  # with data nothing is cut without looking at it
    assert sum(d["parameters_after"] for d in document["decisions"]) <= 0.7 * 2 * 16 * 24
    assert document["movement"] == pytest.approx(sum(d["movement"] or 0 for d in document["decisions"]))
    text = run(*words).stdout
    assert re.search("[12] of 2 weights rewritten", text) and "moves" in text.splitlines()[0]


def test_plan_why_names_every_weight_and_its_reason(run: Run) -> None:
    words = ("plan", "model.onnx", "--data", "data.npz", "--keep", "0.9", "--exclude", "down")
    short, long = run(*words).stdout, run(*words, "--why").stdout
    assert "1 x excluded by name" in short and "layer/down" not in short
    (line,) = (part for part in long.splitlines() if part.startswith("layer/down"))
    assert line.endswith("excluded by name")


def test_compile(home: Path, run: Run) -> None:
    words = ("compile", "model.onnx", "-o", "again", "--force", "--data", "data.npz", "--keep", "0.7")
    text = run(*words).stdout
    assert (
        "of 2 weights rewritten" in text
        and "noise floor" in text
        and "passed" in text
        and "parameters  " in text
    )
    assert said(run(*words, "--json")) == json.loads((home / "again/lrcompile.json").read_text())


def test_verify(run: Run) -> None:
    assert all(line.startswith("ok: ") for line in run("verify", "out").stdout.splitlines())
    document = said(run("verify", "out", "--json"))
    assert document["verdict"] == "passed" and document["evidence"] is None


def test_verify_with_the_original(run: Run) -> None:
    """Pairs lie in the graph as they are; what is folded into neighbours cannot be taken out again, and that is said."""
    words = ("compile", "model.onnx", "--force", "--data", "data.npz", "--keep", "0.7")
    for methods, sentence in (("svd", "sets of factors"), ("pivoted,slicing", "was not asked again")):
        run(*words, "-o", f"out-{methods}", "--methods", methods)
        document = said(
            run("verify", f"out-{methods}", "--original", "model.onnx", "--data", "data.npz", "--json")
        )
        assert 0.9 < document["evidence"]["outputs"]["y"]["cosine"] < 1
        assert any(sentence in check for check in document["checks"])


def test_bench(run: Run) -> None:
    words = (
        "bench",
        "out",
        "--original",
        "model.onnx",
        "--shape",
        "x:[3,16]",
        "--shape",
        "x:5x16",
        "--seconds",
        "0.1",
    )
    document = said(run(*words, "--json", "--plot", "bench.svg"))
    assert [row["shapes"] for row in document["rows"]] == [["x:3x16"], ["x:5x16"]]
    for row in document["rows"]:
        assert row["rounds"] >= 20
        assert row["ratio"]["p25"] <= row["ratio"]["median"] <= row["ratio"]["p75"]
        assert row["original"]["p90"] <= row["original"]["p95"] <= row["original"]["p99"]
        assert row["roofline_share"][0] > 0
    assert "original / itself" in run(*words).stdout


def test_doctor(run: Run) -> None:
    document = said(run("doctor", "--json"))
    assert document["healthy"]
    targets = {c["name"]: c["ok"] for c in document["checks"] if c["kind"] == "target"}
    assert targets["ort-cpu"] and targets["reference"]


def test_quiet_says_nothing_on_stderr(run: Run) -> None:
    assert run("plan", "model.onnx", "--data", "data.npz", "--max-error", "cosine=0.5", "-q").stderr == ""


def test_the_default_budget_is_said_in_one_line(run: Run) -> None:
    result = run("plan", "model.onnx", "--data", "data.npz", "--json")
    assert said(result)
    lines = [line for line in result.stderr.splitlines() if "budget" in line]
    assert len(lines) == 1 and "--max-error cosine=0.99" in lines[0]


# --- plans and configurations -------------------------------------------------------------------------------------


def test_an_error_limit_ends_with_the_curve_that_was_seen(home: Path, run: Run) -> None:
    words = (
        "compile",
        "model.onnx",
        "-o",
        "limited",
        "--force",
        "--data",
        "data.npz",
        "--max-error",
        "cosine=0.99",
    )
    text = run(*words, "--pareto", "curve.json").stdout
    last = text.splitlines()[-1]
    found = re.fullmatch(
        r"smallest that holds cosine=0\.99: (\d\.\d+) of the eligible parameters, [\d.]+ MB", last
    )
    assert found, last
    curve = json.loads((home / "curve.json").read_text())
    points, chosen = curve["points"], curve["points"][curve["chosen"]]
    assert chosen["verdict"] == "passed" and chosen["cosine"] >= 0.99 and f"{chosen['kept']:.3f}" == found[1]
    assert all(p["kept"] > chosen["kept"] for p in points if p["verdict"] == "passed" and p is not chosen)
    assert {p["verdict"] for p in curve["predicted"]} == {None}
    table = [line for line in text.splitlines() if line.split()[:1] == [found[1]]]
    assert len(table) == 1 and table[0].endswith("passed <")
    page = (home / "limited/report.html").read_text()
    assert last in page and "what else was tried" in page
    assert not [p for p in (home / "limited").iterdir() if "curve" in p.name]
    # what --pareto asks for changes nothing that is published
    published = {p.name: p.read_bytes() for p in (home / "limited").iterdir()}
    run(*words)
    assert published == {p.name: p.read_bytes() for p in (home / "limited").iterdir()}


@pytest.mark.parametrize(("flag", "value"), [("--size", "0.7x"), ("--size", "2.5KB"), ("--flops", "0.6x")])
def test_budgets_are_kept(home: Path, run: Run, flag: str, value: str) -> None:
    words = (
        "compile",
        "model.onnx",
        "-o",
        "kept",
        "--force",
        "--data",
        "data.npz",
        flag,
        value,
        "--pareto",
        "k.svg",
    )
    totals = said(run(*words, "--json"))["totals"]
    name = {"--size": "bytes", "--flops": "flops"}[flag]
    before = totals[f"{name}_before"]
    limit = {"0.7x": 0.7 * before, "2.5KB": 2500, "0.6x": 0.6 * before}[value]
    assert 0.5 * limit < totals[f"{name}_after"] <= limit
    assert (home / "k.svg").read_text().startswith("<svg xmlns=")
    again = run(
        "compile",
        "model.onnx",
        "-o",
        "kept2",
        "--force",
        "--config",
        "kept/config.yaml",
        "--data",
        "data.npz",
    )
    assert again.exit_code == 0
    for file in ("lrcompile.json", "report.html"):
        assert (home / "kept" / file).read_bytes() == (home / "kept2" / file).read_bytes()


def test_a_limit_that_nothing_smaller_holds(run: Run) -> None:
    words = ("compile", "model.onnx", "-o", "same", "--force", "--data", "data.npz", "--max-error", "snr=200")
    text = run(*words).stdout
    assert "\nunchanged: " in text
    assert re.search("no smaller plan holds snr=200; the best reached, with 0.9.* MB: y: snr is ", text)


def test_an_edited_plan_is_carried_out_twice_alike(home: Path, run: Run) -> None:
    words = ("--data", "data.npz", "--keep", "0.45", "--methods", "svd", "--json")
    document = said(run("plan", "model.onnx", *words))
    document["decisions"][0]["rank"] = 2
    (home / "edited.json").write_text(json.dumps(document))
    for out in ("one", "two"):
        result = run("compile", "model.onnx", "-o", out, "--data", "data.npz", "--plan", "edited.json")
        assert result.exit_code == 0, result.output
    first, second = (sorted((home / out).iterdir()) for out in ("one", "two"))
    assert [p.name for p in first] == [p.name for p in second]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name
    site = json.loads((home / "one/lrcompile.json").read_text())["sites"][0]
    assert site["rank"] == 2 and site["parameters_after"] == 2 * (16 + 24)
    assert site["measured_error"] <= site["claimed_error"] + 1e-6
    assert (
        said(run("plan", "model.onnx", "--data", "data.npz", "--plan", "one/lrcompile.json", "--json"))[
            "decisions"
        ][0]["rank"]
        == 2
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": "two"}, "rank"),
        ({"rank": 17}, "not between 1 and 16"),
        ({"method": "nothing"}, "nothing"),
        ({"group": "elsewhere"}, "not in this model"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_plan_that_does_not_fit(home: Path, run: Run, change: dict[str, Any], words: str) -> None:
    document = json.loads((home / "out/lrcompile.json").read_text())["plan"]
    document["decisions"][0].update(change)
    (home / "bad.json").write_text(json.dumps(document))
    assert words in failed(run("plan", "model.onnx", "--data", "data.npz", "--plan", "bad.json"), 2)


def test_the_published_configuration_makes_the_same_folder(home: Path, run: Run) -> None:
    result = run("compile", "model.onnx", "-o", "out2", "--config", "out/config.yaml", "--data", "data.npz")
    assert result.exit_code == 0, result.output
    for name in ("lrcompile.json", "model.onnx", "config.yaml", "inputs.json"):
        assert (home / "out" / name).read_bytes() == (home / "out2" / name).read_bytes(), name


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("frobnicate", "frobnicate"),
        ("", "Missing command"),
        ("compile model.onnx --keep 0.5", "--output"),
        ("plan model.onnx --keep half", "--keep"),
        ("plan model.onnx --keep 1.5", "--keep"),
        ("plan model.onnx --rank some", "full"),
        ("plan model.onnx --keep 0.5 --rank 3", "give one of them"),
        ("plan model.onnx --keep 0.5", "--data"),
        ("plan model.onnx", "--max-error cosine=0.99"),
        ("plan model.onnx --data none.npz --keep 0.5", "none.npz"),
        ("plan model.onnx --data data.npz --keep 0.5 --target ort-cpo", "ort-cpu"),
        ("plan model.onnx --data data.npz --max-error cosinus=1", "cosinus"),
        ("plan model.onnx --data data.npz --keep 0.5 --include [", "regular expression"),
        ("plan model.onnx --data data.npz --keep 0.5 --memory lots", "--memory"),
        ("plan model.onnx --data data.npz --keep 0.5 --dim n", "NAME=NUMBER"),
        ("compile model.onnx -o out --data data.npz --keep 0.5", "--force"),
        ("plan model.onnx --data data.npz --size lots", "--size is 'lots'; allowed: an amount such as 60MB"),
        ("plan model.onnx --data data.npz --size 0.5", "such as 0.5x"),
        ("plan model.onnx --data data.npz --flops 2x", "--flops 2x: give an amount such as 1.2G"),
        ("plan model.onnx --data data.npz --size 1KB --flops 0.5x", "--size and --flops both bound"),
        ("plan model.onnx --data data.npz --keep 0.5 --size 1KB", "--keep and --size both bound"),
        ("plan model.onnx --data data.npz --objective speed", "objective is 'speed'; allowed: "),
        ("plan model.onnx --data data.npz --keep 0.5 --pareto x.pdf", ".json or .svg"),
        ("plan model.onnx --data data.npz --keep 0.5 --pareto no/x.svg", "there is no folder no"),
        ("plan model.onnx --data data.npz --rank 2 --pareto x.svg", "--rank 2 already decides every form"),
        ("compile model.onnx -o out --force --data data.npz --keep 0.5 --pareto out/x.svg", "beside out"),
        ("verify nowhere", "nowhere"),
        ("bench out --original model.onnx --shape z:1x2", "'z'"),
        ("bench out --original model.onnx --batches 1,x", "--batches 1,x"),
        ("bench out --original model.onnx --prefill 4", "no cache"),
        ("bench out --original model.onnx --plot x.png", "is an .svg file"),
        ("export nowhere -o x.onnx", "nowhere"),
    ],
)
@pytest.mark.parametrize("json_too", [False, True])
def test_usage_errors(run: Run, words: str, message: str, json_too: bool) -> None:
    known = words.split()[:1] and words.split()[0] in COMMANDS
    assert message in failed(run(*words.split(), *(["--json"] if json_too and known else [])), 2)


def test_a_bad_model(home: Path, run: Run) -> None:
    (home / "bad.onnx").write_bytes(b"nothing")
    assert "bad.onnx" in failed(run("inspect", "bad.onnx"), 3)


def test_a_budget_that_cannot_be_met(run: Run) -> None:
    assert "--keep 0.01" in failed(
        run("plan", "model.onnx", "--data", "data.npz", "--keep", "0.01", "--json"), 1
    )


@pytest.mark.parametrize(
    ("flag", "value", "least"), [("--size", "100", "bytes (2"), ("--flops", "0.01x", "FLOPs (")]
)
def test_amounts_that_cannot_be_met(run: Run, flag: str, value: str, least: str) -> None:
    said_ = failed(run("plan", "model.onnx", "--data", "data.npz", flag, value, "--json"), 1)
    assert f"{flag} {value}" in said_ and "the least that can be kept is 0.0" in said_ and least in said_


def test_outputs_that_moved_too_far(home: Path, run: Run) -> None:
    words = (
        "compile",
        "model.onnx",
        "-o",
        "far",
        "--data",
        "data.npz",
        "--keep",
        "0.3",
        "--max-error",
        "cosine=0.99999",
    )
    last = failed(run(*words, "--json"), 1)
    assert re.search(
        r"cosine is 0\.\d+, cosine=0.99999 was asked for; that is the best reached within --keep 0\.3, which kept 0\.",
        last,
    )
    assert not (home / "far").exists()


def test_a_damaged_folder(home: Path, run: Run) -> None:
    shutil.copytree(home / "out", home / "damaged")
    (home / "damaged/extra").write_text("x")
    assert "extra" in failed(run("verify", "damaged", "--json"), 1)


def test_a_build_that_runs_out_of_time(run: Run) -> None:
    words = (
        "compile",
        "model.onnx",
        "-o",
        "late",
        "--data",
        "data.npz",
        "--keep",
        "0.5",
        "--timeout",
        "0.0001",
    )
    assert "time limit" in failed(run(*words), 4)


def test_our_own_bugs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*words: object, **named: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("lrcompile.commands.inspect", broken)
    result = run("inspect", "model.onnx")
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "bug of lrcompile" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compile_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    model = write_model(tmp_path)
    (tmp_path / "data.py").write_text(
        "import time, numpy, pathlib\n"
        "def load_data():\n"
        "    yield {'x': numpy.ones((2, 16), numpy.float32)}\n"
        "    pathlib.Path('started').touch()\n"
        "    time.sleep(60)\n"
    )
    before = set(tmp_path.iterdir()) | {tmp_path / "started", tmp_path / "cache"}
    words = ["compile", str(model), "-o", "out", "--data", "data.py", "--keep", "0.5", "--cache", "cache"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lrcompile", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # whoever runs the tests may ignore it
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    for _ in range(600):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; nothing is left behind"
    assert set(tmp_path.iterdir()) <= before
    assert not list(tmp_path.glob("cache/scratch/*"))  # which may not have been made yet
