"""Text as tokens arrive: no piece is lost, doubled or shown too early."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from dspark.errors import CapabilityError, CheckpointError, DataError
from dspark.output import OutputText
from dspark.text import Detokenizer, TextCodec, load_codec
from tests.conftest import CHARACTERS

_TRAINING = [
    "the cat sat on the mat, the end. ",
    "naïve café — 日本語 日本 🙂🙂 👩‍👩‍👧 ",
    "  a\n\n\tb  c ",
] * 4

TEXTS = st.text(
    st.one_of(
        st.sampled_from("the cat., \n\t"),
        st.sampled_from("éïüß—日本語€🙂👩\u200d\u0301\ufffd"),
        CHARACTERS,
    ),
    max_size=40,
)


def _codec(model: tokenizers.Tokenizer) -> TextCodec:
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return TextCodec(transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names))


@functools.cache
def byte_level() -> TextCodec:
    """BPE over bytes (GPT-2, Llama 3, Qwen, SmolLM2): a character may be cut anywhere."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(_TRAINING, trainer)
    return _codec(model)


_PIECES = ["▁", "▁▁", "▁the", "the", "▁cat", "s", "at", "▁é", "日", "e", "t", "h", "c", "a"]


@functools.cache
def byte_fallback(*, strips: bool) -> TextCodec:
    """Pieces with spaces as ▁ and bytes for what has no piece (Llama 2, Gemma)."""
    names = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), *_PIECES]
    vocab = {name: i for i, name in enumerate(names)}
    bpe = tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=names[0])
    model = tokenizers.Tokenizer(bpe)
    model.add_special_tokens(["<bos>", "<eos>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strips else [])])
    return _codec(model)


def ids_of(*names: str) -> list[int]:
    return byte_fallback(strips=True).tokenizer.convert_tokens_to_ids(list(names))


def bytes_of(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


def pieces_of(codec: TextCodec, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(codec)
    pieces = [detokenizer.push([token]) for token in tokens]
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces


@given(TEXTS)
@example("🙂" * 9)
@example("\ufffd" * 3)
def test_pieces_are_the_text_and_never_hold_half_a_character(text: str) -> None:
    codec = byte_level()
    tokens = codec.encode_plain(text)
    pieces = pieces_of(codec, tokens)
    assert "".join(pieces) == codec.decode(tokens) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 329), max_size=60))
def test_pieces_are_the_decoded_text_for_any_byte_tokens(tokens: list[int]) -> None:
    """A model may emit invalid UTF-8 and end tokens anywhere."""
    codec = byte_level()
    known = [token % len(codec.tokenizer) for token in tokens]
    assert "".join(pieces_of(codec, known)) == codec.decode(known)


@given(
    st.lists(
        st.one_of(
            st.sampled_from([[piece] for piece in (*_PIECES, "<bos>", "<eos>")]),
            st.sampled_from([bytes_of(c) for c in "é€🙂"]),
        ),
        max_size=30,
    ),
    st.booleans(),
)
@example([["s"], *[["<eos>"]] * 7, ["▁the"]], True)
@example([bytes_of("🙂"), bytes_of("🙂"), bytes_of("€"), ["s"]], False)
def test_spaces_and_bytes_come_out_as_in_the_decoded_text(
    groups: list[list[str]], strips: bool
) -> None:
    """What comes before decides about a space, and a run of bytes is decoded as a whole."""
    codec = byte_fallback(strips=strips)
    tokens = ids_of(*(name for group in groups for name in group)) if groups else []
    pieces = pieces_of(codec, tokens)
    assert "".join(pieces) == codec.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_held_back_until_the_end() -> None:
    detokenizer = Detokenizer(byte_fallback(strips=False))
    first, *rest = ids_of(*bytes_of("🙂"))
    assert detokenizer.push(ids_of("s")) == "s"
    assert detokenizer.push([first]) == ""
    assert detokenizer.push(rest[:2]) == ""
    assert detokenizer.finish() == "\ufffd" * 3
    assert detokenizer.finish() == ""


def shown(codec: TextCodec, tokens: list[int], stop: tuple[str, ...]) -> tuple[str, str, bool]:
    """Run tokens through OutputText as the engine does.

    Returns:
        What was shown, the text at the end, whether a stop string ended it.
    """
    output, out = OutputText(codec, stop), ""
    for token in tokens:
        stopped = output.push(token, is_drafted=token % 2 == 0)
        if stopped:
            break
        out += "".join(piece.text for piece in output.take(is_final=False))
        assert not any(s in out for s in stop)
        assert output.text.startswith(out)
        held = len(output.text) - len(out)
        assert held <= max(len(s) for s in (*stop, "x")) - 1
    else:
        stopped = output.finish()
    out += "".join(piece.text for piece in output.take(is_final=True))
    assert output.take(is_final=True) == []
    return out, output.text, stopped


@given(TEXTS, st.lists(st.text("the ca🙂日", min_size=1, max_size=6), min_size=0, max_size=3))
def test_the_text_ends_before_the_stop_string_that_comes_first(text: str, stop: list[str]) -> None:
    codec = byte_level()
    out, full, stopped = shown(codec, codec.encode_plain(text), tuple(stop))
    assert out == full
    assert stopped == any(s in text for s in stop)
    if not stopped:
        assert out == text
    else:
        assert text.startswith(out)
        assert not any(s in out for s in stop)
        assert any(text.startswith(s, len(out)) for s in stop)


@given(TEXTS.filter(bool), st.data())
def test_a_stop_string_over_several_tokens_is_found(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    codec, stop = byte_level(), text[start:end]
    out, _, stopped = shown(codec, codec.encode_plain(text), (stop,))
    assert stopped
    assert out == text[: text.index(stop)]


def test_no_piece_shows_the_beginning_of_a_stop_string() -> None:
    codec = byte_level()
    output = OutputText(codec, ("STOP",))
    for letter in "abSTO":
        output.push(*codec.encode_plain(letter), is_drafted=True)
        taken = output.take(is_final=False)
        assert not any("S" in piece.text for piece in taken)
    assert output.push(*codec.encode_plain("P"), is_drafted=False)
    assert "".join(piece.text for piece in output.take(is_final=True)) == ""
    assert output.text == "ab"


def test_what_was_held_back_comes_out_at_the_end() -> None:
    codec = byte_level()
    output = OutputText(codec, ("longer than this",))
    for token in codec.encode_plain("the end"):
        output.push(token, is_drafted=True)
    assert output.take(is_final=False) == []
    assert not output.finish()
    assert "".join(piece.text for piece in output.take(is_final=True)) == "the end"


def test_what_the_decoder_held_back_can_complete_a_stop_string() -> None:
    codec = byte_level()
    (lead, *_) = [t for t in codec.encode_plain("ÿ") if codec.decode([t]) == "\ufffd"]
    output = OutputText(codec, ("\ufffd",))
    assert not output.push(lead, is_drafted=False)
    assert output.finish()
    assert output.text == ""


def test_pieces_say_whether_their_token_was_drafted() -> None:
    codec = byte_level()
    output = OutputText(codec, ())
    for letter, is_drafted in zip("abc", (False, True, False), strict=True):
        output.push(*codec.encode_plain(letter), is_drafted=is_drafted)
    taken = output.take(is_final=False)
    assert [(p.text, p.is_drafted) for p in taken] == [("a", False), ("b", True), ("c", False)]


def test_without_a_codec_there_is_no_text() -> None:
    output = OutputText(None, ())
    assert not output.push(5, is_drafted=False)
    assert not output.finish()
    assert (output.text, output.take(is_final=True)) == ("", [])


def test_chat_messages_need_a_template_that_takes_them() -> None:
    codec = _codec(byte_level().tokenizer.backend_tokenizer)
    with pytest.raises(CapabilityError, match="no chat template"):
        codec.encode_chat([{"role": "user", "content": "hi"}])
    codec.tokenizer.chat_template = "{{ raise_exception('only a user may speak') }}"
    with pytest.raises(DataError, match="only a user may speak"):
        codec.encode_chat([{"role": "system", "content": "hi"}])
    codec.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert codec.decode(codec.encode_chat([{"role": "user", "content": "hi"}])) == "<hi>"


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        byte_level().encode("\udc80")


def test_a_damaged_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    assert load_codec(tmp_path) is None
    byte_level().tokenizer.save_pretrained(tmp_path)
    codec = load_codec(tmp_path)
    assert codec is not None
    assert codec.encode_plain("the cat") == byte_level().encode_plain("the cat")
    for damage in ("{", "[]", json.dumps({"model": {"type": "none"}})):
        (tmp_path / "tokenizer.json").write_text(damage)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_codec(tmp_path)
