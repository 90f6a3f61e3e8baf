"""API keys: whose they are, and how much each may ask for."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

from jaxllm.config import from_dict, load_yaml
from jaxllm.errors import ConfigError
from jaxllm.server.errors import ApiError

MINUTE = 60.0


@dataclass(frozen=True, kw_only=True)
class KeySettings:
    """An entry of a key file, under the name of whom it is for. Limits are left out where there is none."""

    key: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        if not self.key.strip():
            raise ConfigError("key must not be empty")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")


@dataclass
class Allowance:
    """A minute's worth at most is saved up (a token bucket). What is spent may be more than there is: nobody knows beforehand how
    many tokens an answer will have. Then nothing more may be asked for until the debt is paid."""

    per_minute: float
    clock: Callable[[], float] = time.monotonic
    left: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self._at = self.per_minute, self.clock()

    def seconds_until(self, amount: float) -> float:
        """When there will be so much; 0: there is."""
        now = self.clock()
        self.left = min(self.per_minute, self.left + (now - self._at) * self.per_minute / MINUTE)
        self._at = now
        return max(0.0, (min(amount, self.per_minute) - self.left) * MINUTE / self.per_minute)

    def spend(self, amount: float) -> None:
        self.left -= amount


class Client:
    """Who brought a key: a name, which is the tenant of its requests, and what it may still ask for."""

    def __init__(self, name: str, settings: KeySettings):
        self.name, self.digest = name, _digest(settings.key.strip())
        self._requests, self._tokens = (
            None if rate is None else Allowance(rate) for rate in (settings.requests_per_minute, settings.tokens_per_minute)
        )

    def enter(self) -> None:
        """Counts a request. Raises ApiError 429 if it is one too many, or if too many tokens have been spent."""
        for allowance, what in ((self._requests, "requests_per_minute"), (self._tokens, "tokens_per_minute")):
            if allowance is not None and (wait := allowance.seconds_until(1)) > 0:
                message = f"this API key has used up its {what}={allowance.per_minute:g}: try again in {math.ceil(wait)} s"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after=math.ceil(wait))
        if self._requests is not None:
            self._requests.spend(1)

    def spend_tokens(self, count: int) -> None:
        """Tokens of prompts and of answers."""
        if self._tokens is not None:
            self._tokens.spend(count)


# Whose request the running task answers; None where no keys are wanted.
current_client: ContextVar[Client | None] = ContextVar("current_client", default=None)


class Keys:
    """All that a server lets in."""

    def __init__(self, clients: Iterable[Client]):
        self.clients = list(clients)

    def __bool__(self) -> bool:
        return bool(self.clients)

    def find(self, given: str) -> Client | None:
        """Every key is compared, each in the same time whatever is given."""
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, client.digest) for client in self.clients]
        return self.clients[matches.index(True)] if any(matches) else None


def read_keys(plain: Iterable[str], file: str | None) -> Keys:
    """Of keys without names or limits (they are numbered), and of a YAML file `name: {key: ..., requests_per_minute: ...}`. Raises
    ConfigError."""
    clients = [Client(f"key-{i}", KeySettings(key=key)) for i, key in enumerate(plain)]
    for name, values in ({} if file is None else load_yaml(file)).items():
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {name} must have entries (key, requests_per_minute, tokens_per_minute)")
        if not isinstance(values.get("key", ""), str):  # the usual error would tell the key
            raise ConfigError(f"{file}: {name}: key must be text: put it in quotes")
        clients.append(Client(str(name), from_dict(KeySettings, values, where=f"{file}: {name}")))
    if file is not None and not clients:
        raise ConfigError(f"{file}: there is no key in it, so nobody could ask for anything")
    if len({client.digest for client in clients}) < len(clients):
        raise ConfigError(f"{file or 'api_key'}: a key is there twice; give each client its own")
    return Keys(clients)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
