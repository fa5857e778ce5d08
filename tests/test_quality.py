"""How far quantised weights are from plain ones."""

import json

import numpy as np
import pytest

from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.cli import command as cli
from dspark_jax.engine import generate
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.evaluation import quality
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import unembed
from tests.tiny_model import few_sizes

ROW = ["set", "prompts", "tokens", "kl", "top1", "same_text", "accepted_length"]


@pytest.fixture(scope="module")
def decoders(models):
    def of(kind):
        target = load_target(models[1], weights=kind)
        drafter = load_drafter_for(target, models[3], weights=kind)
        return make_decoder(
            (target.cfg, target.params), (drafter.cfg, drafter.params, drafter.vocab)
        )

    return of("plain"), of("fp8")


def test_laws_are_compared_at_the_tokens_of_the_answer(models, decoders):
    prompt, answer = [3, 9, 4], [7, 7, 1, 30]
    kl_X, same_X = quality.compare_laws(*decoders, prompt, answer)
    expected, token_S = [], np.array([[*prompt, *answer]])
    for kind in "plain", "fp8":
        found = load_target(models[1], weights=kind)
        hidden_BSD, _ = family_of(found.cfg).encode(found.params, token_S, found.cfg)
        logits_SV = np.float64(unembed(found.params.vocab, hidden_BSD[0]))[2:-1]
        expected.append(logits_SV - np.log(np.exp(logits_SV).sum(-1, keepdims=True)))
    plain_XV, other_XV = expected
    kl = (np.exp(plain_XV) * (plain_XV - other_XV)).sum(-1)
    assert (kl > 1e-6).all()
    np.testing.assert_allclose(kl_X, kl, rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(same_X, plain_XV.argmax(-1) == other_XV.argmax(-1))
    same_kl_X, agree_X = quality.compare_laws(decoders[0], decoders[0], prompt, answer)
    assert np.abs(same_kl_X).max() < 1e-6
    assert agree_X.all()


@pytest.mark.full
@pytest.mark.usefixtures("own_cache")
def test_the_command_reports_every_file_and_all_of_them(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "config_for", few_sizes)
    names = []
    for name in "one", "two":
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name} {n}"}) + "\n" for n in range(2)))
        names += ["--prompts", str(path)]
    words = ["bench", "quality", *models, *names, "--max-new-tokens", "6", "--limit", "1"]
    assert cli.main(words) == 2
    assert "give --weights int8" in capsys.readouterr().err
    assert cli.main([*words, "--weights", "int8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["set"] for row in report["rows"]] == ["one", "two", "all"]
    for row in report["rows"]:
        assert list(row) == ROW
        assert 0 <= row["kl"] < 0.1
        assert row["accepted_length"].keys() == {"plain", "quantised"}
    assert report["rows"][2]["tokens"] == sum(row["tokens"] for row in report["rows"][:2])
    assert report["weight_bytes"]["quantised"] < report["weight_bytes"]["plain"]
    assert report["weights"] == "int8"
    names = {"target": "t", "drafter": "d", "weights": "int8"}
    assert "same text" in quality.format_quality(report | names)
