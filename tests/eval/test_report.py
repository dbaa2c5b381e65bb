"""The page of `dspark report`: what it says, that it needs nothing, that nothing in it acts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dspark.engine import Engine
from dspark.eval.audit_report import Status
from dspark.eval.report import Page, build_page, render_html, render_markdown
from dspark.eval.results import RunFacts, build_header
from tests.conftest import random_target
from tests.eval.report_samples import (
    audit_results,
    bench_results,
    eval_cell,
    eval_results,
    header_of,
    profile_results,
    write,
)

EVIL = "<script>alert('$x$ & \"y\"')</script>|`*_[a](b)"
Files = Callable[..., list[Path]]


class Document(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif self._open:
            self.texts.setdefault(self._open[-1], []).append(data.strip())

    def values(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [value for _, own, value in self.attributes if own == name]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Write result files, named by their kind."""

    def make(*results: dict[str, Any]) -> list[Path]:
        names = [item["schema"] for item in results]
        kinds = [name.split(".")[1] for name in names]
        return [
            write(tmp_path, f"{kind}-{at}", item)
            for at, (kind, item) in enumerate(zip(kinds, results, strict=True))
        ]

    return make


@dataclass(frozen=True)
class Whole:
    """One file of each kind, and the page of all four."""

    results: list[dict[str, Any]]
    page: Page
    html: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, results = tmp_path_factory.mktemp("whole"), everything()
    results[0]["header"]["command"] = "</script><!-- <script> \u2028 ü"
    paths = [write(folder, f"result-{at}", item) for at, item in enumerate(results)]
    page = build_page(paths)
    return Whole(results=results, page=page, html=render_html(page))


def everything() -> list[dict[str, Any]]:
    """One file of each kind."""
    return [
        bench_results(concurrencies=(1, 2, 4)),
        eval_results(),
        profile_results(has_experts=True),
        audit_results(),
    ]


def html_of(paths: list[Path], **more: Any) -> str:
    return render_html(build_page(paths, **more))


def headline_of(*paths: Path) -> dict[str, str]:
    """Headlines by subject, figure and text in one; the last of each subject."""
    found = build_page(paths).headlines
    return {item.subject: f"{item.figure} {item.text}" for item in reversed(found)}


# -- it needs nothing --------------------------------------------------------------------------


def test_a_page_loads_nothing(whole: Whole) -> None:
    found = Document(whole.html)
    for name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "ping"):
        assert all(value.startswith("#") for value in found.values(name)), name
    assert not {"link", "iframe", "object", "embed", "img", "base", "form"} & set(found.tags)
    outside = whole.html
    for script in found.scripts[:-1]:  # the data; what the user typed may name addresses
        outside = outside.replace(script, "")
    assert "://" not in outside
    assert "@import" not in outside
    assert not re.findall(r"url\((?!#)", outside)


def test_no_script_but_the_pages_own_may_run(whole: Whole) -> None:
    found = Document(whole.html)
    digest = hashlib.sha256(found.scripts[-1].encode()).digest()
    (policy,) = (value for value in found.values("content") if "default-src" in value)
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]


def test_the_result_files_stand_in_the_page_unchanged(whole: Whole) -> None:
    found = Document(whole.html)
    assert [json.loads(script) for script in found.scripts[:-1]] == whole.results
    assert [list(json.loads(script)) for script in found.scripts[:-1]] == [
        list(item) for item in whole.results
    ]
    assert found.values("data-source") == ["data-1", "data-2", "data-3", "data-4"]
    assert [name for name in found.values("id") if name.startswith("data-")] == [
        "data-1",
        "data-2",
        "data-3",
        "data-4",
    ]


def test_ids_differ_and_all_references_lead_somewhere(whole: Whole) -> None:
    found = Document(whole.html)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    assert found.tags["figure"] > 5
    used = [value.removeprefix("#") for value in found.values("href") if value]
    used += re.findall(r"url\(#([^)]+)\)", whole.html)
    used += [name for value in found.values("aria-labelledby") for name in value.split()]
    assert used
    assert set(used) <= set(ids)


