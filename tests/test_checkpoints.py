"""Drafter checkpoints: what is written is read back bit by bit, what is wrong is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.axes import map_params
from dspark_jax.checkpoints.deepspec import (
    bind_vocab,
    drafter_config,
    drafter_config_dict,
    load_drafter,
    save_drafter,
)
from dspark_jax.checkpoints.hf import load_hf_target
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.config import DrafterConfig, RopeConfig
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.vocab import Vocab
from tests import tiny_model
from tests.tiny_model import random_params

DATA = Path(__file__).parent / "data"
DRAFTERS = (
    "qwen3_dspark_train",
    "qwen3_dspark_train_gated",
    "qwen3_dspark_train_rnn",
    "qwen3_dflash_train",
    "spec_decode_greedy/qwen3/dspark",
    "spec_decode_greedy/qwen3/dspark_gated",
    "spec_decode_greedy/qwen3/dspark_rnn",
    "spec_decode_greedy/qwen3/dflash",
)
# What the released configurations say beyond the sizes of a Qwen3 model.
RELEASED_FIELDS = (
    "architectures",
    "block_size",
    "num_target_layers",
    "num_hidden_layers",
    "layer_types",
    "mask_token_id",
    "target_layer_ids",
    "num_anchors",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "markov_rank",
    "markov_head_type",
    "tie_word_embeddings",
)


@pytest.fixture
def drafter_dir(tmp_path):
    """A copy of a drafter's checkpoint, to be damaged."""
    return Path(shutil.copytree(DATA / DRAFTERS[0] / "checkpoint", tmp_path / "drafter"))


def edit_config(directory, **changes):
    """Set keys of config.json; None removes a key."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(directory, **changes):
    """Set tensors (dots written as two underscores); None removes one."""
    path = directory / "model.safetensors"
    named = {name.replace("__", "."): value for name, value in changes.items()}
    tensors = load_file(path) | named
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def assert_same_tensors(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert first[name].shape == second[name].shape
        assert first[name].tobytes() == second[name].tobytes(), name


def refusal(function, *arguments):
    """The message with which a bad file is refused: one line, an error of our own."""
    with pytest.raises(LoadError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.smoke
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafter_checkpoints_survive_a_round_trip_bit_by_bit(name, tmp_path):
    source = DATA / name / "checkpoint"
    cfg, params, vocab = load_drafter(source)
    save_drafter(tmp_path / "copy", cfg, params, vocab)
    assert_same_tensors(source / "model.safetensors", tmp_path / "copy" / "model.safetensors")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    before, after = (
        json.loads((directory / "config.json").read_text())
        for directory in (source, tmp_path / "copy")
    )
    assert drafter_config(after) == cfg
    for field in RELEASED_FIELDS:
        assert before.get(field) == after.get(field), field


def test_bfloat16_checkpoints_survive_a_round_trip(drafter_dir, tmp_path):
    tensors = load_file(drafter_dir / "model.safetensors")
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(half, drafter_dir / "model.safetensors")
    cfg, params, vocab = load_drafter(drafter_dir)
    assert params.fc_FYD.dtype == jnp.bfloat16
    save_drafter(tmp_path / "copy", cfg, params, vocab)
    assert_same_tensors(drafter_dir / "model.safetensors", tmp_path / "copy/model.safetensors")
    assert json.loads((tmp_path / "copy/config.json").read_text())["dtype"] == "bfloat16"
    assert load_drafter(drafter_dir, jnp.float32)[1].fc_FYD.dtype == jnp.float32


@pytest.mark.parametrize(
    "kinds",
    [(np.float64,), (ml_dtypes.float8_e5m2,), (np.float16, ml_dtypes.bfloat16), (np.float16, None)],
)
def test_other_and_mixed_floats_become_single_precision(kinds, drafter_dir):
    tensors = load_file(drafter_dir / "model.safetensors")
    for index, name in enumerate(tensors):
        kind = kinds[index % len(kinds)] or np.float32
        tensors[name] = tensors[name].astype(kind)
    # The layers of one parameter are of different kinds, too.
    stack = [name for name in tensors if name.endswith("self_attn.q_proj.weight")]
    for index, name in enumerate(stack):
        tensors[name] = tensors[name].astype(kinds[index % len(kinds)] or np.float32)
    save_file(tensors, drafter_dir / "model.safetensors")
    _, params, _ = load_drafter(drafter_dir)
    assert params.layers[0].q_DNH.dtype == jnp.float32
    loaded = np.asarray(params.layers[0].q_DNH)
    for index, name in enumerate(stack):
        expected = tensors[name].astype(np.float32).T.reshape(loaded[index].shape)
        np.testing.assert_array_equal(loaded[index], expected)


def reduced_drafter(**changes):
    """A drafter without the target's vocabulary and with a reduced one of its own."""
    cfg = DrafterConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope=RopeConfig(700.0, "llama3", 2.0, original_max_positions=32),
        qkv_bias=True,
        out_bias=True,
        num_target_layers=4,
        markov_rank=4,
        markov_head="rnn",
        confidence=True,
        draft_vocab_size=12,
        owns_vocab=False,
        num_anchors=64,
    )
    cfg = replace(cfg, **changes)
    rng = np.random.default_rng(0)
    params = map_params(
        lambda param: jnp.asarray(rng.normal(size=param.shape), jnp.float32), declare_drafter(cfg)
    )
    return cfg, params, Vocab(None, d2t_U=jnp.arange(12, dtype=jnp.int32) * 3)


