"""How prompts are rendered, for decoding and training: system turn, template, its arguments."""

import json
import logging
import re

import pytest

from dspark_jax.characters import check_characters
from dspark_jax.checkpoints.chat import encode_conversation, find_chat_format
from dspark_jax.checkpoints.conversations import Conversation
from dspark_jax.checkpoints.template import check_rendering
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids, load_tokenizer
from dspark_jax.config import TrainConfig
from dspark_jax.overrides import override
from dspark_jax.rendering import PLAIN, RESERVED, Rendering, parse_arguments
from dspark_jax.training import data
from tests.tiny_model import write_target

LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
OPEN = "{% if add_generation_prompt %}<assistant>{{ opening }}{% endif %}"
USER, ANSWER = {"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("rendering") / "target")


@pytest.fixture
def tokenizer(saved):
    """Of one token a character."""
    found = load_tokenizer(saved)
    found.chat_template = LOOP + OPEN
    return found


def text_of(tokenizer, prompt, rendering=PLAIN):
    return tokenizer.decode(chat_prompt_ids(tokenizer, prompt, rendering))


@pytest.mark.parametrize(
    ("values", "prompt", "expected"),
    [
        ({}, "why", "<user>why;<assistant>"),
        ({"system": "be"}, "why", "<system>be;<user>why;<assistant>"),
        (
            {"system": "be"},
            [{"role": "system", "content": "own"}, USER],
            "<system>own;<user>why;<assistant>",
        ),
        (
            {"system": "be"},
            [{"role": "developer", "content": "own"}, USER],
            "<developer>own;<user>why;<assistant>",
        ),
        ({"template_args": {"opening": 7}}, "why", "<user>why;<assistant>7"),
        ({"chat_template": False}, "why", "why"),
        ({"chat_template": False}, [USER, ANSWER, USER], "why\nbecause\nwhy"),
        ({"chat_template": False, "system": "be"}, "why", "be\nwhy"),
    ],
)
def test_a_prompt_is_rendered_as_asked(tokenizer, values, prompt, expected):
    expected = expected.replace("\n", "")  # which this vocabulary lacks
    assert text_of(tokenizer, prompt, Rendering(**values)) == expected


def test_without_a_template_the_tokenizer_begins_texts_as_it_does(tokenizer):
    tokenizer.add_bos_token = True
    plain = Rendering(chat_template=False)
    assert chat_prompt_ids(tokenizer, "why", plain) == tokenizer.encode("why")
    tokenizer.chat_template = None
    assert chat_prompt_ids(tokenizer, "why") == tokenizer.encode("why")


def test_arguments_are_json_or_strings():
    texts = ("a=false", "b=3", "c=x y", 'd=["p", {"q": null}]', "e=", "f=NaN", "g=k=v", 'h="3"')
    assert parse_arguments(texts) == {
        "a": False,
        "b": 3,
        "c": "x y",
        "d": ["p", {"q": None}],
        "e": "",
        "f": "NaN",
        "g": "k=v",
        "h": "3",
    }
    assert parse_arguments(["deep=" + "[" * 100_000])["deep"].startswith("[")
    for text in ("a", "=1", "1a=2", "a b=2", ""):
        with pytest.raises(ValueError, match="is not KEY=VALUE"):
            parse_arguments([text])
    with pytest.raises(ValueError, match="a is given twice"):
        parse_arguments(["a=1", "b=1", "a=2"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"system": None}, "system is None: give a text"),
        ({"system": b"be"}, "system is b'be'"),
        ({"system": " \n"}, "only white space"),
        ({"system": "be \ud83d"}, r"system has '\\ud83d' at character 4"),
        ({"chat_template": "no"}, "chat_template is 'no'"),
        ({"template_args": ["a=1"]}, r"template_args is \['a=1'\]: give a dict"),
        ({"template_args": {1: 2}}, "argument 1 is no name"),
        ({"template_args": {"a-b": 2}}, "argument 'a-b' is no name"),
        ({"template_args": {"a": float("nan")}}, "a is nan: give a JSON value"),
        ({"template_args": {"a": {1, 2}}}, "a is {1, 2}: give a JSON value"),
        ({"template_args": {"a": ["\udc80"]}}, "argument a has the byte 0x80"),
        ({"template_args": {"a": 1, "b": 2}, "chat_template": False}, "a, b has no effect"),
        *(({"template_args": {name: 1}}, f"{name} is not free") for name in sorted(RESERVED)),
    ],
)
def test_what_cannot_be_rendered_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Rendering(**values)


