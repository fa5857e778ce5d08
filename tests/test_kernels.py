"""Which implementation of the kernels an engine chooses, on devices that are not there."""

import dataclasses
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.axes import abstract_params
from dspark_jax.engine import kernels
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import Decoder, make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.inputs import Weights
from dspark_jax.engine.kernels import choose_kernels
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.table import family_of
from pallas_kernels import dispatch
from tests.test_families import CONFIGS
from tests.tiny_model import DRAFTER, TARGET, random_params

WIDE = {"head_dim": 64}
FITS = dataclasses.replace(TARGET, **WIDE), dataclasses.replace(DRAFTER, **WIDE)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU and a jax that can run the kernels."""
    device = SimpleNamespace(platform="gpu", device_kind="H100", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(dispatch, "version_problem", lambda: None)
    monkeypatch.setattr(kernels, "_said", set())
    return device


def decoder_of(target, drafter=None, dtypes=(jnp.bfloat16, jnp.bfloat16)):
    """Without weights."""
    params = abstract_params(family_of(target).declare(target), dtypes[0])
    drafts = None if drafter is None else abstract_params(declare_drafter(drafter), dtypes[1])
    return Decoder(Weights(params, drafts), target, drafter, None, None)


def test_kernels_are_chosen_where_they_can_run_and_that_is_said_once(hopper, caplog):
    caplog.set_level(logging.INFO)
    decoder = decoder_of(*FITS)
    assert [choose_kernels(decoder, "auto", (64, 1088)) for _ in range(3)] == ["mosaic_gpu"] * 3
    assert [record.message for record in caplog.records] == ["kernels: mosaic_gpu"]
    assert choose_kernels(decoder, "mosaic_gpu", (64,)) == "mosaic_gpu"
    assert choose_kernels(decoder, "xla") == "xla"
    assert len(caplog.records) == 1


HALF = jnp.bfloat16, jnp.float32
SOFT = dataclasses.replace(CONFIGS["gemma2"], head_dim=64, local_head_dim=64)


@pytest.mark.parametrize(
    ("decoder", "positions", "reason"),
    [
        (decoder_of(*FITS, dtypes=HALF), (64,), "the drafter has float32 weights"),
        (decoder_of(*FITS, dtypes=HALF[::-1]), (64,), "the target has float32 weights"),
        (decoder_of(FITS[0], DRAFTER), (64,), "the drafter has heads of 8"),
        (decoder_of(TARGET), (64,), "the target has heads of 8"),
        (decoder_of(SOFT), (64,), "the target has scores with a soft cap"),
        (decoder_of(*FITS), (64, 100), "a cache of 100 positions"),
    ],
)
def test_xla_is_chosen_where_the_kernels_have_no_form(decoder, positions, reason, hopper, caplog):
    caplog.set_level(logging.INFO)
    assert choose_kernels(decoder, "auto", positions) == "xla"
    (record,) = caplog.records
    assert record.message.startswith("kernels: xla (")
    assert reason in record.message
    with pytest.raises(ValueError, match=r"kernels is 'mosaic_gpu': the .* xla") as error:
        choose_kernels(decoder, "mosaic_gpu", positions)
    assert reason in str(error.value)


def test_an_older_gpu_is_told(hopper, caplog):
    caplog.set_level(logging.INFO)
    hopper.compute_capability = "8.0"
    assert choose_kernels(decoder_of(*FITS), "auto") == "xla"
    assert "compute capability 9.0 and H100 has 8.0" in caplog.text


def test_other_devices_have_no_choice_and_nothing_is_said(caplog):
    caplog.set_level(logging.INFO)
    if jax.default_backend() != "cpu":
        pytest.skip("a GPU has a choice")
    assert choose_kernels(decoder_of(*FITS), "auto") == "xla"
    assert not caplog.records
    with pytest.raises(ValueError, match="kernels is 'mosaic_gpu': mosaic_gpu needs"):
        choose_kernels(decoder_of(*FITS), "mosaic_gpu")
    with pytest.raises(ValueError, match="kernels is 'cuda': choose one of auto, xla, mosaic_gpu"):
        choose_kernels(decoder_of(*FITS), "cuda")


def test_an_engine_has_a_concrete_implementation():
    target = TARGET, random_params(0, family_of(TARGET).declare(TARGET))
    engine = Engine(make_decoder(target), EngineConfig(slots=1, positions=64))
    assert engine.config.kernels in dispatch.IMPLEMENTATIONS
    assert engine._setting["kernels"] == engine.config.kernels
