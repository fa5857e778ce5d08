"""What others write in a drafter's ``config.json``: the same drafter, or a refusal by name."""

import json

import numpy as np
import pytest

from dspark_jax.checkpoints.deepspec import (
    drafter_config,
    drafter_config_dict,
    load_drafter,
    save_drafter,
)
from dspark_jax.checkpoints.draft_tensors import plain_names
from dspark_jax.checkpoints.speculators import speculators_config_dict
from dspark_jax.checkpoints.tensors import LoadError, Tensors
from dspark_jax.models.drafters.dspark import declare_drafter
from tests.test_checkpoints import edit_config, edit_tensors, reduced_drafter
from tests.tiny_model import DRAFTER, random_params

FLAT = drafter_config_dict(DRAFTER)
NESTED = ("target_layer_ids", "mask_token_id", "block_size")
MARKOV = ("markov_rank", "markov_head_type", "enable_confidence_head")
PLAIN = {key: value for key, value in FLAT.items() if key not in (*NESTED, *MARKOV)}
DFLASH = {key: FLAT[key] for key in NESTED}
DSPARK = {key: FLAT[key] for key in MARKOV}
INPUTS = [layer + 1 for layer in DRAFTER.target_layer_ids]
SPECULATORS = speculators_config_dict(DRAFTER, {}) | {"sample_from_anchor": True}
NO_LAYERS = {key: value for key, value in FLAT.items() if key != "target_layer_ids"}
NAMED_DFLASH = FLAT | {"architectures": ["DFlashDraftModel"]}

SAME = {
    "no name": {key: value for key, value in FLAT.items() if key != "architectures"},
    "a null name": FLAT | {"architectures": None},
    "the method's name": FLAT | {"architectures": ["DSparkDraftModel"]},
    "a family's name": FLAT | {"architectures": ["Lfm2DSparkDraftModel"]},
    "all nested": PLAIN | {"dflash_config": DFLASH, "dspark_config": DSPARK},
    "nested and beside": FLAT
    | {"dflash_config": DFLASH | {"causal": False, "loss_type": "l1", "version": 2}},
    "layers by their inputs": NO_LAYERS | {"aux_hidden_state_layer_ids": INPUTS},
    "layers in both ways": FLAT | {"eagle_aux_hidden_state_layer_ids": INPUTS},
    "an offset of none": NO_LAYERS
    | {"aux_hidden_state_layer_ids": FLAT["target_layer_ids"], "layer_id_offset": 0},
    "layers read beside layers there": FLAT
    | {"num_target_layers": 5, "target_num_hidden_layers": DRAFTER.num_target_layers},
    "another name of a head": {k: v for k, v in FLAT.items() if k != "enable_confidence_head"}
    | {"use_confidence_head": True},
    "dflash whose labels are shifted": PLAIN
    | DSPARK
    | {"architectures": ["DFlashDraftModel"], "dflash_config": DFLASH | {"shift_label": True}},
    "harmless settings": FLAT
    | {
        "transformers_version": "5.1.0",
        "use_cache": True,
        "initializer_range": 0.02,
        "auto_map": {"AutoModel": "modeling.Drafter"},
        "eos_token_id": [2],
        "ce_loss_alpha": 0.1,
        "confidence_head_alpha": 1.0,
        "norm_before_residual": False,
        "logit_scale": 1.0,
        "quantization_config": None,
    },
    "speculators": SPECULATORS,
    "speculators of a width": SPECULATORS | {"target_hidden_size": DRAFTER.hidden_size},
    "speculators with a model_type of its own": SPECULATORS | {"model_type": "speculator_model"},
}


@pytest.mark.parametrize("dialect", SAME)
def test_every_dialect_is_the_same_drafter(dialect):
    config = json.loads(json.dumps(SAME[dialect]))
    assert drafter_config(config | {"owns_vocab": FLAT.get("owns_vocab", True)}) == DRAFTER


@pytest.mark.parametrize(
    ("config", "anchor"),
    [
        (FLAT, True),
        (NAMED_DFLASH, False),
        (NAMED_DFLASH | {"dflash_config": {"projector_type": "dspark"}}, True),
        ({k: v for k, v in SPECULATORS.items() if k != "sample_from_anchor"}, False),
        (SPECULATORS | {"speculators_model_type": "dflash", "sample_from_anchor": None}, False),
    ],
)  # fmt: skip
def test_slots_where_nothing_is_said_of_the_anchor(config, anchor):
    cfg = drafter_config(config)
    assert cfg.anchor_predicts is anchor
    assert cfg.num_slots == FLAT["block_size"]
    assert cfg.block_size == cfg.num_slots - (not anchor)