def test_a_drafter_without_vocabulary_survives_a_round_trip(tmp_path):
    cfg, params, vocab = reduced_drafter()
    save_drafter(tmp_path, cfg, params, vocab)
    names = load_file(tmp_path / "model.safetensors")
    assert not {"embed_tokens.weight", "lm_head.weight"} & names.keys()
    assert names["markov_head.markov_w2.weight"].shape == (12, 4)
    loaded_cfg, loaded_params, loaded_vocab = load_drafter(tmp_path)
    assert loaded_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded_params, params)
    assert loaded_vocab.embed_VD is None
    np.testing.assert_array_equal(loaded_vocab.d2t_U, vocab.d2t_U)
    assert loaded_vocab.d2t_U.dtype == jnp.int32


def test_a_drafter_with_the_whole_vocabulary_and_none_of_its_own_has_none(tmp_path):
    cfg, params, _ = reduced_drafter(draft_vocab_size=None, markov_rank=0, confidence=False)
    save_drafter(tmp_path, cfg, params)
    assert load_drafter(tmp_path)[2] is None


def test_every_drafter_configuration_survives_a_round_trip():
    cfg, _, _ = reduced_drafter()
    for changes in (
        {},
        {"rope": RopeConfig(theta=5.0)},
        {"target_layer_ids": (-1, 0, 2), "mask_token_id": 39},
        {"markov_head": "gated", "confidence_with_markov": False},
        {"markov_rank": 0, "markov_head": "vanilla", "confidence": False},
        {"draft_vocab_size": None, "owns_vocab": True, "qkv_bias": False, "out_bias": False},
    ):
        changed = replace(cfg, **changes)
        assert drafter_config(json.loads(json.dumps(drafter_config_dict(changed)))) == changed


def test_saving_again_replaces_the_checkpoint_and_keeps_other_files(tmp_path):
    cfg, params, vocab = reduced_drafter()
    save_drafter(tmp_path, cfg, params, vocab)
    (tmp_path / "README.md").write_text("mine")
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    save_drafter(tmp_path, cfg, doubled, vocab)
    jax.tree.map(np.testing.assert_array_equal, load_drafter(tmp_path)[1], doubled)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_saving_refuses_what_does_not_fit_the_configuration(tmp_path):
    cfg, params, vocab = reduced_drafter()
    with pytest.raises(ValueError, match="owns_vocab is true"):
        save_drafter(tmp_path, replace(cfg, owns_vocab=True), params, None)
    with pytest.raises(ValueError, match="draft_vocab_size is 12"):
        save_drafter(tmp_path, cfg, params, None)
    with pytest.raises(ValueError, match=r"norm\.weight has shape \[3\]"):
        save_drafter(tmp_path, cfg, replace(params, norm_D=jnp.ones(3)), vocab)
    with pytest.raises(ValueError, match="increasing int32"):
        save_drafter(tmp_path, cfg, params, Vocab(None, d2t_U=jnp.full(12, 3)))
    assert not list(tmp_path.iterdir())


