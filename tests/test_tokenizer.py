"""Tokenizers: BPE rebuilt from GGUF, chat prompts, stop and mask tokens, streamed text."""

from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids, load_tokenizer, unused_token
from dspark_jax.engine.text import TextStream

QWEN = Path(__file__).parent / "data" / "tokenizer_qwen_plain"
CONTROL = ["<|end|>", "<|user|>", "<|assistant|>", "<reserved_0>"]
DEFINED = "<tool>"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ã ©"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_gguf(path, **changes):
    """A GGUF file of a small byte-level BPE tokenizer; None removes a key."""
    tokens = [*CONTROL, DEFINED, *sorted(ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    types = [3] * len(CONTROL) + [4] + [1] * (len(tokens) - len(CONTROL) - 1)
    values = {
        "ggml.model": "gpt2",
        "ggml.pre": "smollm",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": MERGES,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 0,
        "chat_template": TEMPLATE,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        name = f"tokenizer.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("tokenizer") / "smollm.gguf"))


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("gpt-2", ["hello", "Ġ", "123", "4"]),
        ("smollm", ["hello", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["hello", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["hello", "Ġ", "123", "4"]),
    ],
)
def test_named_pre_tokenizers_cut_digits_as_the_model_was_trained(split, expected, tmp_path):
    changes = {"ggml__pre": split, "ggml__add_bos_token": False}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", **changes))
    assert pieces(tokenizer, "hello 1234") == expected


def test_qwen_text_is_normalised(tmp_path):
    decomposed = "e\N{COMBINING ACUTE ACCENT}"
    tokenizers = [
        load_tokenizer(write_gguf(tmp_path / "t.gguf", ggml__pre=split))
        for split in ("qwen2", "smollm")
    ]
    assert [pieces(tokenizer, decomposed) for tokenizer in tokenizers] == [["Ã©"], ["e", "Ì", "ģ"]]


def test_special_tokens_are_matched_before_the_merges(tokenizer):
    text = "<|user|>hello<tool>"
    assert pieces(tokenizer, text) == ["<|user|>", "hello", "<tool>"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "hello<tool>"


def test_the_first_token_is_added_where_the_file_says_so(tmp_path):
    for changes, first in (
        ({"ggml__add_bos_token": True}, "<|user|>"),
        ({"ggml__add_bos_token": False}, "hello"),
        ({}, "hello"),
        ({"ggml__pre": "llama-bpe"}, "<|user|>"),
    ):
        tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", **changes))
        assert pieces(tokenizer, "hello")[0] == first


@given(st.text(max_size=30))
def test_encoding_and_decoding_is_the_identity(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=20), cuts=st.lists(st.integers(1, 4), min_size=100, max_size=100))
def test_streamed_text_adds_up_and_holds_no_half_characters(tokenizer, text, cuts):
    ids, stream, shown = tokenizer.encode(text), TextStream(tokenizer), []
    while ids:
        size = cuts[len(shown) % len(cuts)]
        shown.append(stream.push(ids[:size]))
        ids = ids[size:]
    assert all(text.startswith("".join(shown[:end])) for end in range(len(shown) + 1))
    assert "".join(shown) + stream.finish() == text


def test_a_stream_that_ends_inside_a_character_shows_what_is_there(tokenizer):
    stream, ids = TextStream(tokenizer), tokenizer.encode("a🙂")
    assert [stream.push([index]) for index in ids[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.finish() == ""


@pytest.mark.smoke
def test_chat_prompts_end_where_the_answer_begins(tokenizer):
    ids = chat_prompt_ids(tokenizer, "hello")
    assert tokenizer.decode(ids) == "<|user|>hello<|end|><|assistant|>"
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "3"},
    ]
    text = tokenizer.decode(chat_prompt_ids(tokenizer, turns))
    assert text == "<|user|>hello<|end|><|assistant|>12<|end|><|user|>3<|end|><|assistant|>"


def test_a_model_without_chat_template_reads_plain_text(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", chat_template=None))
    assert tokenizer.decode(chat_prompt_ids(tokenizer, "hello")) == "hello"


@pytest.mark.parametrize("prompt", ["", " \n", [], [{"role": "user", "content": ""}]])
def test_an_empty_prompt_is_refused(prompt, tokenizer):
    with pytest.raises(ValueError, match="prompt is empty"):
        chat_prompt_ids(tokenizer, prompt)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for %}", "{{ messages.__class__.mro() }}"]
)
def test_a_template_that_fails_is_an_error_of_one_line(template, tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", chat_template=template))
    with pytest.raises(LoadError, match="the chat template refuses the prompt") as caught:
        chat_prompt_ids(tokenizer, "hello")
    assert "\n" not in str(caught.value)


def test_the_mask_token_is_one_that_no_text_contains(tokenizer, tmp_path):
    size = len(tokenizer)
    assert unused_token(tokenizer, size) == CONTROL.index("<reserved_0>")
    assert unused_token(tokenizer, size + 5) == size
    qwen = load_tokenizer(QWEN)
    with pytest.raises(ValueError, match="no unused special token"):
        unused_token(qwen, len(qwen))
    qwen.add_special_tokens({"mask_token": "<mask>"})
    assert unused_token(qwen, len(qwen)) == len(qwen) - 1


BROKEN = {
    "WordPiece": {"ggml__model": "bert"},
    "an unknown pre-tokenizer": {"ggml__pre": "tekno"},
    "no tokens": {"ggml__tokens": None},
    "tokens of another kind": {"ggml__tokens": [1, 2, 3]},
    "a merge of unknown tokens": {"ggml__merges": ["zz yy"]},
    "a merge of one token": {"ggml__merges": ["h"]},
    "fewer types than tokens": {"ggml__token_type": [1, 1]},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_or_foreign_tokenizer_is_refused(fault, tmp_path):
    path = write_gguf(tmp_path / "t.gguf", **BROKEN[fault])
    with pytest.raises(LoadError) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(LoadError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_code_of_a_model_is_never_executed(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
    )
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(LoadError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    assert not marker.exists()
