"""What models take on a device, said from headers, against what they take."""

import json
import shutil

import jax
import numpy as np
import pytest

from dspark_jax.axes import make_mesh
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.cli import command as cli
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.state import make_state
from dspark_jax.evaluation import footprint
from tests.tiny_model import CONTEXT, TARGET

ASKED = {"slots": 4, "positions": 100, "memory_bytes": 10**9, "dtype": "float32"}


def on_one_device(tree):
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_weights_and_state_are_those_of_a_device(models, kind, emulated_devices):
    target, drafter = models[1], models[3]
    mesh = make_mesh(tensor=2, devices=emulated_devices)
    found = load_target(target, mesh=mesh, weights=kind)
    bound = load_drafter_for(found, drafter, mesh=mesh, weights=kind)
    pair = bound.cfg, bound.params, bound.vocab
    weights = make_decoder((found.cfg, found.params), pair, mesh=mesh).weights
    opened = footprint.open_models(target, drafter)
    report = footprint.plan(opened, {"tensor": 2}, weights=kind, **ASKED)
    assert report["weight_bytes"] == on_one_device(weights)
    form = footprint._state_config(opened, 4, 100, np.dtype("float32"))
    assert report["state_bytes"] == on_one_device(make_state((), form, mesh))
    assert report["total_bytes"] == sum(
        report[f"{part}_bytes"] for part in ("weight", "state", "temporary")
    )


def test_a_configuration_is_enough_and_is_not_executed(models, tmp_path):
    shutil.copy(f"{models[1]}/config.json", tmp_path / "config.json")
    alone = footprint.plan(footprint.open_models(str(tmp_path)), {}, **ASKED)
    whole = footprint.plan(footprint.open_models(models[1]), {}, **ASKED)
    assert alone | {"target": ""} == whole | {"target": ""}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        footprint.open_models(str(tmp_path))


def test_the_most_slots_are_those_that_still_fit(models):
    opened = footprint.open_models(models[1], models[3])
    report = footprint.plan(opened, {"data": 2}, **ASKED)
    most = report["most_slots"]
    assert report["fits"]
    assert most % 2 == 0
    at, above = (
        footprint.plan(opened, {"data": 2}, **ASKED | {"slots": most + more}) for more in (0, 2)
    )
    assert at["fits"]
    assert not above["fits"]


def test_the_command_says_so_and_refuses_in_one_line(models, capsys):
    words = ["plan", *models, "--mesh", "tensor=2", "--slots", "4", "--positions", "100"]
    assert cli.main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mesh"] == {"tensor": 2}
    assert report["dtype"] == "bfloat16"
    assert cli.main(words) == 0
    assert "fits into 90% of the memory" in capsys.readouterr().out
    assert cli.main([*words[:-1], str(CONTEXT + 1)]) == 2
    assert f"context ends at {TARGET.max_positions}" in capsys.readouterr().err
    assert cli.main([*words, "--mesh", "data=3"]) == 2
    assert "slots is 4: it must be a multiple of the 3 data shards" in capsys.readouterr().err