CONFIG_FAULTS = {
    "block_size": (None, "block_size is missing"),
    "mask_token_id": (None, "mask_token_id is missing"),
    "hidden_size": ("32", "hidden_size is '32'"),
    "num_hidden_layers": (-2, "num_hidden_layers is -2"),
    "num_key_value_heads": (3, "num_kv_heads 3"),
    "markov_head_type": ("quantum", "markov_head 'quantum'"),
    "architectures": (["Qwen3MedusaModel"], "only one of Qwen3DSparkModel, Gemma4DSparkModel"),
    "target_layer_ids": ([3, 1], "strictly increasing"),
    "num_target_layers": (5, "must lie in -1..3"),
    "layer_types": (["full_attention", "chunked_attention"], "must list full_attention"),
    "enable_confidence_head": (1, "enable_confidence_head is 1"),
    "draft_vocab_size": (0, "draft_vocab_size is 0"),
    "rope_parameters": ({"rope_type": "su", "rope_theta": 1e4}, "rope_type 'su'"),
}


@pytest.mark.parametrize("key", CONFIG_FAULTS)
def test_a_wrong_drafter_configuration_is_named(key, drafter_dir):
    value, expected = CONFIG_FAULTS[key]
    edit_config(drafter_dir, **{key: value})
    message = refusal(load_drafter, drafter_dir)
    assert expected in message
    assert "config.json" in message


TENSOR_FAULTS = {
    "missing": ({"fc__weight": None}, "tensor fc.weight is missing"),
    "left over": ({"mystery__weight": np.ones(3, np.float32)}, "mystery.weight is left over"),
    "wrong shape": ({"norm__weight": np.ones(3, np.float32)}, "norm.weight has shape [3]"),
    "transposed": ({"fc__weight": np.ones((96, 32), np.float32)}, "fc.weight has shape [96, 32]"),
    "wrong dtype": ({"norm__weight": np.ones(32, np.int8)}, "norm.weight has dtype int8"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_wrong_tensors_are_named(fault, drafter_dir):
    changes, expected = TENSOR_FAULTS[fault]
    edit_tensors(drafter_dir, **changes)
    assert expected in refusal(load_drafter, drafter_dir)


def test_an_absurd_number_of_layers_is_refused_at_once(drafter_dir):
    edit_config(drafter_dir, num_hidden_layers=10**12, layer_types=None)
    assert "num_hidden_layers is 1000000000000" in refusal(load_drafter, drafter_dir)


@pytest.mark.parametrize("kept", [0, 5, 300, 100_000])
def test_truncated_weights_are_refused(kept, drafter_dir):
    path = drafter_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors: broken or truncated" in refusal(load_drafter, drafter_dir)


def test_missing_and_unreadable_files_are_refused(drafter_dir, tmp_path):
    assert "no such directory" in refusal(load_drafter, tmp_path / "nowhere")
    (drafter_dir / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(load_drafter, drafter_dir)
    (drafter_dir / "config.json").write_text("{")
    assert "not readable JSON" in refusal(load_drafter, drafter_dir)
    (drafter_dir / "config.json").write_text("[1]")
    assert "must hold a JSON object" in refusal(load_drafter, drafter_dir)
    (drafter_dir / "config.json").unlink()
    assert "config.json: no such file" in refusal(load_drafter, drafter_dir)


def test_wrong_target_ids_of_a_reduced_vocabulary_are_refused(tmp_path):
    cfg, params, vocab = reduced_drafter()
    save_drafter(tmp_path, cfg, params, vocab)
    good = np.asarray(vocab.d2t_U)
    for bad in (good * 0 + 39, good + 10, good - 1, good.astype(np.float32)):
        edit_tensors(tmp_path, d2t=bad)
        assert "d2t" in refusal(load_drafter, tmp_path)
    for bad in (good[:5], None):
        edit_tensors(tmp_path, d2t=bad)
        assert "draft_vocab_size is 12" in refusal(load_drafter, tmp_path)


@pytest.fixture
def fitting():
    """A drafter with its own vocabulary and the target that it was trained for."""
    cfg, params = load_hf_target(DATA / "spec_decode_greedy/qwen3/target", jnp.float32)
    return load_drafter(DATA / "spec_decode_greedy/qwen3/dspark/checkpoint"), (cfg, params.vocab)


def test_the_drafter_gets_the_vocabulary_of_its_target(fitting):
    (cfg, _, own), (target_cfg, vocab) = fitting
    bound = bind_vocab(cfg, own, target_cfg, vocab)
    assert bound.embed_VD is vocab.embed_VD
    assert bound.unembed_VD is vocab.unembed_VD
    assert bind_vocab(cfg, None, target_cfg, vocab).embed_VD is vocab.embed_VD


def test_a_vocabulary_rounded_on_loading_is_still_the_same(fitting):
    (cfg, _, own), (target_cfg, vocab) = fitting
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), vocab)
    assert bind_vocab(cfg, own, target_cfg, half).embed_VD is half.embed_VD


@pytest.mark.parametrize("part", ["embed_VD", "unembed_VD"])
@pytest.mark.parametrize(("scale", "said"), [(1.03, "3 %"), (-1, "200 %: is this the target")])
def test_how_far_a_vocabulary_differs_is_said(part, scale, said, fitting, caplog):
    (cfg, _, own), (target_cfg, vocab) = fitting
    other = replace(own, **{part: scale * getattr(own, part)})
    bound = bind_vocab(cfg, other, target_cfg, vocab)
    assert bound is vocab
    (message,) = caplog.messages
    assert f"by {said}" in message
    assert "--own-vocab" in message


def test_a_vocabulary_that_was_rounded_before_it_was_stored_is_the_same(fitting, caplog):
    (cfg, _, own), (target_cfg, vocab) = fitting
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), own)
    assert bind_vocab(cfg, rounded, target_cfg, vocab) is vocab
    touched = replace(own, embed_VD=own.embed_VD.at[5, 7].add(0.1))
    assert not caplog.messages
    bind_vocab(cfg, touched, target_cfg, vocab)
    assert "embed_tokens.weight differs" in caplog.messages[0]


