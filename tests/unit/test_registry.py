"""Finding plugins: built-ins by listing, third parties by entry points, and a sentence for what is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lrcompile import registry
from lrcompile.errors import PluginError, UsageError

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a third party's distribution: one module, and entry points of one group."""

    def make(module: str, code: str, group: str, **entries: str) -> None:
        folder = tmp_path / module
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        lines = [f"{name} = {module}:{attribute}" for name, attribute in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[lrcompile.{group}]", *lines]))
        monkeypatch.syspath_prepend(str(folder))

    return make


def test_built_ins_are_the_files_of_the_folder() -> None:
    assert {"svd", "svd-plain", "dense"} <= set(registry.factorizations())
    assert {"reference", "ort"} <= set(registry.runtimes())
    for name, plugin in {**registry.factorizations(), **registry.runtimes()}.items():
        assert plugin.name == name
    assert registry.factorization("svd").name == "svd"
    assert registry.runtime_of("ort-cpu").name == "ort"


@pytest.mark.parametrize(
    ("ask", "name", "words"),
    [
        (
            registry.factorization,
            "svdd",
            ["unknown factorization 'svdd'", "did you mean 'svd'", "known: ", "dense, "],
        ),
        (registry.factorization, "xyzzy", ["unknown factorization 'xyzzy'; known: "]),
        (registry.runtime_of, "ort-cpuu", ["unknown target", "did you mean 'ort-cpu'", "reference"]),
    ],
)
def test_an_unknown_name_lists_the_known_ones(
    ask: Callable[[str], object], name: str, words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        ask(name)
    assert all(word in str(caught.value) for word in words)


def test_third_parties_give_a_tuple_or_one(install: Install) -> None:
    code = "class F:\n    def __init__(self, name): self.name = name\none = F('t-one')\nmore = (F('t-two'), F('t-three'))\n"
    install("third_good", code, "factorizations", one="one", more="more")
    assert {"t-one", "t-two", "t-three"} <= set(registry.factorizations())
    assert registry.factorization("t-two").name == "t-two"


def test_what_cannot_be_imported_fails_only_when_asked_for(install: Install) -> None:
    install("third_missing", "import tensorrt_rtx_not_there.x\nplugins = ()\n", "runtimes", lost="plugins")
    assert "lost" not in registry.runtimes()
    assert registry.runtime_of("ort-cpu").name == "ort"
    assert "tensorrt_rtx_not_there" in registry.missing()["lost"]
    with pytest.raises(PluginError, match=r"target 'lost' cannot be loaded: .*No module named"):
        registry.runtime_of("lost")
    with pytest.raises(UsageError, match=r"unknown target 'lots'.*not loaded: lost"):
        registry.runtime_of("lots")


def test_a_third_partys_bug_is_its_own_trouble(install: Install) -> None:
    install("third_broken", "1 / 0\n", "factorizations", broken="plugins")
    assert "svd" in registry.factorizations()
    with pytest.raises(PluginError, match="'broken' cannot be loaded: ZeroDivisionError"):
        registry.factorization("broken")


def test_two_of_one_name_are_refused_and_both_named(install: Install) -> None:
    install("third_double", "class F: name = 'svd'\nplugins = (F(),)\n", "factorizations", again="plugins")
    with pytest.raises(
        PluginError, match=r"two factorizations are named 'svd': lrcompile_passes\.svd and .*third_double"
    ):
        registry.factorizations()


def test_two_runtimes_of_one_target_are_refused(install: Install) -> None:
    code = "class R:\n    name = 'other'\n    def targets(self): return ('ort-cpu',)\nplugins = (R(),)\n"
    install("third_target", code, "runtimes", other="plugins")
    with pytest.raises(PluginError, match="'ort-cpu' is offered by two runtimes, ort and other"):
        registry.runtime_of("ort-cpu")


def test_what_has_no_name_is_no_plugin(install: Install) -> None:
    install("third_nameless", "plugins = (object(),)\n", "factorizations", nameless="plugins")
    with pytest.raises(PluginError, match="it has no name"):
        registry.factorizations()


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        ("tensorrt", 'pip install "lrcompile[tensorrt]"'),
        ("tensorrt_rtx", 'pip install "lrcompile[tensorrt-rtx]"'),
        ("torch.nn", 'pip install "lrcompile[torch]"'),
        ("somebody_elses", "pip install somebody-elses"),
    ],
)
def test_the_remedy_is_the_extra_that_brings_the_module(
    install: Install, monkeypatch: pytest.MonkeyPatch, module: str, remedy: str
) -> None:
    requirements = [
        "numpy>=1.26",
        "torch>=2.8; extra == 'torch'",
        "tensorrt>=10.9; extra == 'tensorrt'",
        "tensorrt-rtx>=1.2; extra == 'tensorrt-rtx'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: requirements)
    name = f"third_needs_{module.replace('.', '_')}"
    install(
        name, f"raise ModuleNotFoundError('it is not here', name={module!r})\n", "runtimes", needy="plugins"
    )
    assert registry.missing()["needy"].endswith(remedy)
