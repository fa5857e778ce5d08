"""Where a text ends: what files say and names give away, in one set of ids."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from dspark_jax.checkpoints.chat import end_of_answer
from dspark_jax.checkpoints.ends import end_ids, known_ends
from dspark_jax.checkpoints.load import open_target
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.checkpoints.tokenizer import load_tokenizer
from dspark_jax.engine.reader import Reader
from dspark_jax.engine.request import Request
from dspark_jax.engine.text import special_id
from tests.test_tokenizer import CONTROL, write_gguf
from tests.tiny_model import write_target


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["a", "<|im_end|>", "<|endoftext|>", "<|im_start|>"], [1, 2]),
        (["<end_of_turn>", "x", "<EOT>", "<eos>"], [0, 2, 3]),
        (["<|end|>", "<|user|>"], [0]),
        (["<|end|>", "<|return|>", "<|call|>"], [1, 2]),  # the end of a thought, here
        (["<|end|>", "<|return|>"], [0, 1]),
        (["</s>", "<turn|>", "<|tool_response>"], [1, 2]),
        (["</s>", "<turn|>"], [0, 1]),
        (["<|im_end|> ", "im_end"], []),
    ],
)
def test_names_that_end_a_turn(tokens, ends):
    assert known_ends(tokens) == ends


def test_ends_keep_the_order_in_which_they_are_found():
    stated = [("a", [7, 5]), ("b", 2), ("c", None), ("d", [5])]
    assert end_ids(stated, 10, known=(9, 7, 30)) == (7, 5, 2, 9)


def test_an_end_outside_the_vocabulary_is_left_out_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert end_ids([("here", [3, 10, -1])], 10) == (3,)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["here", "here"]
    assert "the id 10 is not among the target's, 0..9" in caplog.text


@pytest.mark.parametrize("value", ["2", [1, "2"], True, 1.0, {"id": 1}, [[1]]])
def test_an_end_of_another_type_is_refused(value):
    with pytest.raises(LoadError, match=r"config: eos_token_id is .* an id or a list of ids"):
        end_ids([("config: eos_token_id", value)], 10)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("ends") / "t.gguf"
    return load_tokenizer(write_gguf(path, ggml__eos_token_id=3))


def test_an_answer_ends_with_what_the_template_writes(tokenizer, tmp_path):
    assert end_of_answer(tokenizer, (3,)) == CONTROL.index("<|end|>")
    plain = load_tokenizer(write_gguf(tmp_path / "t.gguf", chat_template=None))
    assert end_of_answer(plain, (0, 2)) == 0
    assert end_of_answer(plain, (2, 1)) == 2  # its own end of sequence is not one of the target's
    headless = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    headless += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    plain.chat_template = headless  # a line break ends an answer, which is no end of a text
    assert end_of_answer(plain, (0,)) == 0


def test_a_special_token_is_known_by_its_name(tokenizer):
    named = {text: special_id(tokenizer, text) for text in ("<|end|>", " <|user|>\n", "<tool>")}
    assert named == {"<|end|>": 0, " <|user|>\n": 1, "<tool>": None}  # a tool is shown
    assert [special_id(tokenizer, text) for text in ("", "h", "hello", "<|end|>x")] == [None] * 4
    assert special_id(SimpleNamespace(decode=str), "<|end|>") is None


def read(tokenizer, ids, **limits):
    """What a reader makes of tokens that come one by one."""
    reader = Reader(Request([1], 20, **limits), 20, tokenizer)
    for number, token in enumerate(ids):
        report = SimpleNamespace(
            count_B=np.array([1]),
            finite_B=np.array([True]),
            token_BC=np.array([[token]]),
            verified_B=np.array([0]),
            accepted_B=np.array([0]),
            confidence_logit_BG=None,
        )
        reader.read(report, 0, number == 0)
    return reader.result


def test_a_stop_string_that_no_text_shows_is_matched_by_its_id(tokenizer):
    hello = tokenizer.encode("hello", add_special_tokens=False)
    ids = [*hello, CONTROL.index("<|user|>"), *hello, 3]
    for stop in ("<|user|>", ["never", "<|user|>"], "<|user|>\n"):
        result = read(tokenizer, ids, stop_ids=(3,), stop_strings=stop)
        assert (result.text, result.finish_reason, result.end_id) == ("hello", "stop", 1)
    result = read(tokenizer, ids, stop_ids=(3,), stop_strings=["<|assistant|>"])
    assert (result.text, result.finish_reason, result.end_id) == ("hellohello", "stop", 3)
    result = read(tokenizer, ids, stop_strings="lo")
    assert (result.text, result.finish_reason, result.end_id) == ("hel", "stop", None)


def test_one_string_is_one_stop_string():
    assert Request([1], stop_strings="abc").stop_strings == ("abc",)
    with pytest.raises(ValueError, match="stop string is empty"):
        Request([1], stop_strings="")


def test_a_target_whose_texts_have_no_end_is_warned_about(tmp_path, caplog):
    directory = write_target(tmp_path / "target")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    with caplog.at_level(logging.WARNING):
        open_target(directory)
        assert not caplog.records
        path.write_text(json.dumps(config | {"eos_token": None}))
        (directory / "special_tokens_map.json").unlink(missing_ok=True)
        assert open_target(directory)[0].stop_ids == ()
    assert "nothing says where its texts end" in caplog.text


def test_ends_of_a_directory(tmp_path):
    """generation_config.json counts, and config.json where the other says nothing."""
    directory = write_target(tmp_path / "target")
    own = load_tokenizer(directory).eos_token_id
    config = json.loads((directory / "config.json").read_text())

    def ends(generation, **changes):
        (directory / "config.json").write_text(json.dumps(config | changes))
        (directory / "generation_config.json").write_text(json.dumps(generation))
        return open_target(directory)[0].stop_ids

    assert ends({}, eos_token_id=None) == (own,)
    assert ends({}, eos_token_id=5) == (5, own)
    assert ends({"eos_token_id": [7, 5]}, eos_token_id=6) == (7, 5, own)
    assert ends({"eos_token_id": own}, eos_token_id=6) == (own,)
    with pytest.raises(LoadError, match=r"config.json: eos_token_id is '5'"):
        ends({}, eos_token_id="5")
