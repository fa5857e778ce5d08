"""The fixed encoding of conversations with DeepSeek-V4."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dspark_jax.checkpoints.chat import find_chat_format
from dspark_jax.checkpoints.load import open_target
from dspark_jax.checkpoints.template import apply_template
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids
from dspark_jax.models.targets.deepseek_v4_text import CHAT_TEMPLATE
from dspark_jax.rendering import Rendering
from tests.test_deepseek_v4 import GOLDEN
from tests.tiny_model import PRINTABLE

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ANSWER = "<｜User｜>", "<｜Assistant｜>"
SYSTEM = {"role": "system", "content": "be brief"}
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two", "reasoning_content": "hm"},
    {"role": "user", "content": "three"},
]
TOOLS = [
    *TALK[:2],
    {"role": "tool", "content": "4"},
    {"role": "tool", "content": "5"},
]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {text: n for n, text in enumerate([BEGIN, END, USER, ANSWER, *PRINTABLE])}
    made = Tokenizer(BPE(vocabulary, []))
    made.add_special_tokens([USER, ANSWER])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=BEGIN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
    )


def test_a_checkpoint_without_a_template_is_given_it(tokenizer, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(GOLDEN / "checkpoint" / name)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    target, _ = open_target(tmp_path)
    found = chat_prompt_ids(target.tokenizer, "a")
    assert found == tokenizer.convert_tokens_to_ids([BEGIN, USER, "a", ANSWER, *"</think>"])


@pytest.mark.parametrize(
    ("turns", "thinking", "text"),
    [
        (TALK[:1], False, f"{BEGIN}{USER}one{ANSWER}</think>"),
        (TALK[:1], True, f"{BEGIN}{USER}one{ANSWER}<think>"),
        (
            [SYSTEM, *TALK],
            False,
            f"{BEGIN}be brief{USER}one{ANSWER}</think>two{END}{USER}three{ANSWER}</think>",
        ),
        # What was thought is left out, unless tools have answered.
        (TALK, True, f"{BEGIN}{USER}one{ANSWER}</think>two{END}{USER}three{ANSWER}<think>"),
        (
            TOOLS,
            True,
            f"{BEGIN}{USER}one{ANSWER}<think>hm</think>two{END}{USER}<tool_result>4</tool_result>"
            f"\n\n<tool_result>5</tool_result>{ANSWER}<think>",
        ),
    ],
)
def test_conversations_are_encoded_as_the_checkpoints_say(tokenizer, turns, thinking, text):
    rendering = Rendering(template_args={"thinking": thinking})
    assert apply_template(tokenizer, turns, rendering, open_answer=True) == text


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_are_found_for_training(tokenizer, thinking):
    chat = find_chat_format(tokenizer, Rendering(template_args={"enable_thinking": thinking}))
    assert chat.header.startswith(ANSWER)
    assert chat.end == END


@pytest.mark.parametrize(
    ("turns", "tools", "named"),
    [
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], None, "tool_calls"),
        (TALK, [{"type": "function"}], "tools"),
    ],
)
def test_what_the_encoding_lacks_is_refused(tokenizer, turns, tools, named):
    with pytest.raises(LoadError, match=named):
        apply_template(tokenizer, json.loads(json.dumps(turns)), tools=tools)
