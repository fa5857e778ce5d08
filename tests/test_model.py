"""The front door: text in, text out."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import dspark_jax
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import generate
from dspark_jax.scheduler.profile import read_profile
from dspark_jax.scheduler.seconds import Seconds
from tests.tiny_model import few_sizes, write_drafter, write_target

pytestmark = pytest.mark.usefixtures("own_cache", "_few_programs")

PROMPTS = ["one", [{"role": "user", "content": "and two"}]]


@pytest.fixture
def _few_programs(monkeypatch):
    monkeypatch.setattr("dspark_jax.model.config_for", few_sizes)
    monkeypatch.setattr("dspark_jax.engine.generate.config_for", few_sizes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)
        target, drafter = write_target(folder / "target"), write_drafter(folder / "drafter")
        return dspark_jax.load(target, drafter)


def test_names_are_there_and_take_no_time():
    """Importing the package imports nothing; every name of ``__all__`` is one."""
    program = (
        "import sys, dspark_jax\n"
        "assert not {'jax', 'flax', 'transformers'} & set(sys.modules)\n"
        "assert set(dspark_jax.__all__) <= set(dir(dspark_jax))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in dspark_jax.__all__:
        assert getattr(dspark_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'lead'"):
        dspark_jax.lead  # noqa: B018


def test_greedy_texts_are_those_of_plain_decoding(model):
    requests, _ = model.requests(PROMPTS, seed=0, max_new_tokens=12)
    expected = generate(model.decoder, requests, policy="none")
    found = model.generate(PROMPTS, max_new_tokens=12)
    assert [result.token_ids for result in found] == [result.token_ids for result in expected]
    alone = model.generate("one", max_new_tokens=12)
    assert [result.text for result in alone] == [expected[0].text]
    events = list(model.stream("one", max_new_tokens=12))
    assert "".join(event.text for event in events) == expected[0].text
    assert events[-1].finish_reason == expected[0].finish_reason


def test_samples_differ_and_a_seed_repeats_them(model):
    limits = {"max_new_tokens": 12, "temperature": 5.0, "acceptance": "coupled"}
    first = model.generate(PROMPTS, n=3, **limits)
    texts = [tuple(result.token_ids) for result in first]
    assert len(set(texts)) == len(texts) == 6
    assert len({result.seed for result in first}) == 1
    again = model.generate(PROMPTS, n=3, seed=first[0].seed, **limits)
    assert [tuple(result.token_ids) for result in again] == texts
    other = model.generate(PROMPTS[0], **limits)[0]
    assert other.seed != first[0].seed


def test_a_stream_that_nobody_reads_on_ends(model):
    stream = model.stream("one", max_new_tokens=400)
    next(stream)
    stream.close()
    assert list(stream) == []


@pytest.mark.full
def test_a_model_serves_an_engine(model):
    requests, _ = model.requests(PROMPTS, max_new_tokens=6)
    config = dspark_jax.EngineConfig(slots=2, positions=60, chunk_buckets=(1,))
    with dspark_jax.Engine(model, config) as engine:
        streams = [engine.submit(request) for request in requests]
        texts = [stream.wait().text for stream in streams]
    assert texts == [result.text for result in model.generate(PROMPTS, max_new_tokens=6)]


@pytest.fixture
def profiles(monkeypatch):
    """What engines are told of their costs from now on; rounds take a second by an abacus."""
    told, start, read = [], Engine.__init__, Seconds.read

    def note(self, decoder, config, profile=None):
        told.append(profile)
        start(self, decoder, config, profile)

    monkeypatch.setattr(Engine, "__init__", note)
    monkeypatch.setattr(
        Seconds,
        "read",
        lambda self, number, shape, steady, now_s: read(
            self, number, shape, True, self._last_s + 1.0
        ),
    )
    return told


def test_what_rounds_cost_is_kept_for_later(model, own_cache, profiles):
    texts = [model.generate(PROMPTS, max_new_tokens=64)[0].text for _ in range(2)]
    assert texts[0] == texts[1]
    assert profiles[0] is None
    assert set(profiles[1].round_s.values()) == {1.0}
    (path,) = own_cache.rglob("*.json")
    assert read_profile(path).round_s.keys() >= profiles[1].round_s.keys()
    list(model.stream("one", max_new_tokens=64))
    assert profiles[2] is not None
    model.generate(PROMPTS, max_new_tokens=64, policy="block")  # which asks for no costs
    assert read_profile(path)


@pytest.mark.parametrize("damage", ["nothing", "half", "foreign", "directory"])
def test_kept_costs_that_are_of_no_use_are_ignored(model, own_cache, profiles, damage):
    expected = model.generate("one", max_new_tokens=64)[0].text
    (path,) = own_cache.rglob("*.json")
    text = path.read_text()
    if damage == "directory":  # nothing can be written either
        path.unlink()
        path.mkdir()
    else:
        foreign = json.dumps(json.loads(text) | {"setting": {"device": "other"}})
        path.write_text({"nothing": "", "half": text[: len(text) // 2], "foreign": foreign}[damage])
    assert model.generate("one", max_new_tokens=64)[0].text == expected
    assert profiles == [None, None]
    if damage != "directory":
        assert path.read_text() == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ""}, "prompt 0: the prompt is empty"),
        ({"prompts": ["one", " "]}, "prompt 1: the prompt is empty"),
        ({"prompts": "a" * 600}, "prompt 0: the prompt has .* shorten the prompt"),
        ({"prompts": ["one", "two \ud83d"]}, r"prompt 1: prompt has '\\ud83d' at character 5"),
        ({"prompts": b"one"}, "prompt 0: prompt is b'one'"),
        ({"prompts": [b"one"]}, "prompt 0: prompt is b'one'"),
        ({"prompts": 3}, "prompt 0: prompt is 3"),
        ({"prompts": None}, "prompt 0: the prompt is empty"),
        ({"prompts": {"role": "user", "content": "one"}}, "prompt 0: messages is .* list of turns"),
        ({"prompts": [{"role": "user", "content": "one"}, "two"]}, "prompt 0: messages is .* list"),
        ({"stop_strings": ["\udcff"]}, r"prompt 0: stop_strings\[0\] has the byte 0xff"),
        ({"n": 0}, "n is 0"),
        ({"n": True}, "n is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "7"}, "seed is '7'"),
        ({"max_tokens": 5}, "max_tokens is no option: known are .*max_new_tokens"),
        ({"temperature": -1}, "prompt 0: temperature is -1"),
        ({"temperature": 1e39}, r"prompt 0: temperature is 1e\+39: give 0\.\."),
        ({"policy": "sometimes"}, "sometimes"),
        ({"acceptance": "maybe"}, "acceptance is 'maybe'"),
    ],
)
def test_wrong_input_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"prompts": "one", **options})


def test_a_model_without_a_drafter_decodes_plainly(model, tmp_path):
    plain = dspark_jax.load(write_target(tmp_path / "target"))
    assert plain.drafter == "none"
    results = plain.generate(PROMPTS, max_new_tokens=8)
    expected = model.generate(PROMPTS, max_new_tokens=8)
    assert [result.text for result in results] == [result.text for result in expected]
    assert not any(np.sum(result.verified_lengths) for result in results)


def test_prompts_are_rendered_as_load_was_told(model, tmp_path, caplog):
    target = write_target(tmp_path / "target")
    texts, turns = iter(["one"]), [{"role": "user", "content": "one"}]

    def read(loaded, prompts):
        requests, _ = loaded.requests(prompts)
        return [loaded.decoder.tokenizer.decode(request.prompt_ids) for request in requests]

    assert read(model, texts) == read(model, [turns]) == read(model, turns) == ["one > "]
    system = dspark_jax.load(target, system="be", template_args={"unheard": 1})
    assert read(system, "one") == ["be > one > "]
    assert "target does not know the argument unheard" in caplog.text
    plain = dspark_jax.load(target, chat_template=False)
    assert read(plain, "one") == ["one"]
    assert plain.decoder.stop_ids == model.decoder.stop_ids
    with pytest.raises(ValueError, match="tokenize is not free"):
        dspark_jax.load(target, template_args={"tokenize": False})


def test_a_target_without_a_template_says_so_once(tmp_path, caplog):
    target = write_target(tmp_path / "target")
    (target / "chat_template.jinja").unlink()
    loaded = dspark_jax.load(target)
    loaded.requests(["one", "two"])
    assert caplog.messages == [
        "target has no chat template: prompts are decoded as plain text",
    ]
    caplog.clear()
    dspark_jax.load(target, chat_template=False)
    assert not caplog.messages
    with pytest.raises(ValueError, match="no chat template, which the template argument a"):
        dspark_jax.load(target, template_args={"a": 1})


def test_weights_go_where_the_mesh_says(model, tmp_path, emulated_devices):
    mesh = dspark_jax.make_mesh(2, 2)
    shared = dspark_jax.load(write_target(tmp_path / "t"), write_drafter(tmp_path / "d"), mesh=mesh)
    embed = shared.decoder.weights.target.vocab.embed_VD
    assert len(embed.sharding.device_set) == 4
    assert isinstance(embed, jax.Array)
