"""A smaller model as drafter: its cache follows the target's, and its tokens are the target's."""

import dataclasses
import json

import pytest

from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.engine import generate as offline
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.models.drafters.table import of_draft_model
from tests.test_generate import TARGET, requests, target_of, texts
from tests.tiny_model import TARGET as LETTERS
from tests.tiny_model import write_target

SMALL = dataclasses.replace(TARGET, num_layers=1, hidden_size=16, intermediate_size=24)


@pytest.fixture(scope="module")
def target():
    return target_of(TARGET)


def drafter_of(target, model):
    cfg, vocab = of_draft_model(model[0], model[1].vocab, target[0])
    return cfg, model[1], vocab


def test_the_target_itself_is_accepted_whole(target):
    """Every block stands with its bonus token, behind prompts in chunks and in several slots: the
    cache has what it must after blocks that were accepted whole."""
    cfg, *weights = drafter_of(target, target)
    drafter = dataclasses.replace(cfg, block_size=2), *weights
    block = 3
    config = EngineConfig(
        slots=2, slot_buckets=(2,), positions=128, chunk_buckets=(1,), chunk_rows=16,
        row_buckets=(2 * block,), position_buckets=(192,), policy="block",
    )  # fmt: skip
    with Engine(make_decoder(target, drafter), config) as engine:
        running = [engine.submit(request) for request in requests()]
        found = [stream.wait() for stream in running]
    for result in found:
        lengths = result.accepted_lengths
        assert len(lengths) > 4
        assert set(lengths[1:-1]) == {block}, lengths  # a first round has no draft


@pytest.mark.full
@pytest.mark.parametrize("vocab_size", [61, 50, 70])
def test_greedy_text_is_the_targets_own(target, vocab_size):
    """With fewer tokens than the target, and with more."""
    model = target_of(dataclasses.replace(SMALL, vocab_size=vocab_size), seed=3)
    plain = offline.generate(make_decoder(target), requests(), policy="none")
    decoder = make_decoder(target, drafter_of(target, model))
    for policy in ("block", "threshold:0.3"):
        assert texts(offline.generate(decoder, requests(), policy=policy)) == texts(plain)
    sampled = {"temperature": 0.8, "top_k": 30}
    expected = offline.generate(
        make_decoder(target), requests(**sampled), policy="none", acceptance="coupled"
    )
    found = offline.generate(decoder, requests(**sampled), policy="block", acceptance="coupled")
    assert texts(found) == texts(expected)


def test_a_directory_of_a_model_is_a_drafter(tmp_path):
    write_target(tmp_path / "large", architectures=["LlamaForCausalLM"])
    write_target(tmp_path / "small", dataclasses.replace(LETTERS, num_layers=1))
    target = load_target(tmp_path / "large")
    for name, layers in (("large", 2), ("small", 1)):
        drafter = load_drafter_for(target, tmp_path / name)
        assert drafter.cfg.model.num_layers == layers
        assert drafter.vocab.d2t_U is None


def test_another_tokenizer_is_refused(tmp_path):
    write_target(tmp_path / "large")
    write_target(tmp_path / "small")
    path = tmp_path / "small" / "tokenizer.json"
    text = json.loads(path.read_text())
    vocab = text["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"small cannot draft for large: the token '[ab]' has"):
        load_drafter_for(load_target(tmp_path / "large"), tmp_path / "small")
