"""The report: same bytes from the same manifest, safe whatever names hold, and saying what a reader must know."""

from __future__ import annotations

import copy
import dataclasses
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from lrcompile.records import TradeoffPoint
from lrcompile.report import render, tradeoff_file
from lrcompile.report.text import clean, cosine, figure, short, tail

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
HOSTILE = (
    "<script>alert(1)</script>", '"><img src=http://evil.example/x onerror=alert(1)>', "a & b 'c' {{ 7 * 7 }} {% raw %}", "$\\frac$",
    "层/مرحبا/🙂", "line\nbreak\ttab\x00nul\x1b[31m\x85", "\u202eright to left", "\ud800", "§0§ §1§", "]]></svg><!-- -->", "very_long" * 2000,
)  # fmt: skip


class Page(HTMLParser):
    """Keeps the open tags, and everything a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.loaded.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        if tag in ("td", "th", "li", "p"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def site(name: str = "layer/MatMul", **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "op": "MatMul", "weight_shape": [64, 64], "method": "svd", "rank": 24, "storage": "float",
        "parameters_before": 4096, "parameters_after": 3072, "claimed_error": 0.125, "measured_error": 0.12,
        "reason": "one ratio for all, 0.750", **changes,
    }  # fmt: skip


def dense(
    name: str = "table/Gather", op: str = "Gather", reason: str = "a table takes no part"
) -> dict[str, Any]:
    return site(
        name, op=op, method="dense", rank=None, storage=None, parameters_after=4096, claimed_error=None, measured_error=None,
        reason=reason,
    )  # fmt: skip


def output(**changes: Any) -> dict[str, Any]:
    figures = {"relative_l2": 0.0312, "snr_db": 30.1, "cosine": 0.9995, "max_abs": 0.5, "noise_floor": 8.4e-7}
    return {**figures, "kl": None, "top1": None, **changes}


def manifest(*sites: dict[str, Any], **evidence: Any) -> dict[str, Any]:
    """A small manifest as `publish` makes it. `manifest()` has one rewritten site and a table."""
    lines = list(sites) or [dense(), site()]
    decisions = [{"group": s["name"], "sites": [s["name"]], "bound": True} for s in lines]
    return {
        "format": 1,
        "source": {"sha256": "ab" * 32, "weights_sha256": {"model.data": "cd" * 32}},
        "target": "ort-cpu",
        "plan": {"target": "ort-cpu", "decisions": decisions, "notes": [], "ratio": None},
        "sites": lines,
        "totals": {
            "parameters_before": 8500, "parameters_after": 7476, "bytes_before": 34000, "bytes_after": 29904,
            "flops_before": 8192, "flops_after": 6144,
        },
        "evidence": {
            "outputs": {"logits": output()}, "engine": "ran", "held_out": "heldout.npz", "verdict": "passed", "metric": None,
            "failures": [], **evidence,
        },
    }  # fmt: skip


def checked(document: dict[str, Any], *notes: str) -> Page:
    """The page, after what must hold for every one of them."""
    text = render(document, notes)
    text.encode()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    assert [u for u in page.loaded if not u.startswith("#")] == []
    assert {u[1:] for u in page.loaded} <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)", text)
    return page


def test_equal_manifests_give_equal_bytes() -> None:
    document = manifest()
    assert render(document, ("a note",)) == render(copy.deepcopy(document), ("a note",))


def test_settings_of_the_user_s_matplotlib_change_nothing() -> None:
    import matplotlib as mpl

    expected = render(manifest(), ())
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "svg.hashsalt": None, "axes.grid": False}):
        assert render(manifest(), ()) == expected
        assert mpl.rcParams["font.size"] == 30


def test_files_of_the_manifest_are_not_read() -> None:
    assert render({**manifest(), "files": {"report.html": {"bytes": 1, "sha256": "00"}}}, ()) == render(
        manifest(), ()
    )


def test_no_path_no_clock_and_no_version_of_a_library_is_told() -> None:
    text = render(manifest(), ())
    assert not re.search(
        r"(?<![<\w.])/(?:work|home|tmp|usr|root)\b|\b20[2-9]\d-\d\d|[Mm]atplotlib|https?:", text
    )


def test_the_verdict_comes_first_and_says_that_no_limit_was_set() -> None:
    document = {**manifest(), "config": {"keep": 0.9, "seed": 7}}
    text = checked(document).text
    assert "Passed: 1 of 2 weights rewritten; constants 34.0 kB → 29.9 kB (−12.0 %)" in text
    assert "output logits moved by 3.12 % (relative L2); no limit was set." in text
    assert text.index("Passed:") < text.index("What it cost")
    assert "seed 7" in text


def test_a_limit_is_named() -> None:
    text = checked({**manifest(), "config": {"max_error": "cosine=0.99"}}).text
    assert "judged by --max-error cosine=0.99, which holds." in text
    assert "config.yaml says whether" in checked(manifest()).text  # a manifest without its settings


def test_unchanged_says_why() -> None:
    sites = [
        dense(),
        dense("a/MatMul", "MatMul", "no form held <the> limit"),
        dense("b/MatMul", "MatMul", "no form held <the> limit"),
    ]
    still = output(relative_l2=0.0, snr_db=None, cosine=1.0, max_abs=0.0)
    page = checked(manifest(*sites, verdict="unchanged", outputs={"y": still}))
    assert "Unchanged: none of 3 weights was rewritten" in page.text
    assert "no form held <the> limit (2 weights)" in page.text
    assert "svg" not in page.tags
    assert "∞" in page.text


def test_a_model_without_weights_or_outputs() -> None:
    document = manifest(verdict="unchanged", outputs={})
    document["sites"], document["plan"]["decisions"] = [], []
    document["totals"] = dict.fromkeys(document["totals"], 0)
    assert "no node multiplies or gathers a constant weight" in checked(document).text


def test_failed_names_what_failed() -> None:
    text = checked(manifest(verdict="failed", failures=["y: cosine is 0.5, cosine=0.99 was asked for"])).text
    assert "Failed:" in text
    assert "y: cosine is 0.5, cosine=0.99 was asked for" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    document = manifest(site(name, op=name, reason=name), dense(name + "2", reason=name), site(name + "3"))
    document["evidence"].update(outputs={name: output()}, held_out=name, engine=name, failures=[name])
    document["source"]["weights_sha256"] = {name: "ef" * 32}
    document["config"] = {"include": name}
    page = checked(document, name)
    assert "img" not in page.tags
    if len(name) < 100:
        assert " ".join(str(clean(name)).split()) in page.text
    assert page.tags.count("svg") == 2


def test_three_hundred_sites() -> None:
    document = manifest(
        *(
            site(f"model.layers.{i}/MatMul", measured_error=i / 3000, claimed_error=i / 2900)
            for i in range(300)
        )
    )
    page = checked(document)
    assert page.text.count("layers.299/MatMul MatMul 64 × 64 svd 24 float 4,096 3,072 0.103 0.0997") == 1
    assert "w300" in page.ids
    assert len(render(document, ())) < 300_000


def test_thousands_of_sites_share_bars() -> None:
    page = checked(manifest(*(site(f"{i}") for i in range(2100))))
    assert "Each bar is 6 weights in a row" in page.text


def test_figures_that_do_not_exist() -> None:
    nothing = output(relative_l2=None, snr_db=None, cosine=None, noise_floor=None)
    sites = [
        site("a", claimed_error=None, measured_error=None, rank=None),
        site("b", weight_shape=[], claimed_error=0.0, measured_error=0.0),
    ]
    text = checked(manifest(*sites, outputs={"y": nothing, "z": output()})).text
    assert "output y moved by up to 0.500 (relative L2 has no finite value)" in text
    assert "y – – – – 0.500" in text


def test_logits_and_the_metric_are_shown() -> None:
    text = checked(
        manifest(outputs={"logits": output(kl=0.0031, top1=0.981), "y": output()}, metric=[12.31, 14.02])
    ).text
    assert "KL, nats" in text
    assert "0.00310 98.1" in text
    assert "12.3 for the original, 14.0 for the published model" in text
    assert "KL, nats" not in checked(manifest()).text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": "built, not run: no such GPU"}, "The engine was built, not run: no such GPU."),
        ({"held_out": "2 feeds drawn with seed 0"}, "The outputs were judged on random inputs."),
        ({"outputs": {"y": output(relative_l2=0.762)}}, "The outputs moved far. y by 76.2 %"),
    ],
)
def test_evidence_that_is_worth_less_is_warned_of(change: dict[str, Any], words: str) -> None:
    assert words in checked(manifest(**change)).text
    assert words not in checked(manifest()).text


def test_what_runs_and_where() -> None:
    nodes = {
        "MatMul (ai.onnx) on CPUExecutionProvider": 4,
        "SkipLayerNormalization (com.microsoft) on CUDAExecutionProvider": 2,
    }
    text = checked(manifest(nodes=nodes)).text
    assert (
        "6 operators are left after the runtime's own optimisations: 4 on CPUExecutionProvider, 2 on CUDAExecutionProvider."
        in text
    )
    assert "SkipLayerNormalization com.microsoft CUDAExecutionProvider 2" in text
    assert "Fused operators among them: normalization 2, skip normalization 2." in text
    built = checked(manifest(nodes=dict(list(nodes.items())[:1]), engine="built, not run: no such GPU")).text
    assert "The engine was built, not run: no such GPU. What was judged is its graph" in built
    assert "None of them is a fused operator." in built
    assert "What runs, and where" not in checked(manifest()).text  # of earlier versions


def test_svd_plain_is_warned_of() -> None:
    assert "svd-plain was used: the data was ignored." in checked(manifest(site(method="svd-plain"))).text
    assert "svd-plain" not in checked(manifest()).text


def test_codes_are_not_called_two_products() -> None:
    coded = site(method="dense", storage="int8", rank=None)
    document = manifest(coded)
    document["totals"]["flops_after"] = document["totals"]["flops_before"]
    text = checked(document).text
    assert "Weights in fewer bits save memory" in text and "two smaller products" not in text
    assert "rounded to 8 bits" not in text
    document["sites"] = [{**coded, "activations": "int8"}]
    text = checked(document).text
    assert "Products of rounded inputs are faster where" in text and "Weights in fewer bits save" not in text
    assert (
        "The inputs of 1 weight are rounded to 8 bits: for this question they were left as they are" in text
    )


def test_work_and_size_that_grew_are_warned_of() -> None:
    document = manifest()
    assert "Smaller, perhaps not faster." in checked(document).text
    assert "two smaller products" in checked(document).text and "fewer bits" not in checked(document).text
    document["totals"]["flops_after"] = 16384
    assert "Smaller, but more work. FLOPs went from 8,192 to 16,384 (+100.0 %)." in checked(document).text
    document["totals"]["bytes_after"] = 68000
    assert "Larger than the original." in checked(document).text
    document["totals"].update(bytes_after=29904, flops_after=1000)
    assert "Before you rely on it" not in checked(document).text


def test_errors_above_their_claims_are_warned_of() -> None:
    text = checked(manifest(site("good"), site("worse", measured_error=0.25))).text
    assert "Errors larger than claimed. 1 weight; the largest is #2, claimed 0.125, measured 0.250." in text
    assert "1 of 2 lies above it" in text
    rounding = site(storage="float16", claimed_error=0.0, measured_error=4e-4)
    assert "Errors larger" not in checked(manifest(rounding)).text


def test_notes_are_shown_once() -> None:
    document = manifest()
    document["plan"]["notes"] = ["said by the plan", "integers of n were copied"]
    text = checked(document, "integers of n were copied").text
    assert text.count("integers of n were copied") == 1
    assert "said by the plan" in text


def test_sites_that_are_factorized_together_share_a_figure() -> None:
    sites = [
        site("q", parameters_after=6144),
        site("k", parameters_after=0),
        site("shared", parameters_before=0, parameters_after=0),
    ]
    document = manifest(*sites)
    document["plan"]["decisions"] = [{"group": "qk", "sites": ["q", "k"], "bound": False}]
    page = checked(document)
    assert "The smallest share kept is 75.0 %." in page.text
    assert "Hollow points are claims that were estimates." in page.text


def tried(*points: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A curve as a compile saw it."""
    empty = dict.fromkeys((f.name for f in dataclasses.fields(TradeoffPoint)), None)
    made = [{**empty, "failures": [], **p} for p in points]
    limits = [{"name": "cosine", "value": 0.99, "relative": False}]
    return {"budget": "--max-error cosine=0.99", "limits": limits, "points": made, "predicted": [], "chosen": 0, "searched": True,
            "outcome": "smallest that holds cosine=0.99: half", **changes}  # fmt: skip


