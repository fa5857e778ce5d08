"""Tokenizers: files as they stand, BPE rebuilt from GGUF, chat prompts, streamed text."""

import json
import logging
import shutil
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from dspark_jax.checkpoints.gguf_splits import CUTS
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.checkpoints.tokenizer import (
    chat_prompt_ids,
    ids_without_token,
    load_tokenizer,
    unused_token,
)
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
        ("default", ["hello", "Ġ", "123", "4"]),
        ("gpt-2", ["hello", "Ġ", "123", "4"]),
        ("smollm", ["hello", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["hello", "Ġ", "1", "2", "3", "4"]),
        ("qwen35", ["hello", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["hello", "Ġ", "123", "4"]),
        ("llama-v3", ["hello", "Ġ", "123", "4"]),
        ("tekken", ["hello", "Ġ", "1", "2", "3", "4"]),
        ("gpt-4o", ["hello", "Ġ", "123", "4"]),
        ("deepseek-llm", ["hello", "Ġ", "123", "4"]),
        ("deepseek-v3", ["hello", "Ġ", "123", "4"]),
    ],
)
def test_named_pre_tokenizers_cut_digits_as_the_model_was_trained(split, expected, tmp_path):
    changes = {"ggml__pre": split, "ggml__add_bos_token": False}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", **changes))
    assert pieces(tokenizer, "hello 1234") == expected


TEXTS = {
    "It's 12345, DON'T!\n\n x/y//\n": {
        "default": "It|'|s| |123|45|,| DON|'|T|!|\n\n| x|/|y|//|\n",
        "gpt-2": "It|'s| 12345|,| DON|'|T|!|\n\n| x|/|y|//|\n",
        "smollm": "It|'s| |1|2|3|4|5|,| DON|'|T|!|\n\n| x|/|y|//|\n",
        "llama-bpe": "It|'s| |123|45|,| DON|'T|!\n\n| x|/y|//\n",
        "qwen2": "It|'s| |1|2|3|4|5|,| DON|'T|!\n\n| x|/y|//\n",
        "tekken": "It|'s| |1|2|3|4|5|,| DON|'T|!\n\n| x|/y|//\n",
        "gpt-4o": "It's| |123|45|,| DON'T|!\n\n| x|/y|//\n",
        "deepseek-llm": "It|'|s| |12345|,| DON|'|T|!|\n|\n| x|/|y|//|\n",
        "deepseek-v3": "It|'s| |123|45|,| DON|'T|!\n\n| x|/y|//\n",
    },
    "fooBar ÉCole日本 e\u0301": {
        "llama-bpe": "fooBar| ÉCole日本| e|\u0301",
        "qwen2": "fooBar| ÉCole日本| e|\u0301",
        "qwen35": "fooBar| ÉCole日本| e\u0301",
        "tekken": "foo|Bar| ÉCole日本| e\u0301",
        "gpt-4o": "foo|Bar| ÉCole日本| e\u0301",
        "deepseek-v3": "fooBar| ÉCole|日本| e\u0301",
    },
}


@pytest.mark.parametrize(
    ("text", "name"), [(text, name) for text, cuts in TEXTS.items() for name in cuts]
)
def test_texts_are_cut_as_llama_cpp_cuts_them(text, name):
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in CUTS[name].patterns]
    words = [word for word, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]
    assert "|".join(words) == TEXTS[text][name]


@pytest.mark.parametrize("name", CUTS)
def test_no_pre_tokenizer_loses_text(name):
    text = "Ab's 1234½ É日本\r\n\t <|x|> —\u3000。 🙂"
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in CUTS[name].patterns]
    words = pre_tokenizers.Sequence(steps).pre_tokenize_str(text)
    assert "".join(word for word, _ in words) == text


def test_a_file_that_names_no_pre_tokenizer_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_tokenizer(write_gguf(tmp_path / "said.gguf"))
        assert not caplog.records
        tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", ggml__pre=None))
    assert "t.gguf: no tokenizer.ggml.pre" in caplog.text
    assert "'default' is assumed" in caplog.text
    assert pieces(tokenizer, "1234") == ["123", "4"]


def test_what_ends_a_text_by_its_name_is_a_control_token(tmp_path):
    tokens = [*CONTROL, DEFINED, *sorted(ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["<|im_end|>"]
    types = [1] * len(tokens)
    changes = {"ggml__tokens": tokens, "ggml__token_type": types}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", **changes))
    assert pieces(tokenizer, "hello<|im_end|>") == ["hello", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b"), skip_special_tokens=True) == "ab"


def test_pieces_that_are_merged_have_spaces_and_bytes(tmp_path):
    tokens = ["<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "a", "b", "ab", "▁ab", "\n", "\n\n", "<turn|>"]
    changes = {
        "ggml__model": "gemma4",
        "ggml__pre": None,
        "ggml__tokens": tokens,
        "ggml__token_type": [3, 3, 2] + [6] * 256 + [1] * 7 + [3],
        "ggml__merges": ["a b", "▁ ab", "\n \n"],
        "ggml__add_bos_token": False,  # as some files have it
    }
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", **changes))
    text = "ab ab\n\n\na é<turn|>"
    expected = ["<bos>", "ab", "▁ab", "\n\n", "\n", "a", "▁", "<0xC3>", "<0xA9>", "<turn|>"]
    assert pieces(tokenizer, text) == expected
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text[:-7]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "Unheard"])
def test_the_file_is_the_truth_whatever_the_class_says(name, tmp_path):
    tokenizer = Tokenizer.from_file(str(QWEN / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": name, "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    for text in ("x 1212 hello", "e\u0301 don't", "<|im_end|>\n"):
        assert loaded.encode(text) == tokenizer.encode(text).ids
    assert loaded.decode(chat_prompt_ids(loaded, "hi")) == "<|user|>hi<|end|><|assistant|>"


def test_a_broken_file_beside_the_tokenizer_is_named(tmp_path):
    shutil.copytree(QWEN, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(LoadError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_directory_whose_tokenizer_is_missing_is_no_empty_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(LoadError, match=r"no tokenizer\.json, no tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_ids_without_token(tokenizer, tmp_path):
    size = len(tokenizer)
    assert ids_without_token(tokenizer, size) == ids_without_token(tokenizer, 3) == ()
    assert ids_without_token(tokenizer, size + 3) == (size, size + 1, size + 2)
    shutil.copytree(QWEN, tmp_path / "holes")
    path = tmp_path / "holes" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    moved = next(reversed(content["model"]["merges"]))
    moved = "".join(moved.split(" ") if isinstance(moved, str) else moved)
    hole, vocabulary[moved] = vocabulary[moved], 1000
    path.write_text(json.dumps(content))
    holed = load_tokenizer(tmp_path / "holes")
    assert hole in ids_without_token(holed, 1001)
    assert 1000 not in ids_without_token(holed, 1001)
    assert unused_token(holed, 1001) not in holed.get_vocab().values()


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
