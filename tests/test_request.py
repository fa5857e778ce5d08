"""Requests: what is taken in whatever form, and what is refused when it is made."""

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.engine.request import Request, within_context


class Encoding:
    """As the tokenizers library gives one."""

    ids = (5, 6)


FORMS = [
    [5, 6], (5, 6), range(5, 7), iter([5, 6]), np.array([5, 6]), np.array([5, 6], np.uint16),
    jnp.array([5, 6]), [np.int64(5), jnp.int32(6)], {"input_ids": [5, 6]}, Encoding(),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_ids_are_taken_in_every_form(form):
    request = Request(form, stop_ids=np.array([7]))
    assert (request.prompt_ids, request.stop_ids) == ((5, 6), (7,))
    assert {type(token) for token in (*request.prompt_ids, *request.stop_ids)} == {int}


def test_numbers_become_python_s_own():
    given = {"max_new_tokens": np.int32(4), "temperature": jnp.float32(0.5), "top_k": jnp.array(3)}
    request = Request([1], **given, min_p=0, stop_strings=["\n"], key=jnp.array([1, 2], jnp.uint32))
    assert dataclasses.astuple(request)[1:6] == (4, 0.5, 3, 1.0, 0.0)
    assert [type(value) for value in dataclasses.astuple(request)[1:6]] == [
        int, float, int, float, float,
    ]  # fmt: skip
    assert request.stop_strings == ("\n",)
    assert (request.key.dtype, request.key.tolist()) == (np.uint32, [1, 2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": "hello"}, "prompt_ids is 'hello': give token ids"),
        ({"prompt_ids": 5}, "prompt_ids is 5"),
        ({"prompt_ids": None}, "prompt_ids is None"),
        ({"prompt_ids": ["5"]}, r"prompt_ids\[0\] is '5'"),
        ({"prompt_ids": [1, 2.0]}, r"prompt_ids\[1\] is 2.0: give a whole number"),
        ({"prompt_ids": [True]}, r"prompt_ids\[0\] is True"),
        ({"prompt_ids": [1, -1]}, r"prompt_ids\[1\] is -1"),
        ({"prompt_ids": [2**31]}, r"prompt_ids\[0\] is 2147483648"),
        ({"prompt_ids": np.ones((1, 2), int)}, r"the shape \(1, 2\)"),
        ({"prompt_ids": np.ones(2)}, r"prompt_ids\[0\] is 1.0"),
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"stop_ids": 2}, "stop_ids is 2"),
        ({"stop_ids": [2**40]}, r"stop_ids\[0\] is"),
        ({"stop_strings": [b"end"]}, r"stop_strings\[0\] is b'end': give a text, .* decode"),
        ({"stop_strings": None}, "stop_strings is None"),
        ({"stop_strings": ["a\ud83d"]}, r"stop_strings\[0\] has '\\ud83d' at character 2"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": "9"}, "max_new_tokens is '9'"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": None}, "temperature is None"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 10**400}, "top_p is 1000"),
        ({"logprobs": 1}, "logprobs is 1"),
        ({"presence_penalty": 2.5}, r"presence_penalty is 2.5: give a number in -2..2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"repetition_penalty": 0}, r"repetition_penalty is 0.0: give a number in 0.01..100"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\]: give a dict"),
        ({"logit_bias": {3: 101}}, r"logit_bias\[3\] is 101: give a number in -100..100"),
        ({"logit_bias": {"3": 1}}, r"logit_bias\[0\] is '3': give a whole number"),
        ({"logit_bias": {-3: 1}}, r"logit_bias\[0\] is -3"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias has 301 ids: give 300 at most"),
        ({"top_logprobs": 21}, r"top_logprobs is 21: give 0..20"),
        ({"grammar": "[a-z]"}, r"grammar is '\[a-z\]': give a Grammar"),
        ({"key": 7}, "key is 7"),
        ({"key": [0.5, 1]}, "key is"),
        ({"key": [-1, 1]}, "key is"),
    ],
)
def test_what_is_not_meant_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt_ids": [1], **fields})


