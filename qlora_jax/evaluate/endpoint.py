"""One question to a chat model behind an OpenAI-compatible HTTP endpoint.

`POST {url}/chat/completions`, as vLLM, llama.cpp, Ollama, text-generation-inference and the
commercial services answer it. Through the standard library: the package that huggingface_hub brings
for HTTP has changed its name twice.

The key comes from an environment variable that is named, and is in no message, log or file. It goes
to the named address alone: redirects, which urllib would follow with the key, are refused.
"""

import json
import math
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from time import time
from typing import Any, NamedTuple

Chat = Sequence[dict[str, str]]

_DAY = 86_400.0


@dataclass(frozen=True)
class Endpoint:
    """Where a judge listens.

    Attributes:
        url: up to and without `/chat/completions`: `https://api.openai.com/v1`.
        model: the name that the service knows it by.
        key_variable: the environment variable that holds the key; one that is not set sends none.
        temperature, max_tokens: of the answer; the paper's judge had 0.2 and 1024.
        timeout: seconds without a byte after which an attempt has failed.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.2
    max_tokens: int = 1024
    timeout: float = 120.0

    def __post_init__(self) -> None:
        """ValueError where `url` is none, or `timeout` no time to wait."""
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; expected http:// or https://….")
        if not 0 < self.timeout <= _DAY:
            raise ValueError(
                f"timeout is {self.timeout}; expected seconds, above 0 and up to a day's."
            )


class Reply(NamedTuple):
    """A text and what it cost; tokens are 0 where the service does not count them."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EndpointError(Exception):
    """An attempt that brought no text.

    `fatal`: no later attempt, for no question, can succeed (a wrong key, model or address).
    `retry_after`: seconds that the service asks to be left alone.
    """

    def __init__(self, message: str, *, fatal: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.fatal = fatal
        self.retry_after = retry_after


def ask(endpoint: Endpoint, messages: Chat) -> Reply:
    """One attempt.

    Raises:
        EndpointError: no text came, and why.
    """
    body = {
        "model": endpoint.model,
        "messages": list(messages),
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
    }
    headers = {"Content-Type": "application/json"}
    if key := _key(endpoint.key_variable):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{endpoint.url.rstrip('/')}/chat/completions",
        data=json.dumps(body).encode(),
        headers=headers,
    )
    try:
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=endpoint.timeout) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(endpoint, error) from None
    except TimeoutError:
        raise EndpointError(f"no answer within {endpoint.timeout:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise EndpointError(f"no answer within {endpoint.timeout:g} s") from None
        unknown = isinstance(error.reason, socket.gaierror)
        raise EndpointError(f"no connection ({error.reason})", fatal=unknown) from None
    except (OSError, HTTPException) as error:
        raise EndpointError(f"the connection broke ({type(error).__name__})") from None
    return _read(content)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect to be raised as the HTTP error that it is."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _key(variable: str) -> str:
    """The key, or "". Checked here, since http.client quotes a header that it refuses."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(
            f"the key in {variable} holds characters that no HTTP header can", fatal=True
        )
    return key


def _read(content: bytes) -> Reply:
    """The text of a response body."""
    try:
        body: dict[str, Any] = json.loads(content)
        message = body["choices"][0]["message"]
        text, refusal = message.get("content"), message.get("refusal")
        usage = body.get("usage") or {}
        tokens = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        raise EndpointError("the response is no chat completion") from None
    if not isinstance(text, str) or not text.strip():
        raise EndpointError("the judge refused" if refusal else "the response holds no text")
    return Reply(text, *tokens)


def _refused(endpoint: Endpoint, error: urllib.error.HTTPError) -> EndpointError:
    """What an HTTP status means for later attempts."""
    hints = {
        401: f"the key in {endpoint.key_variable} is missing or wrong",
        403: f"the key in {endpoint.key_variable} may not use this model",
        404: f"there is no {endpoint.url}, or no model {endpoint.model!r} there",
    }
    if 300 <= error.code < 400:
        moved = error.headers.get("Location")
        hints[error.code] = f"{endpoint.url} sends on to {moved}: give the address that answers"
    message = f"HTTP {error.code}: {hints.get(error.code, error.reason)}"
    return EndpointError(
        message, fatal=error.code in hints, retry_after=_seconds(error.headers.get("Retry-After"))
    )


def _seconds(text: str | None) -> float:
    """A Retry-After header, seconds or a date, as seconds from now; at most a day's."""
    if not text:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _DAY) if math.isfinite(seconds) else 0.0