def test_the_drafters_own_vocabulary_is_kept_on_request(fitting):
    (cfg, _, own), (target_cfg, vocab) = fitting
    other = replace(own, embed_VD=2 * own.embed_VD)
    kept = bind_vocab(cfg, other, target_cfg, vocab, own_vocab=True)
    np.testing.assert_array_equal(kept.embed_VD, other.embed_VD)
    np.testing.assert_array_equal(kept.unembed_VD, own.unembed_VD)
    # One that has an embedding alone: the head is the target's.
    kept = bind_vocab(cfg, replace(other, unembed_VD=None), target_cfg, vocab, own_vocab=True)
    np.testing.assert_array_equal(kept.unembed_VD, vocab.embed_VD)  # tied
    assert bind_vocab(cfg, None, target_cfg, vocab, own_vocab=True) is vocab


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("vocab_size", 131, "vocab_size is 97, the target has 131"),
        ("hidden_size", 64, "hidden_size is 48, the target has 64"),
        ("num_layers", 12, "num_target_layers is 7, the target has 12"),
    ],
)
def test_a_drafter_of_another_target_is_refused(field, value, expected, fitting):
    (cfg, _, own), (target_cfg, vocab) = fitting
    with pytest.raises(ValueError, match=expected):
        bind_vocab(cfg, own, replace(target_cfg, **{field: value}), vocab)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reduced_vocabulary_takes_its_rows_of_the_targets_head(tied, fitting):
    (cfg, *_), (target_cfg, vocab) = fitting
    cfg = replace(cfg, draft_vocab_size=3, owns_vocab=False)
    d2t_U = jnp.asarray([2, 3, 90], jnp.int32)
    head_VD = vocab.embed_VD if tied else 2 * vocab.embed_VD
    vocab = Vocab(vocab.embed_VD, None if tied else head_VD)
    bound = bind_vocab(cfg, Vocab(None, d2t_U=d2t_U), target_cfg, vocab)
    np.testing.assert_array_equal(bound.unembed_VD, np.asarray(head_VD)[[2, 3, 90]])
    np.testing.assert_array_equal(bound.d2t_U, d2t_U)
    with pytest.raises(ValueError, match="d2t is missing"):
        bind_vocab(cfg, None, target_cfg, vocab)