def test_a_rendering_is_not_changed_from_outside_and_notes_what_is_not_the_default():
    given = {"a": (1, 2)}
    rendering = Rendering("be", template_args=given)
    given["b"] = 3
    assert rendering.record() == {"system": "be", "template_args": {"a": [1, 2]}}
    assert PLAIN.record() == {}
    assert Rendering(chat_template=False).record() == {"chat_template": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\udcff", "it has the byte 0xff at character 3, which is not UTF-8"),
        ("\ud83d", r"it has '\\ud83d' at character 1, which is half of a surrogate pair"),
        ("a\udc00", r"it has '\\udc00' at character 2, which is half"),
    ],
)
def test_a_text_that_is_none_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        check_characters("it", text)
    check_characters("it", "\0 \N{GRINNING FACE}\uffff")


def test_a_half_is_refused_wherever_it_comes_from(tokenizer):
    for turn in (USER | {"content": "\ud83d"}, USER | {"role": "\ud83d"}):
        for chat_template in (LOOP, None) if turn["role"] == "user" else (LOOP,):
            tokenizer.chat_template = chat_template
            with pytest.raises(ValueError, match="half of a surrogate pair"):
                chat_prompt_ids(tokenizer, [turn, USER])
    tokenizer.chat_template = r"{{ '\ud83d' }}"
    with pytest.raises(ValueError, match="the rendered prompt has"):
        chat_prompt_ids(tokenizer, "why")
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(ValueError, match="the chat template makes nothing of the prompt"):
        chat_prompt_ids(tokenizer, "why")


# What comes to nothing with a target.

DATED = (
    "{% if not date is defined %}{% set date = 'today' %}{% endif %}{{ date }}{{ bos_token }}"
    "{% for m in messages %}{% generation %}{{ m.content }}{%- endgeneration -%}"
    "{% if m.last %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
)


@pytest.mark.parametrize(
    ("template", "values", "warnings"),
    [
        (LOOP, {}, []),
        (LOOP, {"system": "be"}, []),
        (LOOP + OPEN, {"template_args": {"opening": 1}}, []),
        (DATED, {"template_args": {"date": 1}}, []),
        (DATED, {"template_args": {"day": 1}}, [r"t does not know the argument day.*known: date"]),
        (LOOP, {"template_args": {"m": 1}}, [r"not know the argument m, .*known: none"]),
        ("{{ messages[-1].content }}", {"system": "be"}, ["t leaves out or changes system turns"]),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", {"system": "be"}, []),
        # Which wants contents in parts.
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", {}, ["changes user turns"]),
        (None, {}, ["^t has no chat template: prompts are decoded as plain text"]),
        (None, {"system": "be"}, ["^t has no chat template"]),
        (None, {"chat_template": False}, []),
        ("{% for %}", {"template_args": {"a": 1}}, []),  # which every prompt says
    ],
)
def test_what_has_no_effect_is_said(tokenizer, caplog, template, values, warnings):
    caplog.set_level(logging.WARNING, "dspark_jax")
    tokenizer.chat_template = template
    check_rendering(tokenizer, Rendering(**values), "t")
    assert len(caplog.messages) == len(warnings)
    for message, expected in zip(caplog.messages, warnings, strict=True):
        assert re.search(expected, message)


