"""What clients are told where something is wrong: OpenAI's error object with a status."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Fields of ``Request`` by the names that clients know them by.
KNOWN_AS = {"max_new_tokens": "max_tokens", "stop_strings": "stop", "grammar": "response_format",
            "prompt_ids": "prompt", "template_kwargs": "chat_template_kwargs"}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        param: the field that is at fault; None where it is not one field.
        code: a word for programs; None for none.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


def refused(error: Exception, fields: Mapping[str, Any]) -> ApiError:
    """What a ``Request`` or the engine has against a request, by the names of the body.

    Args:
        error: that was raised; it names the field.
        fields: of the body.
    """
    known = dict(KNOWN_AS)
    if "max_completion_tokens" in fields:
        known["max_new_tokens"] = "max_completion_tokens"
    message = re.sub(r"\w+", lambda word: known.get(word.group(), word.group()), str(error))
    named = (word for word in re.findall(r"\w+", message) if word in fields)
    return ApiError(400, message, param=next(named, None))
