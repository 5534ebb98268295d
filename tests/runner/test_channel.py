"""What the other side may say or not say."""

from __future__ import annotations

import pytest

from runner import channel
from runner.channel import Conversation, Patience, VolumeError
from runner.errors import UnreachableError


class Says:
    """A stream that says so much, and ends."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = iter(parts)
        self.stderr, self.exit_code = "", 0

    def receive(self, timeout: float | None = None) -> bytes:
        return next(self._parts, b"")

    def send(self, data: bytes) -> None:
        """Heard by nobody."""

    def close(self) -> None:
        """Nothing to close."""


def test_words_of_another_image_are_shown_and_no_traceback() -> None:
    with pytest.raises(VolumeError, match="Welcome to this image"):
        Conversation(Says(b"Welcome to this image\n")).answer()


def test_an_api_server_that_is_away_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_PAUSE_SECONDS", 0.001)
    said: list[str] = []
    misses = iter([UnreachableError("connection refused")])

    def call() -> str:
        if error := next(misses, None):
            raise error
        return "answer"

    assert Patience(said.append).keep(call) == "answer"
    assert said == ["connection refused; trying again"]