OTHER_MEANINGS = {
    "causal": True,
    "logit_scale": 0.5,
    "norm_before_fc": True,
    "fc_norm": True,
    "attention_sink_bias": True,
    "use_aux_hidden_state": False,
    "markov_order": 2,
    "projector_type": "domino",
    "target_hidden_size": 2 * DRAFTER.hidden_size,
    "layer_id_offset": 1,
    "dspark_window": 64,
    "partial_rotary_factor": 0.5,
    "quantization_config": {"bits": 4},
}


@pytest.mark.parametrize("key", OTHER_MEANINGS)
def test_a_setting_that_changes_the_numbers_is_refused_by_name(key):
    with pytest.raises(ValueError, match=key):
        drafter_config(FLAT | {key: OTHER_MEANINGS[key]})
    if key not in ("quantization_config", "layer_id_offset", "partial_rotary_factor"):
        with pytest.raises(ValueError, match=key):
            drafter_config(SPECULATORS | {key: OTHER_MEANINGS[key]})


def test_windows_of_slots_that_see_no_later_ones_are_refused():
    windows = {"layer_types": ["sliding_attention"] * DRAFTER.num_layers, "sliding_window": 16}
    assert set(drafter_config(FLAT | windows).windows) == {16}
    assert drafter_config(FLAT | {"sliding_window_non_causal": False}) == drafter_config(FLAT)
    with pytest.raises(LoadError, match="sliding_window_non_causal"):
        drafter_config(FLAT | windows | {"sliding_window_non_causal": False})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"aux_hidden_state_layer_ids": FLAT["target_layer_ids"]}, "aux_hidden_state_layer_ids"),
        ({"dflash_config": {"block_size": 16}}, "block_size 16"),
        ({"head_type": "gated"}, "head_type 'gated'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(more, said):
    with pytest.raises(LoadError, match=f"{said}.*contradict each other"):
        drafter_config(FLAT | more)


def test_a_window_of_no_layer_is_refused():
    with pytest.raises(LoadError, match="dflash_config has sliding_window 64"):
        drafter_config(FLAT | {"dflash_config": {"sliding_window": 64}})


def test_the_mask_token_may_be_spelt(tmp_path):
    cfg, params, vocab = reduced_drafter(mask_token_id=7)
    save_drafter(tmp_path, cfg, params, vocab)
    edit_config(tmp_path, mask_token_id="<mask>")
    assert load_drafter(tmp_path, token_id={"<mask>": 7}.get)[0] == cfg
    with pytest.raises(LoadError, match="'<mask>' is none of the target's"):
        load_drafter(tmp_path, token_id={}.get)
    with pytest.raises(LoadError, match="mask_token_id is '<mask>'"):
        load_drafter(tmp_path)


def test_what_a_checkpoint_holds_follows_from_its_tensors(tmp_path):
    params = random_params(1, declare_drafter(DRAFTER))
    save_drafter(tmp_path, DRAFTER, params)
    rows = np.ones((DRAFTER.vocab_size, DRAFTER.hidden_size), np.float32)
    edit_config(tmp_path, owns_vocab=True, enable_confidence_head=None, markov_rank=None)
    cfg, _, vocab = load_drafter(tmp_path)
    assert (cfg, vocab) == (DRAFTER, None)
    edit_tensors(tmp_path, model__embed_tokens__weight=rows)
    cfg, _, vocab = load_drafter(tmp_path)
    assert (cfg.owns_vocab, vocab.unembed_VD) == (False, None)
    np.testing.assert_array_equal(vocab.embed_VD, rows)
    edit_config(tmp_path, tie_word_embeddings=True)
    np.testing.assert_array_equal(load_drafter(tmp_path)[2].unembed_VD, rows)
    edit_config(tmp_path, owns_vocab=False)
    edit_tensors(tmp_path, lm_head__weight=2 * rows)
    cfg, _, vocab = load_drafter(tmp_path)
    assert cfg.owns_vocab
    np.testing.assert_array_equal(vocab.unembed_VD, 2 * rows)


def test_tensors_lose_the_names_of_modules_around_them():
    def named(*names):
        return plain_names(Tensors("here", dict.fromkeys(names, (1,)), np.array))

    found = named(
        "model.fc.weight", "_orig_mod.drafter.norm.weight", "midlayer.mlp.up_proj.weight",
        "model.markov_w1.weight", "confidence_proj.bias", "verifier_norm.weight",
    )  # fmt: skip
    assert set(found.shapes) == {
        "fc.weight", "norm.weight", "layers.0.mlp.up_proj.weight",
        "markov_head.markov_w1.weight", "confidence_head.proj.bias",
    }  # fmt: skip
    assert found.read("fc.weight") == "model.fc.weight"
    with pytest.raises(LoadError, match=r"fc\.weight and model\.fc\.weight are both"):
        named("fc.weight", "model.fc.weight")
