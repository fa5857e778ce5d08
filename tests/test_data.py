"""Training data: chat templates and loss masks, buckets, order."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.checkpoints.chat import ChatFormat, encode_conversation, find_chat_format, render
from dspark_jax.checkpoints.conversations import Conversation
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids, load_tokenizer
from dspark_jax.config import TrainConfig
from dspark_jax.training import data

DATA = Path(__file__).parent / "data"
RECIPE = TrainConfig(max_length=64, tokens_per_batch=256, min_loss_tokens=8)
USER = {"role": "user", "content": "a"}


@pytest.fixture
def tokenizer():
    return load_tokenizer(DATA / "tokenizer_qwen_plain")


def conversation(*texts, **values):
    """User and assistant in turns."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return Conversation(tuple(turns), "d:1", **values)


# The recorded masks of the reference.


@pytest.fixture(params=["qwen_plain", "qwen_think", "gemma4"])
def golden(request):
    """Cases, tokenizer, chat format and the conversations that the reference made of its input."""
    found = json.loads((DATA / "chat_parser" / f"{request.param}.json").read_text())
    tokenizer = load_tokenizer(DATA / f"tokenizer_{request.param}")
    conversations = [
        Conversation(tuple(case["conversations"]), case["name"]) for case in found["cases"]
    ]
    if request.param == "gemma4":  # with an unsupervised thinking block before every answer
        return found, tokenizer, find_chat_format(tokenizer), conversations
    # It puts a system turn first where there is none.
    system = ({"role": "system", "content": "You are a helpful assistant."},)
    return (
        found,
        tokenizer,
        find_chat_format(tokenizer),
        [
            dataclasses.replace(one, turns=system[one.turns[0]["role"] == "system" :] + one.turns)
            for one in conversations
        ],
    )


def test_ids_and_masks_are_the_references(golden):
    found, tokenizer, chat, conversations = golden
    for case, one in zip(found["cases"], conversations, strict=True):
        assert render(tokenizer, chat.opened(one.turns)) == case["rendered_text"]
        token_S, mask_S = encode_conversation(one, tokenizer, chat, 0)
        length = case["max_length"]
        assert token_S[:length].tolist() == case["input_ids"], case["name"]
        assert mask_S[:length].astype(int).tolist() == case["loss_mask"], case["name"]
        assert (token_S.dtype, mask_S.dtype) == (np.int32, bool)


def test_short_answers_are_dropped_and_the_rest_padded_as_in_the_reference(golden, monkeypatch):
    found, tokenizer, chat, conversations = golden
    monkeypatch.setattr(data, "find_chat_format", lambda *_: chat)
    kept, dropped = data.tokenize(conversations, tokenizer, 0, RECIPE)
    expected = found["collator"]
    assert (RECIPE.max_length, RECIPE.min_loss_tokens) == (64, 8)
    assert dropped == len(conversations) - len(expected["kept_conversation_indices"])
    longest = len(expected["input_ids"][0])
    batch = data.make_batch(kept, range(len(kept)), longest, len(kept))
    np.testing.assert_array_equal(batch.token_BS, expected["input_ids"])
    np.testing.assert_array_equal(batch.loss_mask_BS, np.array(expected["loss_mask"], bool))


# Templates of other families, and those that are not understood.

LOOP = "{% for m in messages %}%s{% endfor %}"
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
MISTRAL = LOOP.replace("%s", "{% if m.role == 'assistant' %} {{ m.content }}</s>"
                             "{% else %}[INST] {{ m.content }} [/INST]{% endif %}")  # fmt: skip
REASONING = (  # opens with a thinking block that the history does not show
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "header", "end"),
    [
        (LLAMA, "<|assistant|>\n\n", "<|eot|>"),
        (MISTRAL, " [/INST]", "</s>"),
        (REASONING, "<assistant>", "<end>"),
    ],
)
def test_what_surrounds_an_answer_is_found_in_the_template(tokenizer, template, header, end):
    tokenizer.chat_template = template
    chat = find_chat_format(tokenizer)
    assert chat == ChatFormat(header, end)
    talk = conversation("one", "two", "three", "four and five")
    space = " " if template is MISTRAL else ""
    token_S, mask_S = encode_conversation(talk, tokenizer, chat, 0)
    assert tokenizer.decode(token_S[mask_S]) == f"{space}two{end}{space}four and five{end}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no') }}", "refuses the conversation: no"),
        ("{{ messages[", "refuses the conversation"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "refuses the conversation"),
        (LOOP.replace("%s", "{{ m.content }} > "), "ended by ' > '"),  # all turns look alike
        (LOOP.replace("%s", "{{ m.content }}"), "opened by ''"),
        (LOOP.replace("%s", "{{ m.role }}: {{ m.content }}\n") + "<eos>", "not set off answers"),
        ("{{ messages[0].content }}<a>{{ messages[-1].content }}<e>", "not set off answers"),
    ],
)
def test_a_template_that_is_not_understood_is_refused(tokenizer, template, expected):
    tokenizer.chat_template = template
    with pytest.raises(LoadError, match=expected):
        find_chat_format(tokenizer)