def test_the_same_files_make_the_same_page(files: Files) -> None:
    paths = files(bench_results(concurrencies=(1, 2)))
    assert html_of(paths) == html_of(paths)


def test_charts_follow_the_pages_colours(whole: Whole) -> None:
    text = whole.html
    charts = re.findall(r"<svg[^>]*class=\"chart\".*?</svg>", text, re.DOTALL)
    assert charts
    for chart in charts:
        assert not re.findall(r"#[0-9a-f]{6}\b", chart)
        assert "var(--series-" in chart
        assert "<style" not in chart
        assert "DejaVu" not in chart
    declared = set(re.findall(r"(--[a-z0-9-]+):", text))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", text)) <= declared


# -- nothing in it acts -------------------------------------------------------------------------


def evil_results() -> list[dict[str, Any]]:
    """Results in which everything that a user or a model names is markup."""
    cell = eval_cell("lookup", definitions=("vllm",))
    cell["name"] = cell["draft"]["id"] = cell["prompts"]["name"] = EVIL
    cell["by_category"] = {f"{EVIL}{i}": v for i, v in enumerate(cell["by_category"].values())}
    cell["failed"] = [{"question_id": EVIL, "error": EVIL}]
    cell["definitions"]["vllm"]["notes"] = [EVIL]
    acceptance = eval_results(cell)
    acceptance["header"]["command"] = acceptance["header"]["processor"] = EVIL
    acceptance["header"]["prompts"][0]["name"] = acceptance["header"]["drafts"][0]["id"] = EVIL
    acceptance["header"]["libraries"] = {EVIL: EVIL}
    speed = bench_results(speeds={"plain": 1.0, EVIL: 1.5}, processor=EVIL)
    speed["configurations"][1]["note"] = EVIL
    speed["figures"][-1]["failed"] = [{"question_id": EVIL, "error": EVIL}]
    audit = audit_results()
    audit["checks"][0]["name"] = audit["checks"][0]["evidence"] = EVIL
    audit["header"]["drafts"][0]["id"] = audit["header"]["processor"] = EVIL
    return [acceptance, speed, audit]


def test_texts_of_results_are_texts(files: Files) -> None:
    paths = files(*evil_results())
    text = html_of(paths, title=EVIL)
    found = Document(text)
    assert found.tags["script"] == len(paths) + 1
    assert "<script>alert" not in text
    assert not {"a-b", "b"} & set(found.tags)
    shown = [line for lines in found.texts.values() for line in lines]
    whole = " ".join(shown)
    assert whole.count("<script>alert('$x$ & \"y\"')</script>") > 15
    assert EVIL in found.texts["h1"]
    assert EVIL[:21] + "…" in found.texts["text"]  # a category beside a chart


def test_a_file_name_is_a_text(tmp_path: Path) -> None:
    path = write(tmp_path, 'a"><b>', audit_results())
    found = Document(html_of([path]))
    assert found.tags["b"] == 0
    assert found.values("download") == ['a"><b>.json']


def test_no_text_of_results_acts_in_markdown(files: Files) -> None:
    text = render_markdown(build_page(files(*evil_results()), title=EVIL))
    assert not re.findall(r"(?<!\\)<", text)
    assert not re.findall(r"(?<!\\)[`\[]", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in rows]
    for before, line, after in zip(bars, rows, bars[1:], strict=False):
        is_rule = set(line) <= set("|-: ")
        assert not is_rule or before == after


def test_what_cannot_be_shown_is_marked(files: Files) -> None:
    """Lone surrogates, control characters and turned writing neither act nor break the file."""
    cell = eval_cell("lookup")
    odd = "a\ud800b\x1bc\u202ed\x00e\nf"
    cell["by_category"] = {odd: cell["by_category"]["code"], "x": cell["by_category"]["writing"]}
    cell["draft"]["id"] = odd
    page = build_page(files(eval_results(cell)))
    for text in (render_html(page), render_markdown(page)):
        text.encode("utf-8")
        assert "a\ufffdb\ufffdc\ufffdd\ufffde f" in text
        assert not {"\x1b", "\u202e", "\x00"} & set(text)


