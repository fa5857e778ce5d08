"""Grammars: what is refused, and texts that follow them whatever is drafted."""

import argparse
import dataclasses
import itertools
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dspark_jax.cli.command import main
from dspark_jax.cli.given import grammar_of
from dspark_jax.engine import guided
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.grammar import Grammar, Guide, goes_on, read_masks
from dspark_jax.engine.request import Request
from dspark_jax.models.targets.llama import encode
from dspark_jax.models.vocab import unembed
from pallas_kernels import random
from tests.test_generate import TARGET, drafter_of, generate, target_of


class Letters:
    """A tokenizer of the first letters; behind them are an end and a row without a token."""

    def __init__(self, letters):
        self._texts = dict(enumerate(letters))

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self._texts.get(index, "") for index in ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("yaml", "a"), "the grammar's kind is 'yaml': give one of"),
        ((["regex"], "a"), "the grammar's kind is"),
        (("regex", b"a"), "the grammar's text is b'a': give a text"),
        (("regex", ""), "the grammar's text is '' for regex: write one"),
        (("json_object", "{}"), "the grammar's text is '{}' for json_object: leave it out"),
        (("json_schema", "{"), "the schema is no JSON"),
        (("json_schema", "3"), "the schema is '3': give a JSON object"),
        (("json_schema", "[" * 10**5), "the schema is no JSON"),
        (("json_schema", {"type": "null"}), "the grammar's text is {'type': 'null'}: give a text"),
        (("lark", "\ud83d"), "the grammar's text has"),
    ],
)
def test_what_is_no_grammar_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Grammar(*fields)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "a(", r"\(regex\) does not compile: .*unclosed group"),
        ("lark", 'start: "a" b', r"\(lark\) does not compile: .*unknown name"),
        ("json_schema", '{"patternProperties": 3}', "Expected object for 'patternProperties'"),
    ],
)
def test_what_does_not_compile_is_refused_in_one_line(kind, text, message):
    with pytest.raises(ValueError, match=message) as error:
        Guide(Grammar(kind, text), Letters("ab"), 4, {2})
    assert "\n" not in str(error.value)


def test_a_grammar_needs_its_library_and_a_tokenizer(monkeypatch):
    with pytest.raises(ValueError, match="the engine has no tokenizer"):
        Guide(Grammar("regex", "a"), None, 4, {2})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'dspark-jax\[serve\]'"):
        Guide(Grammar("regex", "a"), Letters("ab"), 4, {2})


