"""Prompts that come with the package."""

import pytest

from dspark_jax.cli.arguments import make_parser
from dspark_jax.evaluation.talks import read_talks
from dspark_jax.prompts import NAMES, find


def test_every_set_is_read_under_its_own_name():
    talks = read_talks([find(f"own:{name}") for name in NAMES])
    assert set(talks) == set(NAMES)
    texts = [talk.turns[0] for some in talks.values() for talk in some]
    assert len(texts) == len(set(texts)) == 48


def test_commands_take_their_names():
    args = make_parser("").parse_args(["bench", "speed", "--prompts", "own:math"])
    assert args.prompts == [find("own:math")]


def test_an_unknown_set_is_named(capsys):
    with pytest.raises(SystemExit):
        make_parser("").parse_args(["prepare", "own:maths", "--out", "x"])
    assert "'own:maths' is no set of prompts: known are math, code, chat" in capsys.readouterr().err
