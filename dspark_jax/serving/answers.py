"""Answers in OpenAI's forms: whole ones, and the pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dspark_jax.engine.reader import Generation, RoundTrace
from dspark_jax.engine.request import Request
from dspark_jax.engine.stream import Event
from dspark_jax.serving.calls import Call, CallReader
from dspark_jax.serving.marks import finite, token_bytes, token_text
from dspark_jax.serving.protocol import Asked
from dspark_jax.serving.reasoning import ThoughtReader
from dspark_jax.serving.served import Served


class Choice:
    """One text as it comes: thoughts, answer and calls apart.

    Attributes:
        num_calls: calls so far.
        text: length of the text so far, in characters of its tokens.
    """

    def __init__(self, asked: Asked, served: Served, request: Request) -> None:
        self.num_calls = self.text = 0
        self._thoughts: ThoughtReader | None = None
        self._calls: CallReader | None = None
        if asked.chat and served.thought is not None and request.grammar is None:
            end = str(served.tokenizer.decode(list(request.prompt_ids[-16:])))
            self._thoughts = ThoughtReader(served.thought, end)
        if asked.tools:
            form = served.call_form.forced if asked.choice.forced else served.call_form
            self._calls = CallReader(form, [tool.name for tool in asked.tools])

    def push(self, text: str, end: bool) -> dict[str, Any]:
        """What further text adds to a message; ``end`` where there will be no more."""
        thought = ""
        if self._thoughts is not None:
            thought, text = self._thoughts.push(text)
            if end:
                more, rest = self._thoughts.finish()
                thought, text = thought + more, text + rest
        calls: list[Call] = []
        if self._calls is not None:
            text, calls = self._calls.push(text)
            if end:
                rest, more_calls = self._calls.finish()
                text, calls = text + rest, calls + more_calls
        added: dict[str, Any] = {}
        if thought:
            added["reasoning_content"] = thought
        if text:
            added["content"] = text
        if calls:
            added["tool_calls"] = [self._call(call) for call in calls]
        return added

    def _call(self, call: Call) -> dict[str, Any]:
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def reason(self, finish_reason: str) -> str:
        """Why it ends, in OpenAI's words."""
        return "tool_calls" if self.num_calls and finish_reason == "stop" else finish_reason


