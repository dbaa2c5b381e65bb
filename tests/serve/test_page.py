"""The built-in page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import dspark
from tests.serve.browser import CHROMIUM, Browser, browsing
from tests.serve.toys import Running, serving, toy_engine

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

DONE = "document.body && document.body.dataset.state === 'done'"
TINTED = "[...document.querySelectorAll('.text .d')].map((node) => node.textContent).join('')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as own:
        yield own


def texts(browser: Browser, selector: str) -> list[Any]:
    """The texts of all elements that a selector finds."""
    list_of = f"[...document.querySelectorAll({json.dumps(selector)})]"
    return list(browser.value(f"{list_of}.map((node) => node.textContent)"))


def test_an_answer_is_shown_with_its_drafted_parts_tinted(toy: Running, browser: Browser) -> None:
    browser.size(1280, 900)
    browser.open(f"{toy.url}/?ask=Hello&compare=1&tokens=20")
    browser.wait(DONE)
    prompt = [{"role": "user", "content": "Hello"}]
    (result,) = toy_engine().generate([prompt], dspark.SamplingParams(max_tokens=20))
    assert texts(browser, ".user") == ["Hello"]
    assert texts(browser, ".text") == [result.text, result.text]
    assert len(browser.value(TINTED)) == result.stats.accepted > 0
    first, second = texts(browser, ".figures")
    assert f"20 tokens \u00b7 {result.stats.accepted_length:.2f} tau" in first
    assert "1.00 tau" in second
    (verdict,) = texts(browser, ".verdict")
    assert verdict.endswith("the speed of plain decoding, the same text.")
    assert browser.errors == []


@pytest.mark.parametrize("is_dark", [True, False])
def test_nothing_is_wider_than_a_phone(toy: Running, browser: Browser, is_dark: bool) -> None:
    browser.size(390, 844, is_dark=is_dark)
    browser.open(f"{toy.url}/?ask={'Hello' * 20}&compare=1&tokens=16")
    browser.wait(DONE)
    assert browser.value("document.documentElement.scrollWidth") == 390
    tops = browser.value(
        "[...document.querySelectorAll('.pane')].map((n) => n.getBoundingClientRect().top)"
    )
    assert tops[0] < tops[1]  # one above the other
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    red = int(ground.removeprefix("rgb(").partition(",")[0])
    assert (red < 64) is is_dark


def test_questions_are_typed_and_the_talk_goes_on(toy: Running, browser: Browser) -> None:
    browser.size(1280, 900)
    browser.open(toy.url + "/")
    browser.wait("document.getElementById('model')?.textContent === 'toy'")
    browser.value("$('tokens').value = 8")
    for text in ("One", "Two"):
        browser.value("delete document.body.dataset.state")
        browser.value(f"$('question').value = '{text}'; $('send').click()")
        browser.wait(DONE)
    first, second = texts(browser, ".text")
    params = dspark.SamplingParams(max_tokens=8)
    messages = [{"role": "user", "content": "One"}]
    engine = toy_engine()
    (alone,) = engine.generate([messages], params)
    assert first == alone.text
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Two"},
    ]
    (later,) = engine.generate([messages], params)
    assert second == later.text
    browser.value("$('clear').click()")
    assert texts(browser, ".text") == []


def test_a_key_is_asked_for_and_an_error_shown(browser: Browser) -> None:
    with serving(toy_engine(), api_keys=("good",), max_tokens=50) as running:
        browser.open(running.url + "/")
        browser.wait("!$('door').hidden && $('send').disabled")
        for key in ("bad", "good"):
            browser.value(f"$('key').value = '{key}'; $('door').requestSubmit()")
            browser.wait("$('wrong').textContent || model")
        browser.wait("model === 'toy' && $('door').hidden")
        browser.value("$('tokens').value = 99; talk('<b>Hi</b>')")
        browser.wait(DONE)
        assert texts(browser, ".user") == ["<b>Hi</b>"]  # as text
        (error,) = texts(browser, ".error:not(#wrong)")
        assert error == "max_tokens is 99, but this server gives at most 50."


def test_an_answer_can_be_stopped(browser: Browser) -> None:
    engine = toy_engine()
    engine.target.pause = 0.05  # type: ignore[attr-defined]
    with serving(engine) as running:
        browser.open(f"{running.url}/?ask=Hello&tokens=200")
        browser.wait("document.querySelector('.text')?.textContent.length > 3")
        browser.value("$('send').click()")
        browser.wait(DONE)
        assert texts(browser, ".figures") == ["stopped"]
        running.wait_idle()
        assert engine.stats.cancelled == 1