# -- what it says --------------------------------------------------------------------------------


def test_headlines_are_the_files_figures(files: Files) -> None:
    bench, cell = bench_results(), eval_cell("lookup")
    speed, acceptance, audit = files(bench, eval_results(cell), audit_results())
    found = bench["figures"][1]
    gain, same = found["speedup"], found["same_text"]
    assert headline_of(speed)["lookup"] == (
        f"{gain['median']:.2f}× plain decoding (95 % {gain['low']:.2f} to {gain['high']:.2f}) at "
        f"concurrency 1; tau {found['tau']:.2f}; same text in {same['equal']} of 36 answers"
    )
    own = cell["acceptance"]
    low, high = own["tau_ci95"]
    assert headline_of(acceptance)["lookup"] == (
        f"tau {own['tau']:.2f} tokens per round (95 % {low:.2f} to {high:.2f}) over 12 prompts; "
        f"{100 * own['acceptance_rate']:.1f} % of drafted tokens accepted"
    )
    assert "no loss found" in headline_of(audit)["audit"]


@pytest.mark.parametrize(
    ("speed", "noise", "words"),
    [(0.8, 0.03, ", slower)"), (1.0, 0.3, ", not told apart)"), (1.5, 0.03, " at")],
)
def test_a_speedup_that_is_none_is_called_so(
    files: Files, speed: float, noise: float, words: str
) -> None:
    speeds = {"plain": 1.0, "lookup": speed}
    paths = files(bench_results(speeds=speeds, noise=noise, seed=3))
    line = headline_of(*paths)["lookup"]
    assert words in line
    assert ("slower" in line) == (speed < 1)
    assert ("told apart" in line) == (speed == 1)


def test_other_text_and_failures_are_in_the_headline(files: Files) -> None:
    results = bench_results(is_same_text=False)
    results["figures"][1]["failed"] = [{"question_id": 1, "error": "too long"}]
    (item,) = build_page(files(results)).headlines
    assert "same text in 33 of 36 answers; 1 failed" in item.text
    assert item.tone == "bad"


@pytest.mark.parametrize(
    ("audit", "figure"),
    [
        (audit_results(), "no loss found"),
        (audit_results(status=Status.FOUND), "loss found"),
        (audit_results(status=Status.INCONCLUSIVE), "not proven"),
    ],
)
def test_the_audits_verdict_is_a_headline(files: Files, audit: dict[str, Any], figure: str) -> None:
    (item,) = build_page(files(audit)).headlines
    assert item.figure == figure


def test_an_interrupted_audit_is_in_doubt(files: Files) -> None:
    (item,) = build_page(files(audit_results(is_interrupted=True))).headlines
    assert "interrupted" in item.text
    assert item.tone == "doubt"


def test_a_chart_needs_data(files: Files, whole: Whole) -> None:
    """No empty frames: what was not measured is not mentioned."""

    def charts(*results: dict[str, Any]) -> list[str]:
        return [c.title for s in build_page(files(*results)).sections for c in s.charts]

    plain = eval_results(eval_cell("none"))
    assert charts(plain, audit_results()) == []
    assert charts(bench_results()) == []
    assert charts(profile_results()) == ["Verification steps per second"]
    assert charts(bench_results(budgets=(3, 7, 15))) == ["Speed-up against tree budget"]
    assert [chart.title for section in whole.page.sections for chart in section.charts] == [
        "Throughput against per-user speed",
        "Speed-up against concurrency",
        "Tau by category",
        "Conditional acceptance",
        "Unconditional acceptance",
        "Reliability of confidence",
        "Verification steps per second",
    ]