def point(kept: float, cosine: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "kept": kept,
        "bytes": int(kept * 34000),
        "cosine": cosine,
        "verdict": "passed",
        "moved": 0.002,
        "movement": 0.001,
        **changes,
    }


def test_the_curve_of_a_search_is_shown() -> None:
    document = manifest()
    curve = tried(point(0.5, 0.991), point(0.4, 0.9, verdict="failed", moved=0.2))
    page = checked({**document, "tradeoff": curve})
    assert "smallest that holds cosine=0.99: half" in page.text
    assert (
        "2 in all; 1 held cosine=0.99 (filled), 1 did not (hollow). The ringed one is published." in page.text
    )
    assert page.text.index("40.0 %") < page.text.index("50.0 %")  # the smallest first
    assert "passed, published" in page.text
    assert "what else was tried" not in checked({**document, "tradeoff": tried(point(0.5, 0.991))}).text
    assert "what else was tried" not in checked(document).text


@pytest.mark.parametrize("limit", ["snr", "kl", "metric", "top1", "relative_l2", "max_abs"])
def test_curves_of_every_limit_and_of_figures_that_are_missing(limit: str) -> None:
    """NaN and infinity came as null; an output may have no logits; a metric may have been zero."""
    limits = [{"name": limit, "value": 1.05, "relative": limit == "metric"}]
    name = "snr_db" if limit == "snr" else limit
    values = [(2.0, 2.2), (0.0, 1.0), None] if limit == "metric" else [0.3, 12.0, None]
    points = [point(0.3 + i / 10, None, moved=None, movement=None, **{name: v}) for i, v in enumerate(values)]
    for chosen in (None, 0, 2):
        checked({**manifest(), "tradeoff": tried(*points, limits=limits, chosen=chosen)})
    predicted = [point(k / 10, None, verdict=None, moved=None, movement=m) for k, m in ((3, 0.2), (10, 0.0))]
    file = tradeoff_file(tried(limits=limits, chosen=None, predicted=predicted))
    assert "var(--" not in file and file.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    ET.fromstring(file)
    assert "nothing on it was compiled" in file and "filled" not in file


