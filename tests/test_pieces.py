"""SentencePiece vocabularies: tokens as the sentencepiece library and llama.cpp find them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids, load_tokenizer
from dspark_jax.engine.text import TextStream
from tests.test_tokenizer import write_gguf

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "a", "b", "ab", "▁ab", "ba", "▁▁", "é", "abab"]
TEXTS = ["<unk>", "<s>", "</s>", *BYTES, *WORDS, "<tool>"]
KINDS = [2, 3, 3] + [6] * 256 + [1] * len(WORDS) + [4]
SCORES = [0.0] * 259 + [-5.0, -4.0, -3.0, -1.0, -2.0, -1.5, -6.0, -7.0, -8.0, 0.0]
ID = {text: index for index, text in enumerate(TEXTS)}


def model(kind=2, **normalizer):
    """A SentencePiece model of these pieces; BPE, or 1 for unigram."""
    found = ModelProto()
    found.trainer_spec.model_type = kind
    found.trainer_spec.byte_fallback = True
    found.normalizer_spec.remove_extra_whitespaces = False
    for name, value in normalizer.items():
        setattr(found.normalizer_spec, name, value)
    for text, score, of_kind in zip(TEXTS, SCORES, KINDS, strict=True):
        found.pieces.add(piece=text, score=score, type=of_kind)
    return found


def write_model(directory, found=None, config=None, **files):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes((found or model()).SerializeToString())
    for name, value in {"tokenizer_config": config or {}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def write_pieces(path, **changes):
    """The same pieces in a GGUF file."""
    values = {
        "ggml__model": "llama",
        "ggml__pre": None,
        "ggml__merges": None,
        "ggml__tokens": TEXTS,
        "ggml__token_type": KINDS,
        "ggml__scores": SCORES,
        "ggml__eos_token_id": None,
        "ggml__bos_token_id": None,
    }
    return write_gguf(path, **(values | changes))


@pytest.fixture(scope="module", params=["tokenizer.model", "GGUF"])
def loaded(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces")
    if request.param == "GGUF":
        return load_tokenizer(write_pieces(path / "t.gguf"))
    return load_tokenizer(write_model(path))


LIBRARY = SentencePieceProcessor(model_proto=model().SerializeToString())


@given(st.text(alphabet="ab é<>\n中🙂\x00", max_size=40))
def test_ids_are_those_of_the_library(loaded, text):
    assert loaded.encode(text, add_special_tokens=False) == LIBRARY.encode(text)


@given(st.text(alphabet="ab é<>\n中🙂", max_size=40))
def test_a_text_comes_back(loaded, text):
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text


CHARACTERS = [(1,), (2,), (125,), (198, 172), *((index,) for index in range(259, 269))]


@given(st.lists(st.sampled_from(CHARACTERS), max_size=12))
def test_streamed_text_adds_up(loaded, characters):
    ids, stream = [index for ids in characters for index in ids], TextStream(loaded)
    shown = [stream.push([index]) for index in ids] + [stream.finish()]
    assert "".join(shown) == loaded.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("kind", "normalizer"),
    [
        (1, {}),
        (2, {"add_dummy_prefix": False}),
        (2, {"remove_extra_whitespaces": True}),
        (1, {"remove_extra_whitespaces": True, "add_dummy_prefix": False}),
    ],
)
def test_other_kinds_of_models_are_cut_as_the_library_does(kind, normalizer, tmp_path):
    found = model(kind, **normalizer)
    library = SentencePieceProcessor(model_proto=found.SerializeToString())
    tokenizer = load_tokenizer(write_model(tmp_path, found))
    for text in ("ab", " ab  ba ", "abab abba\nab", "  ", "é ab<tool> ab 中", ""):
        assert tokenizer.encode(text, add_special_tokens=False) == library.encode(text), text


def test_a_text_begins_with_bos_unless_the_files_deny_it(tmp_path):
    for said, first in ((None, "<s>"), (True, "<s>"), (False, "▁ab")):
        changes = {} if said is None else {"add_bos_token": said}
        directory = write_model(tmp_path / str(said), config=changes)
        path = write_pieces(
            tmp_path / "t.gguf", **{f"ggml__{key}": value for key, value in changes.items()}
        )
        assert load_tokenizer(directory).tokenize("ab", add_special_tokens=True)[0] == first
        assert load_tokenizer(path).tokenize("ab", add_special_tokens=True)[0] == first


def test_special_tokens_are_those_of_the_model_where_no_file_names_others(tmp_path):
    roles = ("bos_token", "eos_token", "unk_token")
    tokenizer = load_tokenizer(write_model(tmp_path / "bare"))
    assert [getattr(tokenizer, role) for role in roles] == ["<s>", "</s>", "<unk>"]
    named = write_model(tmp_path / "named", special_tokens_map={"eos_token": {"content": "ba"}})
    tokenizer = load_tokenizer(named)
    assert [getattr(tokenizer, role) for role in roles] == ["<s>", "ba", "<unk>"]
    tokenizer = load_tokenizer(write_pieces(tmp_path / "t.gguf"))
    assert [getattr(tokenizer, role) for role in roles] == ["<s>", "</s>", "<unk>"]


def test_a_space_is_put_in_front_of_every_part_or_of_the_first(tmp_path):
    text, rest = "ab</s>ab", [ID["</s>"]]
    every = load_tokenizer(write_model(tmp_path / "every"))
    first = load_tokenizer(write_model(tmp_path / "first", config={"legacy": False}))
    none = load_tokenizer(write_pieces(tmp_path / "t.gguf", ggml__add_space_prefix=False))
    for tokenizer, words in ((every, ("▁ab", "▁ab")), (first, ("▁ab", "ab")), (none, ("ab", "ab"))):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [ID[words[0]], *rest, ID[words[1]]]


def test_tokens_besides_the_pieces_keep_their_ids(tmp_path):
    decoder = {
        "270": {"content": "<x>", "special": True},
        "259": {"content": "_", "special": False},
    }
    directory = write_model(
        tmp_path, config={"added_tokens_decoder": decoder}, added_tokens={"<y>": 300}
    )
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("<x>_<y>", add_special_tokens=False)
    assert ids == [270, 259, 300]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "_<y>"


def test_tokens_tell_where_they_lie_in_the_text(loaded):
    text = "ab é</s> ba中"
    encoded = loaded(text, add_special_tokens=False, return_offsets_mapping=True)
    assert loaded.is_fast
    words = [text[first:last] for first, last in encoded["offset_mapping"]]
    assert words[:4] == ["ab", " ", "é", "</s>"]
    assert words[-3:] == ["中"] * 3  # its bytes


def test_long_texts_are_cut_in_little_time_and_alike(loaded):
    text = "abba ab " * 2000
    assert loaded.encode(text, add_special_tokens=False) == LIBRARY.encode(text)


def test_the_chat_template_lies_beside_the_model(tmp_path):
    directory = write_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("<s>{{ messages[0].content }}</s>")
    tokenizer = load_tokenizer(directory)
    assert chat_prompt_ids(tokenizer, "ab") == [1, ID["▁ab"], 2]


def test_equal_scores_are_joined_from_the_left(tmp_path):
    path = write_pieces(tmp_path / "t.gguf", ggml__scores=[0.0] * len(TEXTS))
    tokenizer = load_tokenizer(path)
    assert tokenizer.tokenize("babab") == ["▁", "ba", "ba", "b"]


def test_user_defined_pieces_are_found_as_they_stand(tmp_path):
    texts = [*TEXTS, "  "]
    kinds, scores = [*KINDS, 4], [*SCORES, 0.0]
    changes = {"ggml__tokens": texts, "ggml__token_type": kinds, "ggml__scores": scores}
    tokenizer = load_tokenizer(write_pieces(tmp_path / "t.gguf", **changes))
    ids = tokenizer.encode("ab  ba<tool>", add_special_tokens=False)
    assert ids == [ID["▁ab"], len(TEXTS), ID["▁"], ID["ba"], ID["<tool>"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab   ba<tool>"


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\xff" * 40])
def test_a_file_of_another_kind_is_refused_by_name(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(LoadError, match=r"tokenizer\.model.*no SentencePiece model") as caught:
        load_tokenizer(tmp_path)
    assert "tiktoken" not in str(caught.value)


def test_broken_pieces_are_refused(tmp_path):
    for fault in ({"ggml__scores": [1.0]}, {"ggml__tokens": [*TEXTS[:-1], "a"]}):
        with pytest.raises(LoadError, match=r"t\.gguf: broken tokenizer"):
            load_tokenizer(write_pieces(tmp_path / "t.gguf", **fault))