def test_a_chart_holds_every_point_of_its_series(whole: Whole) -> None:
    results = whole.results[2]
    chart = [chart for section in whole.page.sections for chart in section.charts][-1]
    used = re.findall(r'<use x="([\d.]+)" y="([\d.]+)" style="([^"]*)"', chart.svg)
    assert [item.label for item in chart.legend] == [
        "64 tokens of context",
        "512 tokens of context",
    ]
    for series, context in zip(chart.legend, (64, 512), strict=True):
        color = f"var(--series-{series.style + 1})"
        marks = [(float(x), float(y)) for x, y, style in used if f"fill: {color}" in style]
        times = [p["seconds"]["median"] for p in results["points"] if p["context"] == context]
        assert len(marks) == len(times)
        heights = [y for _, y in sorted(marks)]
        assert heights == sorted(heights)  # more rows, fewer steps per second: further down
        rates = [1 / seconds for seconds in times]
        scale = (heights[-1] - heights[0]) / (rates[-1] - rates[0])
        expected = [heights[0] + scale * (rate - rates[0]) for rate in rates]
        assert heights == pytest.approx(expected, abs=0.05)  # in pixels


def test_many_series_are_spread_over_charts(files: Files) -> None:
    cells = [eval_cell(f"draft {at}", seed=at) for at in range(8)]
    sections = build_page(files(eval_results(*cells))).sections
    section = next(section for section in sections if section.name == "Acceptance")
    titles = [chart.title for chart in section.charts]
    assert "Conditional acceptance, 1 of 2" in titles
    shown = [x.label for c in section.charts if c.title.startswith("Cond") for x in c.legend]
    assert sorted(shown) == [f"draft {at}" for at in range(8)]
    for chart in section.charts:
        styles = [series.style for series in chart.legend]
        assert len(styles) == len(set(styles))


def test_definitions_are_those_of_the_words_on_the_page(files: Files, whole: Whole) -> None:
    always = {"rule", "exact mode"}
    evaluated = {"accept_len", "three means", "conditional acceptance", "unconditional acceptance"}
    evaluated |= {"tau", "ECE", "AUROC, Brier"}
    timed = {"speed-up", "time to first token (TTFT)", "time between tokens, between chunks"}
    meanings = {term.name: term.meaning for term in whole.page.terms}
    assert set(meanings) >= always | evaluated | timed | {"audit", "verification step"}
    assert "20 bins" in meanings["ECE"]
    alone = {term.name for term in build_page(files(audit_results())).terms}
    assert alone == always | {"audit"}


def test_the_set_up_says_what_ran_on_what(whole: Whole) -> None:
    text = render_markdown(whole.page)
    for fact in (
        "Example CPU @ 2.50GHz",
        "threads | 2 |",
        "smollm2-135m (llama, float32, 30 layers, fingerprint 5f5f5f5f5f5f)",
        "temperature 0, max tokens 48, rule greedy",
        "12 questions, sha256 abababababab",
        "commit c0c0c0c0c0c0",
        "torch 2.13.0",
        "dspark eval --draft lookup",
    ):
        assert fact.replace("_", "\\_") in text


def test_headers_of_the_samples_are_those_of_the_code() -> None:
    engine = Engine(random_target("llama"))
    made = build_header(engine, RunFacts(target="none", template="raw"))
    assert set(made) == set(header_of())
    assert set(made["exact"]) == set(header_of()["exact"])


def test_failed_and_skipped_are_listed(files: Files) -> None:
    results = bench_results()
    results["skipped"] = [{"configuration": "lookup", "concurrency": 64, "reason": "no room"}]
    cell = eval_cell("lookup")
    cell["failed"] = [{"question_id": 7, "error": "the prompt has 9000 tokens."}]
    text = render_markdown(build_page(files(results, eval_results(cell))))
    assert "| lookup | 64 | no room |" in text
    assert "| lookup | 7 | the prompt has 9000 tokens. |" in text
    assert "1 questions failed" in text


def test_an_interrupted_profile_is_named(files: Files) -> None:
    results = profile_results()
    for is_interrupted in (True, False):
        results["interrupted"] = is_interrupted
        text = render_markdown(build_page(files(results)))
        assert ("interrupted" in text) == is_interrupted