# Tools: rendered where the template takes them, and results are nobody's answer.

TOOLS = (
    "{% for t in tools or [] %}({{ t.name }}){% endfor %}{% for m in messages %}"
    "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"at": "sea"}}}
TOOL_USE = Conversation(
    (
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Take a hat."},
    ),
    "d:1",
    tools=({"name": "weather"},),
)


def test_calls_are_learnt_and_what_tools_say_is_not(tokenizer):
    tokenizer.chat_template = TOOLS
    chat = find_chat_format(tokenizer)
    token_S, mask_S = encode_conversation(TOOL_USE, tokenizer, chat, 0)
    call = '[weather {"at": "sea"}]<end>'
    assert tokenizer.decode(token_S) == (
        f"(weather)<user>a<end><assistant>{call}<tool>sunny<end><assistant>Take a hat.<end>"
    )
    assert tokenizer.decode(token_S[mask_S]) == f"{call}Take a hat.<end>"
    known = dataclasses.replace(TOOL_USE, response_ids=(90, 91))
    token_S, mask_S = encode_conversation(known, tokenizer, chat, 2)
    assert token_S[-3:].tolist() == [90, 91, 2]
    assert tokenizer.decode(token_S[mask_S][:-3]) == call


@pytest.mark.parametrize("written", ["c.function.arguments", "'' + c.function.arguments"])
def test_templates_that_take_arguments_as_text_get_them_so(tokenizer, written):
    tokenizer.chat_template = TOOLS.replace("c.function.arguments | tojson", written)
    token_S, mask_S = encode_conversation(TOOL_USE, tokenizer, find_chat_format(tokenizer), 0)
    call = '[weather {"at": "sea"}]<end>'
    assert tokenizer.decode(token_S[mask_S]) == f"{call}Take a hat.<end>"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("({{ t.name }})", "", "leaves the tools out"),
        ("m.tool_calls or []", "[]", "leaves calls of tools out"),
        ("<{{ m.role }}>{{ m.content }}", "<{{ m.role }}>{{ m.content if m.role != 'tool' }}",
         "leaves what tools say out"),
        # A call that is not closed goes on into what the tool says.
        ("<end>{% endfor %}{% if", "{{ '<end>' if not m.tool_calls }}{% endfor %}{% if",
         "does not set answers off from what tools say"),
        ("{% for m in", "{{ raise_exception('no tools') if tools }}{% for m in", "no tools"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_take_tools_costs_the_line(
    tokenizer, caplog, before, after, expected
):
    assert before in TOOLS
    tokenizer.chat_template = TOOLS.replace(before, after)
    plain = conversation("a", "one two three four five")
    kept, _ = data.tokenize([TOOL_USE, plain], tokenizer, 0, RECIPE)
    assert tokenizer.decode(kept[0].token_S[kept[0].loss_mask_S]) == "one two three four five<end>"
    assert len(kept) == 1
    assert re.search(
        rf"1 of 2 lines left out: the chat template .*{expected} \(line 1\)", caplog.text
    )


def test_two_questions_in_a_row_are_no_answer(tokenizer):
    tokenizer.chat_template = MISTRAL
    asked = Conversation((USER, USER, {"role": "assistant", "content": "b"}), "d:1")
    token_S, mask_S = encode_conversation(asked, tokenizer, find_chat_format(tokenizer), 0)
    assert tokenizer.decode(token_S[mask_S]) == " b</s>"


# Answers whose own ids are known.


def test_an_answers_own_ids_follow_the_prompt(tokenizer):
    end = tokenizer.eos_token_id
    recipe = dataclasses.replace(RECIPE, min_loss_tokens=3)

    def only(*texts, **values):
        kept, dropped = data.tokenize([conversation(*texts, **values)], tokenizer, end, recipe)
        assert len(kept) + dropped == 1
        return kept[0] if kept else None

    prompt = chat_prompt_ids(tokenizer, [USER])
    one = only("a", "xyz", response_ids=(90, 91, 92))
    assert one.token_S.tolist() == [*prompt, 90, 91, 92, end]
    assert one.loss_mask_S.tolist() == [False] * len(prompt) + [True] * 4
    cut = only("a", "xyz", response_ids=(90, 91, 92), finished=False)
    assert cut.token_S.tolist() == [*prompt, 90, 91, 92]
    assert only("a", "xyz", response_ids=(90,)) is None
    long = only("a", "xyz", response_ids=(90,) * 100)
    assert (len(long.token_S), long.loss_mask_S.sum()) == (64, 64 - len(prompt))
    # Earlier answers are found in the text.
    two = only("a", "first", "b", "xyz", response_ids=(90, 91))
    assert tokenizer.decode(two.token_S[two.loss_mask_S][:-3]) == "first<|im_end|>\n"
    assert two.token_S[two.loss_mask_S][-3:].tolist() == [90, 91, end]
    # Where only the text is known, an answer that was cut has no end either.
    text = only("a", "x y z", "b", "one two three", finished=False)
    assert tokenizer.decode(text.token_S[text.loss_mask_S]) == "x y z<|im_end|>\none two three"
    # What really ended an answer is what is learnt, where the file says so.
    ended = only("a", "xyz", response_ids=(90, 91, 92), end_id=7)
    assert ended.token_S[len(prompt) :].tolist() == [90, 91, 92, 7]
    cut = only("a", "xyz", response_ids=(90, 91, 92), end_id=7, finished=False)
    assert cut.token_S[len(prompt) :].tolist() == [90, 91, 92]
    for bad in (419, -1, 2**70):
        with pytest.raises(ValueError, match=r"d: 1 of 1 lines .*0\.\.418.* \(line 1\)"):
            only("a", "xyz", response_ids=(1, bad))
        with pytest.raises(ValueError, match=r"d: 1 of 1 lines .*0\.\.418"):
            only("a", "xyz", response_ids=(1, 2), end_id=bad)


def test_an_answer_needs_an_end_where_nothing_says_which(tokenizer):
    known = conversation("a", "b", response_ids=(90,) * 9)
    with pytest.raises(ValueError, match="the target's tokenizer has no end of sequence"):
        data.tokenize([known], tokenizer, None, RECIPE)
    said = conversation("a", "b", response_ids=(90,) * 9, end_id=5)
    (one,), _ = data.tokenize(
        [
            said,
        ],
        tokenizer,
        None,
        RECIPE,
    )
    assert one.token_S[-1] == 5


def test_a_base_model_learns_from_ids_alone(tokenizer, caplog):
    tokenizer.chat_template = None
    known = conversation("a", "b", response_ids=(90,) * 9)
    (one,), _ = data.tokenize([known], tokenizer, 2, RECIPE)
    assert one.token_S.tolist() == [*tokenizer.encode("a"), *[90] * 9, 2]
    # Behind earlier answers that cannot be found, the last one alone.
    longer = conversation("a", "b", "c", "d", response_ids=(91,) * 9)
    (one,), _ = data.tokenize([longer], tokenizer, 2, RECIPE)
    assert one.token_S.tolist() == [*tokenizer.encode("a\nb\nc"), *[91] * 9, 2]
    assert one.loss_mask_S.sum() == 10
    text = conversation("a", "b")
    with pytest.raises(ValueError, match="no chat template: give every answer's response_ids"):
        data.tokenize([text], tokenizer, 2, RECIPE)
    assert len(data.tokenize([known, text], tokenizer, 2, RECIPE)[0]) == 1
    assert "d: 1 of 2 lines left out: the target has no chat template" in caplog.text


# Shapes and order.


def sequences_of(lengths):
    """Sequence i consists of the token i + 1; its first four are the prompt."""
    return [
        data.TokenSequence(np.full(length, i + 1, np.int32), np.arange(length) >= 4)
        for i, length in enumerate(lengths)
    ]


def test_buckets_are_the_best_of_their_number():
    """Against trying them all."""
    lengths = np.random.default_rng(1).geometric(0.05, 400).clip(5, 96)
    recipe = dataclasses.replace(RECIPE, max_length=96, tokens_per_batch=384)
    sequences = sequences_of(lengths)

    def share(buckets):
        return data.padding(sequences, dataclasses.replace(recipe, length_buckets=buckets))

    chosen = data.choose_buckets(lengths, recipe)
    edges = range(data.BUCKET_STEP, 96, data.BUCKET_STEP)
    for count in range(len(chosen)):
        best = min(share((*some, 96)) for some in itertools.combinations(edges, count))
        if count == len(chosen) - 1:
            assert share(chosen) == pytest.approx(best)
        else:
            assert best > data.MAX_PADDING


def test_little_padding_and_few_shapes_whatever_max_length():
    lengths = np.random.default_rng(0).normal(300, 100, 4000).clip(20, 448).astype(int)
    sequences = sequences_of(lengths)
    for max_length in (448, 449, 4096):
        recipe = dataclasses.replace(RECIPE, max_length=max_length, tokens_per_batch=4096)
        recipe = data.with_buckets(recipe, sequences)
        assert data.padding(sequences, recipe) <= data.MAX_PADDING
        assert len(recipe.length_buckets) <= data.MAX_BUCKETS
        assert recipe.length_buckets[-1] == max_length
        assert data.with_buckets(recipe, sequences[:1]) is recipe  # those that are named stay
    assert data.choose_buckets([5], dataclasses.replace(RECIPE, max_length=7)) == (7,)


def test_batches_cover_every_sequence_once_an_epoch_wherever_they_start():
    lengths = np.random.default_rng(0).integers(9, 41, 23)
    sequences = sequences_of(lengths)
    recipe = TrainConfig(max_length=40, length_buckets=(16, 40), tokens_per_batch=80)
    per_epoch = len(data.epoch_batches(sequences, recipe, 0))
    stream = data.batches_from(sequences, recipe, 0)
    first = [next(stream) for _ in range(2 * per_epoch)]
    for epoch in (first[:per_epoch], first[per_epoch:]):
        seen = sorted(int(row[0]) for batch in epoch for row in batch.token_BS if row.any())
        assert seen == list(range(1, 24))
        assert sum(int(batch.loss_mask_BS.sum()) for batch in epoch) == lengths.sum() - 4 * 23
    for start in (3, per_epoch, per_epoch + 2):
        resumed = next(data.batches_from(sequences, recipe, start))
        np.testing.assert_array_equal(resumed.token_BS, first[start].token_BS)
    assert any(
        not np.array_equal(one.token_BS, other.token_BS)
        for one, other in zip(first[:per_epoch], first[per_epoch:], strict=True)
    )


@pytest.mark.parametrize("processes", [2, 3])
def test_the_order_does_not_depend_on_the_number_of_processes(processes):
    """Each of several readers takes every n-th step, knowing nothing of the others."""
    sequences = sequences_of(np.random.default_rng(0).integers(9, 41, 23))
    recipe = TrainConfig(max_length=40, tokens_per_batch=80)
    recipe = data.with_buckets(recipe, sequences)
    alone = list(itertools.islice(data.batches_from(sequences, recipe, 0), 12))
    for process in range(processes):
        for step in range(process, 12, processes):
            batch = next(data.batches_from(sequences, recipe, step))
            np.testing.assert_array_equal(batch.token_BS, alone[step].token_BS)
    other = next(data.batches_from(sequences, dataclasses.replace(recipe, seed=1), 0))
    assert not np.array_equal(other.token_BS, alone[0].token_BS)


def test_data_without_a_block_is_refused():
    def sequence(*mask):
        return data.TokenSequence(np.ones(len(mask), np.int32), np.array(mask, bool))

    data.require_blocks([sequence(0, 1, 0), sequence(0, 1, 1)], "held-out")
    for without in ([sequence(1, 0, 1), sequence(0, 0)], []):
        with pytest.raises(ValueError, match="the held-out conversations have no two tokens"):
            data.require_blocks(without, "held-out")


def test_the_draft_vocabulary_is_the_most_frequent_answer_tokens():
    token_S = np.array([9, 9, 9, 7, 7, 5, 8, 8, 8], np.int32)
    sequence = data.TokenSequence(token_S, token_S != 9)
    np.testing.assert_array_equal(data.frequent_tokens([sequence], 2), [7, 8])
    np.testing.assert_array_equal(data.frequent_tokens([sequence], 5), [0, 1, 5, 7, 8])