def bits(word_X, count):
    return [bool(word_X[i // 32] >> np.uint32(i % 32) & 1) for i in range(count)]


def test_masks_along_drafts_are_those_of_every_prefix():
    """Behind a draft that does not stand all is allowed, and stop ids are where a text may end."""
    tokens, stops = 40, {3, 35}
    guide = Guide(Grammar("regex", "a(b|ab)*"), Letters("ab?"), tokens, stops)
    for drafts, usable in (
        ([0, 1, 0, 1], 4),
        ([0, 2, 0, 0], 2),
        ([1, 0, 0, 0], 1),
        ([0, 35, 0, 0], 2),
    ):
        (word_CX,), (found,) = read_masks([(guide, drafts)], 5, tokens)
        assert found == usable
        fresh = Guide(Grammar("regex", "a(b|ab)*"), Letters("ab?"), tokens, stops)
        for column, token in enumerate([*drafts, None]):
            allowed = bits(word_CX[column], tokens)
            own = np.unpackbits(np.frombuffer(fresh.matcher.compute_bitmask(), np.uint8))
            own = own.reshape(-1, 8)[:, ::-1].reshape(-1)[:tokens].astype(bool)
            own[list(stops)] = fresh.accepting
            assert allowed == own.tolist()
            if token is None or not allowed[token] or token in stops:
                break
            fresh.take(token)
        assert all(all(bits(word_X, tokens)) for word_X in word_CX[column + 1 :])
    assert not guide.accepting  # nothing was taken


def test_a_grammar_that_ends_and_one_that_does_not_go_on():
    guide = Guide(Grammar("regex", "ab?"), Letters("ab"), 4, ())
    assert [guide.take(0), guide.take(1)] == [False, True]
    assert guide.accepting
    assert goes_on([guide], 4) == [False]
    guide.restart([0])
    assert goes_on([guide], 4) == [True]
    with pytest.raises(ValueError, match="the text cannot follow its grammar"):
        guide.take(0)
    dead = Guide(Grammar("regex", "a[0-9]"), Letters("ab"), 4, ())
    dead.take(0)
    assert (goes_on([dead], 4), dead.accepting) == ([False], False)


def test_tokens_may_be_parts_of_characters():
    """A tokenizer of bytes, as most are; special tokens are no text, and rows may be left over."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*alphabet, "<end>"])}
    made = Tokenizer(BPE(vocabulary, []))
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    guide = Guide(Grammar("regex", " <end>é"), tokenizer, 300, {256})
    ids = [vocabulary[text] for text in "Ġ<end>Ã©"]
    ((word_CX,), _) = read_masks([(guide, ids)], 9, 300)
    allowed = [[i for i, may in enumerate(bits(word_X, 300)) if may] for word_X in word_CX]
    assert allowed == [*([index] for index in ids), [256]]


def test_a_schema_comes_from_a_file(tmp_path, capsys):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "null"}')
    args = argparse.Namespace(json_schema=path)
    assert grammar_of(args) == Grammar("json_schema", path.read_text())
    path.write_text("{")
    assert main(["generate", "hello", "--json-schema", str(path)]) == 2
    assert f"{path}: the schema is no JSON" in capsys.readouterr().err


# A vocabulary of three letters, an end (here a dot) and a row without a token.
SIZE, END, LENGTH, PROMPT, TEMPERATURE = 5, 3, 6, (1, 2), 1.1
GRAMMAR = Grammar("regex", "[ab][ac][bc][ab]?")
TEXTS = ["".join(parts) for parts in itertools.product("ab", "ac", "bc", "ab.")]


@pytest.fixture(scope="module")
def world():
    cfg = dataclasses.replace(TARGET, vocab_size=SIZE)
    target = target_of(cfg, seed=5, scale=10.0)
    drafter = drafter_of(target, seed=2, vocab_size=SIZE, mask_token_id=4, block_size=3)
    return target, make_decoder(target, drafter, tokenizer=Letters("abc"))


def exact_law(target):
    """Of the texts, where every token is drawn of the target's law among those that may follow."""
    chance = {}
    ids = {text: [*PROMPT, *("abc.".index(letter) for letter in text)] for text in TEXTS}
    padded = jnp.array([[*row, *[0] * (8 - len(row))] for row in ids.values()])
    logits = np.asarray(unembed(target[1].vocab, encode(target[1], padded, target[0])[0]), float)
    for text, row in zip(TEXTS, logits, strict=True):
        chance[text] = 1.0
        for place, letter in enumerate(text):
            may = {other[place] for other in TEXTS if other[:place] == text[:place]}
            law = {
                one: row[len(PROMPT) - 1 + place]["abc.".index(one)] / TEMPERATURE for one in may
            }
            chance[text] *= np.exp(law[letter] - np.logaddexp.reduce(list(law.values())))
    return chance


def fit_of_the_text(world, count=1500):
    target, decoder = world
    exact = exact_law(target)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    limits = Request(PROMPT, LENGTH, temperature=TEMPERATURE, grammar=GRAMMAR, stop_ids=(END,))
    keys = np.asarray(random.fold_in(random.seed_key(3), jnp.arange(count)))
    batch = [dataclasses.replace(limits, key=key) for key in keys]
    results = generate(decoder, batch, slots=250)
    assert {result.finish_reason for result in results} == {"stop"}
    found = [result.text + ("." if result.end_id == END else "") for result in results]
    assert set(found) <= set(TEXTS)
    seen = np.array([found.count(text) for text in TEXTS])
    expected = np.array([exact[text] for text in TEXTS]) * count
    often = expected >= 5
    observed = np.array([*seen[often], seen[~often].sum()])
    wanted = np.array([*expected[often], expected[~often].sum()])
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], wanted[:-1]
    return stats.chisquare(observed, wanted * (observed.sum() / wanted.sum())).pvalue, results


def test_distribution_of_the_text(world):
    """Rejection, over several rounds, with drafts that the grammar forbids among those judged."""
    pvalue, results = fit_of_the_text(world)
    assert pvalue > 1e-4
    assert sum(sum(result.accepted_drafts) for result in results) > 0.1 * len(results)


@pytest.mark.full
def test_cutting_a_draft_because_it_is_forbidden_is_seen(world, monkeypatch):
    """Then the token in its place comes from the law itself and not from the residual."""

    def cut(*args):
        word_NCX, count_N = read_masks(*args)
        for (_, drafts), place in zip(args[0], range(len(count_N)), strict=True):
            for column, token in enumerate(drafts):
                if not bits(word_NCX[place, column], SIZE)[token]:
                    count_N[place] = min(count_N[place], column)
        return word_NCX, count_N

    monkeypatch.setattr(guided, "read_masks", cut)
    assert fit_of_the_text(world)[0] < 1e-12
