"""The repository itself: what the wheel holds, that pins and links are complete, that conventions are kept.

Cheap: nothing is installed and no network is used.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = {
    "lrcompile": ROOT / "lrcompile",
    "lrcompile_passes": ROOT / "passes" / "lrcompile_passes",
    "lrcompile_runtimes": ROOT / "runtimes" / "lrcompile_runtimes",
}
FOLDERS = (
    "benchmarks",
    "changelog.d",
    "docs/adr",
    "examples",
    "lrcompile",
    "models",
    "passes",
    "runtimes",
    "tests/contract",
)
FILES = (
    ".ci/run",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "docs/stability.md",
)
# What only the CUDA builds of torch bring; the pins were tested with a CPU build.
CUDA = re.compile(r"nvidia-|cuda-|triton$")


# --- layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FOLDERS)
def test_folder_is_there(path: str) -> None:
    assert (ROOT / path).is_dir()


@pytest.mark.parametrize("path", FILES)
def test_file_is_there(path: str) -> None:
    assert (ROOT / path).stat().st_size > 0


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_every_top_level_folder_with_python_code_is_known() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("[!.]*/**/*.py")} - {"build"}
    assert found <= {"benchmarks", "examples", "lrcompile", "models", "passes", "runtimes", "tests"}


def test_no_runtime_shadows_the_package_it_wraps() -> None:
    names = {path.stem for path in PACKAGES["lrcompile_runtimes"].glob("*.py")}
    assert not names & {"onnxruntime", "tensorrt", "tensorrt_rtx", "torch"}


def test_ci_runs_make_test_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    commands = [
        line
        for line in script.read_text("utf-8").splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == ["make test"]


def test_every_lint_rule_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for key in ("select", "ignore"):
        block = re.search(rf"^{key} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        assert block is not None
        lines = block[1].splitlines()
        assert lines
        assert not [line for line in lines if not re.fullmatch(r' *"[A-Z0-9]+", *# \S.*', line)]


# --- wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    version = PYPROJECT["project"]["version"]
    info = f"lrcompile-{version}.dist-info"
    expected = {
        f"{package}/{path.relative_to(root).as_posix()}"
        for package, root in PACKAGES.items()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(info)} == expected
    assert {name.split("/", 1)[1] for name in names if name.startswith(info)} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_packages_import_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" + "".join(
        f"import {name}; assert list({name}.__path__) == [sys.argv[1] + '/{name}'], {name}.__path__\n"
        for name in PACKAGES
    )
    # -I: neither the working folder nor PYTHONPATH may lend a hand
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# --- constraints --------------------------------------------------------------------------------------------------


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    found: dict[str, Version] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9.]*)", line)
        assert pin, f"not an exact pin of a released version: {line!r}"
        name = canonicalize_name(pin[1])
        assert name not in found, f"pinned twice: {name}"
        found[name] = Version(pin[2])
    return found


def declared() -> Iterator[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    yield from map(Requirement, PYPROJECT["build-system"]["requires"])
    yield from map(Requirement, project["dependencies"])
    for extra in ("cpu", "torch", "tensorrt-rtx", "dev"):
        yield from map(Requirement, extras[extra])


def test_constraints_pin_every_declared_dependency() -> None:
    pinned = pins()
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt lacks {name}"
        assert pinned[name] in requirement.specifier, (
            f"constraints.txt pins {name} {pinned[name]}, wanted is {requirement}"
        )


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the pins are those of Python 3.11")
def test_constraints_pin_what_the_dependencies_bring() -> None:
    pinned = pins()
    todo, seen = list(declared()), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or CUDA.match(name):
            continue
        seen.add(key)
        assert name in pinned, f"constraints.txt lacks {name}"
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            extras = {"", *requirement.extras}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    assert {name for name, _ in seen} == set(pinned), "constraints.txt pins what nothing needs"


# --- documents ----------------------------------------------------------------------------------------------------


def documents() -> list[Path]:
    return sorted(
        [
            *ROOT.glob("*.md"),
            *ROOT.glob("docs/**/*.md"),
            *ROOT.glob("changelog.d/*.md"),
            *ROOT.glob("examples/**/*.md"),
        ]
    )


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{target} does not exist"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{target}: no such heading"


def test_decisions_are_numbered_without_gaps() -> None:
    names = sorted(path.name for path in (ROOT / "docs" / "adr").glob("*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    assert all(re.fullmatch(r"\d{4}(-[a-z0-9]+)+\.md", name) for name in names)


def test_change_notes_have_a_known_kind() -> None:
    kinds = {kind["directory"] for kind in PYPROJECT["tool"]["towncrier"]["type"]}
    for path in (ROOT / "changelog.d").iterdir():
        if path.name == "README.md":
            continue
        note = re.fullmatch(r"(\+[a-z0-9-]+|\d+)\.([a-z]+)\.md", path.name)
        assert note, f"not a change note: {path.name}"
        assert note[2] in kinds, f"{path.name}: the kind is one of {sorted(kinds)}"
        assert path.read_text("utf-8").strip()


def test_no_deprecation_is_overdue() -> None:
    here = Version(PYPROJECT["project"]["version"])
    for package in PACKAGES.values():
        for path in package.rglob("*.py"):
            for promised in re.findall(r"removed in lrcompile (\d+(?:\.\d+)*)", path.read_text("utf-8")):
                assert here < Version(promised), f"{path.relative_to(ROOT)}: was to be removed in {promised}"
