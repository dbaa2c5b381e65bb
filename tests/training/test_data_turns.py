"""Where a user's turn begins and ends in a chat template."""

from __future__ import annotations

import pytest

from dspark.errors import CapabilityError
from dspark.text import TextCodec
from dspark.training.data_turns import answer_end, question_marks
from tests.test_engine import make_codec
from tests.training.data_toys import EOS, TEMPLATE


def codec_of(template: str | None) -> TextCodec:
    codec = make_codec()
    codec.tokenizer.chat_template = template
    return codec


def test_the_prefix_is_what_stands_before_the_question_in_a_real_prompt() -> None:
    codec = codec_of(TEMPLATE)
    marks = question_marks(codec)
    assert codec.tokenizer.decode(marks.prefix) == "s:be brief<eos>u:"
    assert (marks.end_token, marks.end_text) == (EOS, "<eos>")
    prompt = codec.encode_chat([{"role": "user", "content": "why?"}])
    assert tuple(prompt[: len(marks.prefix)]) == marks.prefix
    assert prompt[len(marks.prefix) + len(codec.encode_plain("why?"))] == EOS
    assert answer_end(codec) == EOS


def test_a_turn_may_end_in_ordinary_text() -> None:
    codec = codec_of(
        "{% for m in messages %}[{{ m.role[0] }}] {{ m.content }}\n{% endfor %}[a] ".replace(
            "\n", " ;"
        )
    )
    marks = question_marks(codec)
    assert codec.decode(marks.prefix) == "[u] "
    assert (marks.end_token, marks.end_text) == (None, " ;[a]")
    assert answer_end(codec) == EOS  # the tokenizer's own


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}u:{{ m.content | upper }}<eos>{% endfor %}", "changes, drops"),
        ("{% for m in messages %}u:<eos>{% endfor %}", "changes, drops"),
        ("{% for m in messages %}{{ m.content }}<eos>{% endfor %}", "nothing before"),
        ("{% for m in messages %}u:{{ m.content }}{% endfor %}", "nothing after"),
        ("{% for m in messages %}u:{{ m.content }}/{{ m.content }}<eos>{% endfor %}", "repeats"),
        ("{{ raise_exception('no user') }}", "no user"),
    ],
)
def test_templates_that_do_not_allow_it_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(CapabilityError, match=message):
        question_marks(codec_of(template))