def test_what_a_target_cannot_do_is_refused(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no such role') if messages[1:] }}" + LOOP
    with pytest.raises(LoadError, match=r"t: .* refuses the system turn: no such role: leave out"):
        check_rendering(tokenizer, Rendering("be"), "t")
    tokenizer.chat_template = None
    with pytest.raises(LoadError, match="t has no chat template, which the template argument a"):
        check_rendering(tokenizer, Rendering(template_args={"a": 1}), "t")


# Training.


def test_a_drafter_is_trained_on_the_prompts_that_are_decoded(tokenizer):
    settings = ["system=be", "template_args=opening=2", "min_loss_tokens=2", "max_length=99"]
    recipe = override(TrainConfig(), settings)
    talk = Conversation((USER, ANSWER), "d:1", response_ids=(3, 4))
    (found,), _ = data.tokenize([talk], tokenizer, 5, recipe)
    prompt = chat_prompt_ids(tokenizer, "why", Rendering("be", template_args={"opening": 2}))
    assert found.token_S.tolist() == [*prompt, 3, 4, 5]


@pytest.mark.parametrize(
    ("noted", "settings", "warned"),
    [
        ({"target": "t"}, [], []),
        ({"target": "t"}, ["template_args=a=1"], ["template_args {}.*{'a': 1}"]),
        ({"template_args": {"a": 1}}, ["template_args=a=1"], []),
        ({"template_args": {"a": 1}}, [], ["template_args {'a': 1}.*{}"]),
        ({"chat_template": False}, [], ["chat_template False.*True"]),
        ({"system": "be"}, [], []),  # the turns lie in the data
        ({"system": "be"}, ["system=do"], []),
        ({}, ["system=do"], ["system ''.*'do'"]),
        ([], ["system=do"], []),
        (None, ["system=do"], []),
    ],
)
def test_answers_to_other_prompts_are_told(tmp_path, caplog, noted, settings, warned):
    if noted is not None:
        (tmp_path / "d.jsonl.recipe.json").write_text(json.dumps(noted))
    data.check_answers(override(TrainConfig(data=f"{tmp_path}/d.jsonl"), settings))
    assert len(caplog.messages) == len(warned)
    for message, expected in zip(caplog.messages, warned, strict=True):
        assert re.search(f"d.jsonl answers prompts that were rendered with {expected}", message)


def test_answers_are_found_in_a_text_that_is_rendered_as_asked(tokenizer):
    tokenizer.chat_template = LOOP.replace(";", "{{ end }}") + OPEN
    rendering = Rendering("be", template_args={"end": "!"})
    chat = find_chat_format(tokenizer, rendering)
    assert (chat.header, chat.end) == ("<assistant>", "!")
    talk = Conversation((USER, ANSWER), "d:1")
    token_S, mask_S = encode_conversation(talk, tokenizer, chat, 5, rendering)
    assert tokenizer.decode(token_S) == "<system>be!<user>why!<assistant>because!"
    assert tokenizer.decode(token_S[mask_S]) == "because!"


def test_without_the_template_training_needs_the_answers_ids(tokenizer):
    recipe = override(TrainConfig(), ["chat_template=false", "min_loss_tokens=2"])
    talk = Conversation((USER, ANSWER), "d:1", response_ids=(3, 4))
    (found,), _ = data.tokenize([talk], tokenizer, 5, recipe)
    assert found.token_S.tolist() == [*tokenizer.encode("why"), 3, 4, 5]
    with pytest.raises(
        ValueError, match=r"chat_template is false.* give every answer's response_ids"
    ):
        data.tokenize([Conversation((USER, ANSWER), "d:1")], tokenizer, 5, recipe)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("template_args=a=false,b=x", {"a": False, "b": "x"}),
        ('template_args=["a=[1,2]", "b=x,y"]', {"a": [1, 2], "b": "x,y"}),
        ("template_args=", {}),
    ],
)
def test_arguments_of_the_template_are_settings_of_a_recipe(setting, expected):
    recipe = override(TrainConfig(), [setting])
    assert recipe.rendering() == Rendering(template_args=expected)
    hash(recipe)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("template_args=a", "'a' is not KEY=VALUE"),
        ("template_args=[1]", "must be strings with commas, or a JSON list"),
        ("template_args=[", "must be strings with commas, or a JSON list"),
        ("template_args=tokenize=1", "tokenize is not free"),
        ("system=\udcff", "system has the byte 0xff"),
        ("chat_template=maybe", "must be true or false"),
    ],
)
def test_a_setting_that_cannot_be_rendered_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        override(TrainConfig(), [setting])


@pytest.mark.parametrize("given", ["a=1", {"a": 1}, (1,), None])
def test_a_configuration_lists_the_arguments_of_the_template(given):
    with pytest.raises(ValueError, match=r"template_args is .*: give a tuple of KEY=VALUE texts"):
        TrainConfig(template_args=given)
