"""Drafters written for other programs and read from them: the same bits, or a refusal."""

import copy
import json
import shutil
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.axes import map_params
from dspark_jax.checkpoints import export as layouts
from dspark_jax.checkpoints import load
from dspark_jax.checkpoints.deepspec import load_drafter, save_drafter
from dspark_jax.checkpoints.load import load_drafter_for, load_target, read_drafter
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.cli import command as cli
from dspark_jax.evaluation import export
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.drafters.full_vocabulary import with_full_vocabulary
from dspark_jax.models.drafters.heads import bias_logits, block_codes, confidence_logit
from dspark_jax.models.vocab import Vocab
from tests.tiny_model import DRAFTER, TARGET, random_params, write_target

REDUCED = np.array([0, 1, 2, 5, 11, 30, 31, 32, 50, 64, 77, 80, 96], np.int32)
VARIANTS = {
    "vanilla": {},
    "gated": {"markov_head": "gated", "num_layers": 2, "confidence_with_markov": False},
    "rnn": {"markov_head": "rnn", "qkv_bias": True, "out_bias": True, "num_anchors": 7},
    "dflash": {"markov_rank": 0, "confidence": False},
}
CASES = [(kind, size) for kind in VARIANTS for size in (None, len(REDUCED))]
# Tests of refusals look at one drafter.
REDUCED_DRAFTER = ("rnn", len(REDUCED))


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory):
    cfg = replace(TARGET, num_layers=3)
    return write_target(tmp_path_factory.mktemp("models") / "target", cfg)


@pytest.fixture(scope="module")
def target(target_dir):
    return load_target(target_dir)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory):
    """Native checkpoints of random drafters, bfloat16, by (variant, draft vocabulary)."""
    folder = tmp_path_factory.mktemp("drafters")

    @cache
    def drafter(kind, size):
        cfg = replace(DRAFTER, num_target_layers=3, draft_vocab_size=size, **VARIANTS[kind])
        params = random_params(21, declare_drafter(cfg))
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
        vocab = None if size is None else Vocab(None, d2t_U=jnp.asarray(REDUCED))
        save_drafter(folder / f"{kind}-{size}", cfg, params, vocab)
        return folder / f"{kind}-{size}"

    return drafter


@pytest.fixture
def checksum(monkeypatch):
    """Most tests are about files: for them a sum of the weights stands in for acceptance."""

    def weights(target, cfg, params, vocab, batch):
        return np.array([np.sum(np.asarray(x, np.float32)) for x in jax.tree.leaves(params)])

    monkeypatch.setattr(export, "acceptance", weights)


files_alone = pytest.mark.usefixtures("checksum")