def write_variant(directory, cfg, **changes):
    """A drafter with random weights, whose configuration is then changed."""
    save_drafter(directory, cfg, random_params(3, declare_drafter(cfg)))
    edit_config(directory, **changes)
    return directory


PLAIN = replace(tiny_model.DRAFTER, markov_rank=0, confidence=False)


def test_dflash_as_its_authors_publish_it(tmp_path):
    """Settings are nested, the anchor's slot predicts nothing, the vocabulary is the target's."""
    nested = {"mask_token_id": PLAIN.mask_token_id, "target_layer_ids": [-1, 0]}
    directory = write_variant(
        tmp_path / "drafter",
        replace(PLAIN, anchor_predicts=False),
        architectures=["DFlashDraftModel"],
        dflash_config=nested,
        sample_from_anchor=None,
        owns_vocab=None,
        mask_token_id=None,
        target_layer_ids=None,
    )
    cfg, _, vocab = load_drafter(directory)
    assert vocab is None
    assert cfg == replace(PLAIN, anchor_predicts=False)
    assert (cfg.block_size, cfg.num_slots) == (3, 4)
    save_drafter(tmp_path / "copy", *load_drafter(directory))
    assert load_drafter(tmp_path / "copy")[0] == cfg
    edit_config(directory, dflash_config=nested | {"linear_context": {}})
    assert "dflash_config has linear_context {}" in refusal(load_drafter, directory)


def test_the_method_s_name_in_the_place_of_the_layers(tmp_path):
    directory = write_variant(
        tmp_path / "drafter", tiny_model.DRAFTER, architectures=["DSparkDraftModel"]
    )
    assert load_drafter(directory)[0] == tiny_model.DRAFTER
    edit_config(directory, model_type="mamba")
    assert "model_type 'mamba' of the layers" in refusal(load_drafter, directory)


@pytest.mark.parametrize("key", ["sample_from_anchor", "query_zero_predicts_next"])
def test_an_anchor_that_predicts_nothing_is_said_in_two_ways(tmp_path, key):
    directory = write_variant(tmp_path / "drafter", tiny_model.DRAFTER, **{key: False})
    cfg, _, _ = load_drafter(directory)
    assert (cfg.anchor_predicts, cfg.block_size, cfg.num_slots) == (False, 2, 3)
    edit_config(directory, sample_from_anchor=False, query_zero_predicts_next=True)
    assert "contradict each other" in refusal(load_drafter, directory)
    edit_config(directory, query_zero_predicts_next=None, block_size=1)
    assert "there is no draft" in refusal(load_drafter, directory)


def test_windows_of_draft_layers_survive_a_round_trip(tmp_path):
    cfg = replace(tiny_model.DRAFTER, num_layers=2, windows=(16, 0))
    directory = write_variant(tmp_path / "drafter", cfg)
    assert load_drafter(directory)[0] == cfg
    edit_config(directory, sliding_window=0)
    assert "sliding_window is 0" in refusal(load_drafter, directory)


def test_drafts_of_a_block_whose_anchor_predicts_nothing_are_those_behind_it():
    from dspark_jax.models import cache as kv
    from dspark_jax.models.drafters.dspark import block_hidden, declare_context

    longer = replace(PLAIN, block_size=4)
    params, vocab = random_params(3, declare_drafter(longer)), tiny_vocab()
    context = jax.tree.map(
        lambda b: jnp.ones(b.shape), declare_context(longer, kv.Room(2, 16, 4, jnp.float32))
    )
    places = jnp.array([[3], [5]]), jnp.array([[6], [2]])
    whole = block_hidden(params, vocab, *places, context, longer)
    drafts = block_hidden(params, vocab, *places, context, replace(PLAIN, anchor_predicts=False))
    np.testing.assert_array_equal(drafts, whole[:, :, 1:])


def tiny_vocab():
    embed_VD = np.random.default_rng(0).normal(size=(PLAIN.vocab_size, PLAIN.hidden_size))
    return Vocab(jnp.asarray(embed_VD, jnp.float32))