def test_weights_that_move_the_outputs_are_ranked() -> None:
    document = manifest(*(site(f"layer{i}/MatMul") for i in range(15)))
    document["plan"]["decisions"] = [
        {"group": f"layer{i}/<b>", "sites": [f"layer{i}/MatMul"], "bound": True, "method": "svd", "rank": 3, "movement": float(i),
         "parameters_before": 100, "parameters_after": 50} for i in range(15)
    ]  # fmt: skip
    text = checked({**document, "tradeoff": tried(point(0.5, 0.991))}).text
    assert "Predicted in all: 105. Measured on the data that was held out: 0.00200." in text
    assert (
        text.index("layer14/<b>") < text.index("layer13/<b>") and "and 3 more, which move them less" in text
    )
    assert "predicted to move" not in checked(manifest()).text


def test_what_keep_counts_is_shown_beside_the_whole() -> None:
    document = manifest()
    assert (
        "all MatMul and Gemm weights 4,096 3,072 0.750 all parameters of the model 8,500 7,476 0.880"
        in checked(document).text
    )
    document["totals"].update(eligible_before=4096, eligible_after=3072)
    assert "the eligible weights, which --keep counts 4,096 3,072 0.750" in checked(document).text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"), (0.0, "0"), (0.0453, "0.0453"), (1.0, "1.00"), (12.345, "12.3"), (4310.0, "4,310"), (8.4e-7, "8.4e-7"),
        (-2.5, "−2.50"), (-8e-7, "−8.0e-7"), (3.2e12, "3.2e12"), (999.7, "1,000"), (float("inf"), "∞"), (float("nan"), "not a number"),
    ],
)  # fmt: skip
def test_numbers_read_well(value: float | None, words: str) -> None:
    assert figure(value) == words


def test_cosines_close_to_one_keep_their_digits() -> None:
    assert [cosine(v) for v in (0.8376, 0.99995, 1.0, None)] == ["0.8376", "1 − 5.0e-5", "1.0000", "–"]


def test_long_names_are_cut_in_the_middle_and_at_the_front() -> None:
    assert short("a" * 300 + "z", 90) == f"{'a' * 60} … {'a' * 29}z (301 characters)"
    assert tail("层" * 30 + "/x", 10) == f"…{'层' * 3}/x"
    assert tail("short", 10) == "short"