def edit_config(directory, **changes):
    """Set keys of config.json; None removes a key."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(directory, **changes):
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def assert_same_bits(first, second):
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert value.shape == second[name].shape, name
        assert value.tobytes() == second[name].tobytes(), name


@files_alone
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_speculators_and_back_is_the_same_drafter_bit_by_bit(
    kind, size, target_dir, target, drafters, tmp_path
):
    source = drafters(kind, size)
    export.write_drafter(target_dir, source, "speculators", tmp_path / "there")
    export.write_drafter(target_dir, tmp_path / "there", "dspark", tmp_path / "back")
    assert_same_bits(source, tmp_path / "back")
    before, after = (read_drafter(target, path) for path in (source, tmp_path / "back"))
    assert after[0] == before[0]
    usable = load_drafter_for(target, tmp_path / "there")
    assert usable.cfg == before[0]
    assert usable.params.fc_FYD.dtype == jnp.float32


@files_alone
@pytest.mark.parametrize("kind", VARIANTS)
def test_the_reference_layout_and_back_is_the_same_drafter_bit_by_bit(
    kind, target_dir, target, drafters, tmp_path
):
    source = drafters(kind, None)
    export.write_drafter(target_dir, source, "deepspec", tmp_path / "there")
    tensors = load_file(tmp_path / "there" / "model.safetensors")
    embed_VD = np.asarray(target.params.vocab.embed_VD).astype(ml_dtypes.bfloat16)
    for name in ("embed_tokens.weight", "lm_head.weight"):  # the target is tied
        np.testing.assert_array_equal(tensors[name], embed_VD)
    export.write_drafter(target_dir, tmp_path / "there", "dspark", tmp_path / "back")
    assert_same_bits(source, tmp_path / "back")
    assert read_drafter(target, tmp_path / "back")[0] == read_drafter(target, source)[0]


@files_alone
def test_the_conventions_of_speculators_are_written_out(target_dir, target, drafters, tmp_path):
    out = export.write_drafter(
        target_dir, drafters(*REDUCED_DRAFTER), "speculators", tmp_path / "x"
    )
    config, tensors = (
        json.loads((out / "config.json").read_text()),
        load_file(out / "model.safetensors"),
    )
    assert DRAFTER.target_layer_ids == (-1, 0)  # embedding output, output of the first layer
    assert config["aux_hidden_state_layer_ids"] == [0, 1]  # inputs of the first and second layer
    assert config["layer_id_offset"] == 1
    assert config["sample_from_anchor"] is True
    assert config["block_size"] == DRAFTER.block_size
    (method,) = config["speculators_config"]["proposal_methods"]
    assert method["speculative_tokens"] == DRAFTER.block_size
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": str(target_dir),
        "architectures": ["LlamaForCausalLM"],
    }
    assert config["transformer_layer_config"]["vocab_size"] == DRAFTER.vocab_size
    assert config["draft_vocab_size"] == len(REDUCED)
    assert tensors["d2t"].dtype == np.int64
    np.testing.assert_array_equal(np.arange(len(REDUCED)) + tensors["d2t"], REDUCED)
    assert tensors["t2d"].dtype == np.bool_
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), REDUCED)
    head_UD = np.asarray(target.params.vocab.embed_VD)[REDUCED].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors["lm_head.weight"], head_UD)


@files_alone
def test_a_whole_vocabulary_is_left_to_the_target(target_dir, drafters, tmp_path):
    out = export.write_drafter(target_dir, drafters("gated", None), "speculators", tmp_path / "x")
    assert (
        not {"d2t", "t2d", "lm_head.weight", "embed_tokens.weight"}
        & load_file(out / "model.safetensors").keys()
    )
    assert json.loads((out / "config.json").read_text())["draft_vocab_size"] == DRAFTER.vocab_size


@files_alone
def test_a_speculators_file_without_our_additions_is_read(target_dir, target, drafters, tmp_path):
    """As that library writes it, or an older version with copies of the target's weights."""
    source = drafters(*REDUCED_DRAFTER)
    out = export.write_drafter(target_dir, source, "speculators", tmp_path / "x")
    edit_config(out, layer_id_offset=None, num_target_layers=None, num_anchors=None)
    embed_VD = np.asarray(target.params.vocab.embed_VD)
    extra = {
        "embed_tokens.weight": embed_VD,
        "verifier_norm.weight": np.ones(16, np.float32),
        "verifier_lm_head.weight": embed_VD[REDUCED],
    }
    edit_tensors(out, **extra)
    export.write_drafter(target_dir, out, "dspark", tmp_path / "back")
    assert_same_bits(source, tmp_path / "back")
    cfg = read_drafter(target, tmp_path / "back")[0]
    assert replace(cfg, num_anchors=7) == read_drafter(target, source)[0]