class Reply:
    """The answer to a body."""

    def __init__(self, asked: Asked, served: Served, requests: Sequence[Request]) -> None:
        self._asked, self._served = asked, served
        self._tokenizer = served.tokenizer
        self._requests = requests
        self._choices = [Choice(asked, served, request) for request in requests]
        self._kind = "chat.completion" if asked.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(16)}",
            "object": self._kind,
            "created": int(time.time()),
            "model": served.name,
        }

    # Whole.

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        """All of it."""
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        return {**self._head, "choices": choices, "usage": self.usage(results)}

    def _choice(self, index: int, result: Generation) -> dict[str, Any]:
        choice = self._choices[index]
        if not self._asked.chat:
            text = self._echo(index) + result.text
            told: dict[str, Any] = {"text": text}
        else:
            added = choice.push(result.text, end=True)
            message = {"role": "assistant", "content": added.pop("content", None), "refusal": None}
            for call in added.get("tool_calls", ()):
                call.pop("index")  # of streams alone
            if message["content"] is None and not added:
                message["content"] = ""
            told = {"message": message | added}
        logprobs = None
        if self._asked.logprobs:
            logprobs = self._logprobs(index, result.token_ids, result.logprobs, result.top_logprobs)
        reason = choice.reason(result.finish_reason)
        return {"index": index, **told, "logprobs": logprobs, "finish_reason": reason}

    # In pieces.

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before anything else of a choice."""
        if self._asked.chat:
            return self._piece(index, {"delta": {"role": "assistant", "content": ""}})
        text = self._echo(index)
        return self._piece(index, {"text": text}) if text else None

    def piece(self, index: int, event: Event) -> dict[str, Any] | None:
        """News of a choice, if there is anything that may be shown now."""
        asked, choice = self._asked, self._choices[index]
        end, logprobs = bool(event.finish_reason), None
        if asked.logprobs and event.token_ids:
            tops = event.top_logprobs
            logprobs = self._logprobs(index, event.token_ids, event.logprobs, tops)
        if asked.chat:
            added: dict[str, Any] = choice.push(event.text, end)
            told: dict[str, Any] = {"delta": added}
        else:
            added, told = {"text": event.text} if event.text else {}, {"text": event.text}
        if not (added or logprobs or end or asked.rounds):
            return None
        reason = choice.reason(event.finish_reason) if end else None
        piece = self._piece(index, told, logprobs, reason)
        if asked.rounds:
            stats = self._served.engine.stats()
            rounds = [self._round(one) for one in event.trace]
            load = {"running": stats.running, "waiting": stats.waiting}
            piece["dspark"] = {"rounds": rounds, **load}
        return piece

    def usage_piece(self, results: Sequence[Generation]) -> dict[str, Any]:
        """The last piece, where it is asked for."""
        return {**self._piece_head(), "choices": [], "usage": self.usage(results)}

    def _piece_head(self) -> dict[str, Any]:
        return self._head | {"object": f"{self._kind}.chunk" if self._asked.chat else self._kind}

    def _piece(
        self, index: int, told: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **told, "logprobs": logprobs, "finish_reason": reason}
        piece = {**self._piece_head(), "choices": [choice]}
        return piece | {"usage": None} if self._asked.usage else piece

    # Parts of both.

    def usage(self, results: Sequence[Generation]) -> dict[str, Any]:
        """What it took; every prompt counts once, whatever the samples of it."""
        firsts = results[:: self._asked.num_samples]
        prompt = sum(result.prompt_tokens for result in firsts)
        new = sum(len(result.token_ids) for result in results)
        rounds = sum(result.rounds for result in results)
        committed = sum(sum(result.accepted_lengths) for result in results)
        cached = sum(result.cached_tokens for result in results)
        width = self._served.block_size
        drafted = sum(result.rounds - result.undrafted_rounds for result in results) * width
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
            "cached_tokens": cached,
            "accepted_length": round(committed / max(rounds, 1), 4),
            "drafted": drafted,
            "verified": sum(sum(result.verified_lengths) for result in results),
        }

    def _echo(self, index: int) -> str:
        if not self._asked.echo:
            return ""
        ids = list(self._requests[index].prompt_ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _logprobs(
        self,
        index: int,
        ids: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[Sequence[tuple[int, float]]],
    ) -> dict[str, Any]:
        """In the form of chats, or of completions."""
        tops = tops or [()] * len(ids)
        if self._asked.chat:
            content = [
                self._token(one, logprob) | {"top_logprobs": [self._token(*other) for other in top]}
                for one, logprob, top in zip(ids, logprobs, tops, strict=True)
            ]
            return {"content": content, "refusal": None}
        texts, offsets, choice = [], [], self._choices[index]
        for token in ids:
            texts.append(token_text(self._tokenizer, token))
            offsets.append(choice.text)
            choice.text += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [finite(one) for one in logprobs],
            "top_logprobs": [
                {token_text(self._tokenizer, token): finite(one) for token, one in reversed(top)}
                for top in tops
            ],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(self._tokenizer, token),
            "bytes": token_bytes(self._tokenizer, token),
            "logprob": finite(logprob),
        }

    def _round(self, one: RoundTrace) -> dict[str, Any]:
        """A round as the page shows it."""
        drafts = [] if one.draft_G is None else one.draft_G.tolist()
        logits = np.zeros(0) if one.confidence_G is None else one.confidence_G.astype(float)
        confidences = 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
        return {
            "drafts": [token_text(self._tokenizer, token) for token in drafts],
            "verified": one.verified,
            "accepted": one.accepted,
            "tokens": [token_text(self._tokenizer, token) for token in one.token_ids],
            "confidences": [round(float(value), 4) for value in confidences],
            "rows": one.num_rows,
            "seconds": round(one.seconds, 6),
        }


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