TURN = {"role": "user", "content": "why"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"why", "prompt is b'why': give a text, .* decode"),
        (["why"], r"prompt is \['why'\]: give a text"),
        ("why \ud83d", r"prompt has '\\ud83d' at character 5"),
        ("\udcff", "prompt has the byte 0xff at character 1"),
        ("", "the prompt is empty"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        Request(prompt=prompt)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the prompt is empty"),
        (TURN, "messages is .* give a list of turns"),
        ("why", "messages is 'why': give a list of turns"),
        (b"why", "messages is b'why': give a list of turns"),
        (["why"], r"messages\[0\] is 'why': give a dict with role and content"),
        ([TURN, {"role": "user"}], r"messages\[1\] is .* give a dict with role and content"),
        ([{"content": "why"}], r"messages\[0\] is .* give a dict with role and content"),
        ([TURN | {"role": "human"}], r"messages\[0\] has the role 'human': give one of system, "),
        ([TURN | {"role": None}], "has the role None"),
        ([TURN | {"content": None}], r"messages\[0\] content is None: give a text"),
        ([TURN | {"content": b"why"}], r"messages\[0\] content is b'why': give a text, .*decode"),
        ([TURN | {"content": "\ud83d"}], r"messages\[0\] content has '\\ud83d' at character 1"),
        ([TURN | {"content": [None]}], r"messages\[0\] content\[0\] is None"),
        ([TURN | {"content": [{"type": "text"}]}], r"content\[0\] is None: give a text"),
        ([TURN | {"content": ["a", {"type": "image"}]}], r"content\[1\] is of the type 'image'"),
    ],
)
def test_turns_that_are_none_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        Request(messages=messages)


def test_texts_become_python_s_own_and_parts_become_one():
    request = Request(prompt=np.str_("why"), stop_strings=np.array(["a", "b"]))
    assert [type(text) for text in (request.prompt, *request.stop_strings)] == [str, str, str]
    parts = [{"type": "text", "text": "w"}, {"text": "h"}, "y"]
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    request = Request(messages=iter([TURN | {"content": parts, "name": "me"}, call]))
    assert request.messages == (TURN | {"name": "me"}, call | {"content": ""})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
FIELDS = [field.name for field in dataclasses.fields(Request)]


@settings(max_examples=300, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4))
def test_a_request_is_made_or_refused_and_nothing_else(fields):
    """Whatever it is given: another exception than ``ValueError`` fails this test."""
    with contextlib.suppress(ValueError):
        request = Request(**{"prompt_ids": [1], **fields})
        largest = max(*request.prompt_ids, *request.stop_ids, 0)
        assert largest < 2**31
        assert request.max_new_tokens >= 1
        assert request.key.shape == (2,)
        request.check(2**31, largest + 1)
        with pytest.raises(ValueError, match=f"has the id {largest}, and the target's ids"):
            request.check(2**31, largest)


def test_texts_end_with_the_context_and_that_is_said_once(caplog):
    asked = [Request([1] * length, most) for length, most in ((4, 8), (4, 6), (9, 8), (12, 8))]
    assert within_context(asked[1:2], 10) == asked[1:2]
    assert not caplog.records
    cut = within_context(asked, 10)
    assert [request.max_new_tokens for request in cut] == [6, 6, 1, 8]  # no room: for a refusal
    assert caplog.messages == [
        "max_new_tokens is 8, and the target's context of 10 leaves 2 of 4 texts less room "
        "(1 at least): they end there"
    ]


def test_ids_of_a_bias_are_the_targets():
    request = Request([1], logit_bias={np.int64(9): -100}, top_logprobs=1)
    assert (request.logit_bias, request.logprobs) == ({9: -100.0}, True)
    request.check(100, 10)
    with pytest.raises(ValueError, match=r"logit_bias has the id 9, .* are 0\.\.8"):
        request.check(100, 9)