@files_alone
@pytest.mark.parametrize("tensor", ["embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_that_is_not_the_targets_is_left_aside_in_words_or_kept_on_request(
    tensor, target_dir, target, drafters, tmp_path, caplog
):
    source = drafters(*REDUCED_DRAFTER)
    out = export.write_drafter(target_dir, source, "speculators", tmp_path / "x")
    rows = np.asarray(target.params.vocab.embed_VD)
    edit_tensors(out, **{tensor: 2 * (rows if "embed" in tensor else rows[REDUCED])})
    bound = load_drafter_for(target, out).vocab
    assert f"own {tensor} differs from the target's by 100 %" in caplog.text
    np.testing.assert_array_equal(bound.embed_VD, rows)
    np.testing.assert_array_equal(bound.unembed_VD, rows[REDUCED])
    caplog.clear()
    kept = load_drafter_for(target, out, own_vocab=True).vocab
    assert not caplog.text
    embed, head = (2, 1) if "embed" in tensor else (1, 2)
    np.testing.assert_array_equal(kept.embed_VD, embed * rows)
    np.testing.assert_allclose(kept.unembed_VD, head * rows[REDUCED], rtol=1e-2)  # bfloat16


@files_alone
def test_a_reduced_vocabulary_is_expanded_on_request_alone(
    target_dir, drafters, tmp_path, monkeypatch
):
    source, there = drafters("vanilla", len(REDUCED)), tmp_path / "x"
    with pytest.raises(ValueError, match="no reduced vocabulary: add --full-vocabulary"):
        export.write_drafter(target_dir, source, "deepspec", there)
    monkeypatch.setattr(export, "acceptance", lambda *_: np.zeros(3))
    export.write_drafter(target_dir, source, "deepspec", there, full_vocabulary=True)
    assert "draft_vocab_size" not in json.loads((there / "config.json").read_text())
    tensors = load_file(there / "model.safetensors")
    assert "d2t" not in tensors
    assert tensors["lm_head.weight"].shape[0] == DRAFTER.vocab_size


@pytest.mark.parametrize("kind", VARIANTS)
def test_an_expanded_vocabulary_has_the_same_drafts_and_confidences(kind):
    cfg = replace(DRAFTER, draft_vocab_size=len(REDUCED), **VARIANTS[kind])
    params = random_params(3, declare_drafter(cfg))
    full = with_full_vocabulary(cfg, params, REDUCED)
    random = np.random.default_rng(4)
    hidden_XGD = random.standard_normal((5, 3, cfg.hidden_size), np.float32)
    previous_XG = random.integers(0, cfg.vocab_size, (5, 3), np.int32)
    base_XGV = 9 * random.standard_normal((5, 3, cfg.vocab_size), np.float32)

    @partial(jax.jit, static_argnums=0)
    def heads(cfg, params, base):
        embedding = None
        if params.head is not None:
            code, embedding = block_codes(params.head, previous_XG, hidden_XGD, cfg.markov_head)
            base = base + bias_logits(params.head, code)
        confidence = base[..., 0]
        if params.confidence is not None:
            confidence = confidence_logit(params.confidence, hidden_XGD, embedding, cfg)
        return jax.nn.softmax(base), confidence

    prob_XGU, confidence_XG = heads(cfg, params, base_XGV[..., REDUCED])
    prob_XGV, full_confidence_XG = heads(*full, base_XGV)
    np.testing.assert_allclose(prob_XGV[..., REDUCED], prob_XGU, rtol=1e-5)
    assert not np.delete(prob_XGV, REDUCED, axis=-1).any()
    if cfg.confidence:
        np.testing.assert_allclose(full_confidence_XG, confidence_XG, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", VARIANTS)
def test_expanding_a_reduced_vocabulary_passes_the_self_check(
    kind, target_dir, drafters, tmp_path, monkeypatch
):
    rates = []
    measure = export.acceptance
    monkeypatch.setattr(export, "acceptance", lambda *a: rates.append(measure(*a)) or rates[-1])
    source = drafters(kind, len(REDUCED))
    export.write_drafter(target_dir, source, "deepspec", tmp_path / "x", full_vocabulary=True)
    np.testing.assert_allclose(rates[1], rates[0], rtol=0, atol=1e-5)
    assert rates[0].shape == (DRAFTER.block_size,)
    assert 0.01 < rates[0].min() < rates[0].max() < 0.99


def tampered(monkeypatch, layout, tamper):
    """Let the writer of a layout make a mistake."""
    name = "save_speculators" if layout == "speculators" else "save_drafter"
    save = getattr(layouts, name)

    def wrong(directory, *args):
        save(directory, *args)
        tamper(directory)

    monkeypatch.setattr(layouts, name, wrong)


MISTAKES = {
    "layers one up": lambda out: edit_config(out, aux_hidden_state_layer_ids=[1, 2]),
    "slot 0 predicts nothing": lambda out: edit_config(out, sample_from_anchor=False),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_off_by_one_fails_the_self_check(mistake, target_dir, drafters, tmp_path, monkeypatch):
    tampered(monkeypatch, "speculators", MISTAKES[mistake])
    with pytest.raises(ValueError, match=r"self-check of the format|sample_from_anchor is False"):
        export.write_drafter(
            target_dir, drafters("vanilla", None), "speculators", tmp_path / "out" / "x"
        )
    assert not list((tmp_path / "out").iterdir())


@files_alone
def test_a_slot_more_fails_the_self_check(target_dir, drafters, tmp_path, monkeypatch):
    """The block of the other slot convention: one slot more for as many drafts."""
    monkeypatch.setattr(export, "acceptance", lambda _, cfg, *__: np.zeros(cfg.block_size))
    more = {"block_size": DRAFTER.block_size + 1}
    tampered(monkeypatch, "speculators", lambda out: edit_config(out, **more))
    with pytest.raises(ValueError, match="self-check of the format speculators failed"):
        export.write_drafter(target_dir, drafters("vanilla", None), "speculators", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_off_by_one_in_the_reference_layout_fails_the_self_check(
    target_dir, drafters, tmp_path, monkeypatch
):
    tampered(monkeypatch, "deepspec", lambda out: edit_config(out, target_layer_ids=[0, 1]))
    with pytest.raises(ValueError, match="self-check of the format deepspec failed"):
        export.write_drafter(target_dir, drafters("vanilla", None), "deepspec", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def templated(target, words):
    """The target with so many characters before the first question."""
    tokenizer = copy.deepcopy(target.tokenizer)
    tokenizer.chat_template = "x" * words + "{{ messages[0].content }}"
    return replace(target, tokenizer=tokenizer)


@pytest.mark.parametrize("words", [0, 90, 200, 300])
def test_the_self_check_looks_at_answers_behind_any_template(words, target):
    batch = export.check_batch(templated(target, words))
    assert batch.token_BS.shape[1] <= target.cfg.max_positions
    assert batch.loss_mask_BS.sum(axis=1).min() >= 70
    assert not batch.loss_mask_BS[:, :words].any()


def test_without_evidence_there_is_no_self_check(target, monkeypatch):
    with pytest.raises(ValueError, match=r"could not check .* the context has 512"):
        export.check_batch(templated(target, 600))
    monkeypatch.setattr(export, "_acceptance", lambda *_: np.zeros(3))
    cfg = replace(DRAFTER, num_target_layers=3)
    params = random_params(21, declare_drafter(cfg))
    with pytest.raises(ValueError, match="accepts none of the drafts at position 1"):
        export.acceptance(target, cfg, params, target.params.vocab, None)


@files_alone
@pytest.mark.parametrize("layout", ["dspark", "deepspec", "speculators"])
def test_what_is_exported_has_old_and_new_spellings(layout, target_dir, drafters, tmp_path):
    source, out = drafters("vanilla", None), tmp_path / "x"
    scaled = {"rope_type": "linear", "factor": 2.0}
    changed = shutil.copytree(source, tmp_path / "changed")
    edit_config(changed, rope_scaling=None, rope_parameters=scaled | {"rope_theta": 700.0})
    export.write_drafter(target_dir, changed, layout, out)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    config = config.get("transformer_layer_config", config)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 700.0
    assert config["rope_scaling"] == scaled
    assert config["rope_parameters"] == scaled | {"rope_theta": 700.0}


@files_alone
@pytest.mark.parametrize("layout", ["dspark", "deepspec", "speculators"])
def test_an_own_vocabulary_survives_export_on_request(
    layout, target_dir, target, drafters, tmp_path
):
    source = shutil.copytree(drafters("vanilla", None), tmp_path / "source")
    rows = np.asarray(target.params.vocab.embed_VD).astype(ml_dtypes.bfloat16)
    own = {"embed_tokens.weight": 2 * rows, "lm_head.weight": 3 * rows}
    edit_tensors(source, **own)
    out = export.write_drafter(target_dir, source, layout, tmp_path / "x", own_vocab=True)
    tensors = load_file(out / "model.safetensors")
    for name, value in own.items():
        np.testing.assert_array_equal(tensors[name], value)
    out = export.write_drafter(target_dir, source, layout, tmp_path / "y")
    tensors = load_file(out / "model.safetensors")
    assert ("embed_tokens.weight" in tensors) == (layout == "deepspec")
    if layout == "deepspec":
        np.testing.assert_array_equal(tensors["lm_head.weight"], rows)


def test_weights_that_are_not_finite_are_not_written(target_dir, target, tmp_path):
    cfg = replace(DRAFTER, num_target_layers=3)
    params = map_params(lambda param: np.full(param.shape, np.nan), declare_drafter(cfg))
    save_drafter(tmp_path / "drafter", cfg, jax.tree.map(np.float32, params))
    with pytest.raises(FloatingPointError, match="not finite"):
        export.write_drafter(target_dir, tmp_path / "drafter", "deepspec", tmp_path / "x")
    assert not (tmp_path / "x").exists()


CONFIG_FAULTS = {
    "speculators_model_type": ("peagle", "speculators_model_type 'peagle'"),
    "sample_from_anchor": ("no", "sample_from_anchor is 'no'"),
    "layer_id_offset": (2, "layer_id_offset is 2"),
    "transformer_layer_config": (None, "transformer_layer_config is missing"),
    "aux_hidden_state_layer_ids": ([1, "2"], "must be a list of integers"),
    "draft_vocab_size": (1000, "draft_vocab_size 1000"),
    "block_size": (10**12, "block_size 1000000000000 must lie in 1..511"),
    "markov_rank": (True, "markov_rank is True"),
    "mask_token_id": (None, "mask_token_id is missing"),
    "markov_head_type": ("quantum", "markov_head 'quantum'"),
    "logit_scale": (2.0, "logit_scale 2.0"),
    "num_target_layers": (2, "must lie in -1..0"),
}


@pytest.fixture
def broken(target_dir, drafters, tmp_path):
    """A copy of a speculators checkpoint, to be damaged."""
    cached = drafters(*REDUCED_DRAFTER).with_name("speculators")
    if not cached.exists():
        export.write_drafter(target_dir, drafters(*REDUCED_DRAFTER), "speculators", cached)
    return shutil.copytree(cached, tmp_path / "broken")


def refusal(source):
    with pytest.raises(LoadError) as caught:
        load_drafter(source, num_target_layers=3)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@files_alone
@pytest.mark.parametrize("key", CONFIG_FAULTS)
def test_a_wrong_configuration_is_named(key, broken):
    value, expected = CONFIG_FAULTS[key]
    if key == "num_target_layers":  # then the last layer of the target would be a feature layer
        edit_config(broken, aux_hidden_state_layer_ids=[0, 2])
    edit_config(broken, **{key: value})
    message = refusal(broken)
    assert expected in message
    assert "config.json" in message


@files_alone
@pytest.mark.parametrize("value", [{"model_type": "gemma4_text"}, {}, {"hidden_act": "gelu"}])
def test_other_layers_are_refused(value, broken):
    edit_config(broken, transformer_layer_config=value)
    assert "config.json" in refusal(broken)


TENSOR_FAULTS = {
    "negative": ({"d2t": np.zeros(13, np.int64) - np.arange(13)}, "increasing ids"),
    "below 0": ({"d2t": np.arange(13) - 14}, "increasing ids"),
    "far outside": ({"d2t": np.full(13, 2**63 - 1)}, "increasing ids"),
    "another table": ({"d2t": np.full(13, 3)}, "t2d marks other tokens"),
    "floats": ({"d2t": np.zeros(13, np.float32)}, "d2t has dtype float32"),
    "too few": ({"d2t": np.zeros(5, np.int64), "t2d": None}, "draft_vocab_size is 13"),
    "none": ({"d2t": None, "t2d": None}, "draft_vocab_size is 13"),
    "a mask of others": ({"t2d": np.ones(99, bool)}, "t2d has shape [99]"),
    "a mask of none": ({"t2d": np.zeros(97, bool)}, "t2d has shape [97]"),
    "left over": ({"mystery.weight": np.ones(3, np.float32)}, "mystery.weight is left over"),
    "missing": ({"fc.weight": None}, "fc.weight is missing"),
    "integers": ({"norm.weight": np.ones(16, np.int64)}, "norm.weight has dtype int64"),
}


@files_alone
@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_wrong_tensors_are_named(fault, broken):
    changes, expected = TENSOR_FAULTS[fault]
    edit_tensors(broken, **changes)
    assert expected in refusal(broken)


SPELLINGS = {
    "ids": {"d2t": REDUCED.astype(np.int64)},
    "the mask alone": {"d2t": None},
    "offsets alone": {"t2d": None},
    "offsets in int32": {"d2t": (REDUCED - np.arange(13)).astype(np.int32)},
}


@files_alone
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("said", [True, False])
def test_a_table_of_draft_tokens_in_other_words(spelling, said, broken):
    edit_tensors(broken, **SPELLINGS[spelling])
    if not said:
        edit_config(broken, draft_vocab_size=None)
    cfg, _, vocab = load_drafter(broken)
    assert cfg.draft_vocab_size == len(REDUCED)
    np.testing.assert_array_equal(vocab.d2t_U, REDUCED)


@files_alone
def test_draft_tokens_in_another_order_bring_their_rows_along(broken):
    cfg, params, vocab = load_drafter(broken)
    order = np.random.default_rng(0).permutation(13)
    stored = load_file(broken / "model.safetensors")
    rows = ("lm_head.weight", "markov_head.markov_w2.weight")
    edit_tensors(broken, d2t=REDUCED[order], **{name: stored[name][order] for name in rows})
    again = load_drafter(broken)
    assert again[0] == cfg
    jax.tree.map(np.testing.assert_array_equal, again[1:], (params, vocab))


@files_alone
def test_a_table_that_may_be_either_is_refused(broken):
    spread = np.arange(0, 52, 4)  # as ids these; as offsets 0, 5, 10, ...
    edit_tensors(broken, d2t=spread, t2d=None)
    assert "may hold offsets or ids" in refusal(broken)
    edit_tensors(broken, t2d=np.isin(np.arange(97), spread))
    np.testing.assert_array_equal(load_drafter(broken)[2].d2t_U, spread)
    edit_tensors(broken, t2d=np.isin(np.arange(97), spread + np.arange(13)))
    np.testing.assert_array_equal(load_drafter(broken)[2].d2t_U, spread + np.arange(13))


def run(capsys, *words):
    """Exit code, stdout and the lines on stderr of the command."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


@files_alone
def test_the_commands_write_and_say_where(target_dir, drafters, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)
    source, there, back = drafters("vanilla", 13), tmp_path / "there", tmp_path / "back"
    words = ("--target", target_dir, "--drafter", source, "--format", "speculators", "--out", there)
    code, out, _ = run(capsys, "export", *words)
    assert (code, out) == (0, f"{there}\n")
    code, out, _ = run(capsys, "convert", there, "--target", target_dir, "--out", back)
    assert (code, out) == (0, f"{back}\n")
    assert_same_bits(source, back)
    checked = []  # where answers begin
    monkeypatch.setattr(
        export,
        "acceptance",
        lambda *given: checked.append(given[-1].loss_mask_BS.argmax(1)) or np.zeros(3),
    )
    words = ("--target", target_dir, "--drafter", source, "--format", "deepspec")
    for name, rendered in (("full", ()), ("told", ("--system", "be"))):
        out = ("--full-vocabulary", "--out", tmp_path / name)
        assert run(capsys, "export", *words, *out, *rendered)[0] == 0
    np.testing.assert_array_equal(checked[2] - checked[0], len("be > "))
    assert load_file(tmp_path / "full" / "model.safetensors").keys() >= {"lm_head.weight"}


def assert_refused(result, *expected):
    code, out, err = result
    assert (code, out, len(err)) == (2, "", 1), result
    for word in expected:
        assert word in err[0]


@files_alone
def test_wrong_use_is_refused_in_one_line(target_dir, drafters, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)
    out = ("--out", tmp_path / "x")
    assert_refused(run(capsys, "export", *out), "--format")
    assert_refused(run(capsys, "export", "--format", "gguf", *out), "gguf")
    assert_refused(run(capsys, "convert", "drafter"), "--out")
    none = ("export", "--format", "deepspec", "--target", target_dir, *out)
    assert_refused(run(capsys, *none), "give --drafter")
    source = drafters("vanilla", 13)
    assert_refused(run(capsys, *none, "--drafter", source), "--full-vocabulary")
    assert_refused(run(capsys, *none, "--drafter", target_dir), "architectures")
    assert_refused(
        run(capsys, "convert", tmp_path / "no", "--target", target_dir, *out), "no such directory"
    )
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(load, "load_target", None)  # refused before anything is loaded
    exists = ("convert", source, "--target", target_dir, "--out", source)
    assert_refused(run(capsys, *exists), "exists already")
