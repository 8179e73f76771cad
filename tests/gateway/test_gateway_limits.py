"""What a gateway says when server or dealer set limits, are about to stop, or refuse; and queries that were prepared ahead."""

from __future__ import annotations

import datetime
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from privinf.client.conversation import Conversation
from privinf.transport import keys as keys_module
from privinf.transport.keys import renew_keys
from tests.support import trio as t
from tests.support.gateway import MORE, Gateway, gateway
from tests.support.trio import trio, wait_for


def complete(door: Gateway, prompt: str, count: int = 2) -> Any:
    with door.openai(max_retries=0) as client:
        return client.completions.create(model="privinf", prompt=prompt, max_tokens=count, extra_body=MORE)


def dealt(door: Gateway) -> int:
    """Bytes of correlations that came from the dealer."""
    return door.engine.conversations.cells()["dealer", "offline"].payload_received


def test_prepared_queries_are_used_for_first_turns_that_fit(tmp_path: Path) -> None:
    with trio(cache=tmp_path) as parties:
        parties.client().prepare(9, max_new_tokens=4)
        with gateway(parties, prepared=False) as door:
            expected = complete(door, "def main!", 3).choices[0].text
            assert door.engine.replies.counts["prepared"] == 0 and len(door.engine.conversations.idle) == 1
        with gateway(parties) as door:
            before = dealt(door)
            done = complete(door, "def main!", 3)
            assert done.choices[0].text == expected and door.engine.replies.counts["prepared"] == 1 and dealt(door) == before
            assert len(door.engine.conversations.idle) == 0 and not door.engine.client.sessions  # it ends with what was prepared
            again = complete(door, "def main!", 3)  # none is left
            assert again.choices[0].text == expected and door.engine.replies.counts["prepared"] == 1 and dealt(door) > before
            turn = complete(door, f"def main!{expected}z", 1)
            assert turn.usage.prompt_tokens_details.cached_tokens == 9 + 2  # a conversation that is kept goes on as ever


def test_a_budget_that_is_used_up(tmp_path: Path) -> None:
    with trio(cache=tmp_path, budget=5, budget_hours=2) as parties, gateway(parties) as door:
        assert complete(door, "abc", 3).usage.completion_tokens == 3
        with door.openai() as client, pytest.raises(openai.APIError, match="budget of 5 outputs in 2 hours is used up"):
            list(client.completions.create(model="privinf", prompt="x", max_tokens=3, stream=True, extra_body=MORE))  # the third token
        for prompt in ("abcd", "other"):
            with pytest.raises(openai.RateLimitError, match="come again later, in") as found:
                complete(door, prompt)
            assert 7000 < int(found.value.response.headers["Retry-After"]) <= 7200 and found.value.code == "rate_limit_exceeded"
        wait_for(lambda: door.engine.active == 0 and door.engine.replies.counts["failed"] == 3)


def test_a_kept_session_at_its_limit_is_replaced(tmp_path: Path) -> None:
    with trio(cache=tmp_path, session_tokens=8) as parties, gateway(parties) as door:
        first = complete(door, "abcd", 3)
        (held,) = door.engine.conversations.idle
        turn = complete(door, f"{held.text}e", 1)
        assert (first.usage.total_tokens, turn.usage.total_tokens) == (7, 9)
        assert turn.usage.prompt_tokens_details.cached_tokens == 6
        with pytest.raises(openai.InternalServerError, match="at most 8 tokens") as found:
            complete(door, "a" * 9)
        assert found.value.status_code == 502 and found.value.code == "peer_refused"
        (held,) = door.engine.conversations.idle
        prompt = f"{held.text}f"
        with pytest.raises(openai.InternalServerError, match="at most 8 tokens"):  # nor does a new session have room for it
            complete(door, prompt, 2)
        assert len(door.engine.conversations.idle) == 0 and complete(door, "abc", 1).usage.completion_tokens == 1


def test_a_server_that_is_gone_or_whose_dealer_is(tmp_path: Path) -> None:
    with trio(cache=tmp_path, connect_timeout=0.5) as parties, gateway(parties, client=parties.client(timeout=3.0), kept=0) as door:
        complete(door, "abc")
        parties.dealer.close()
        with pytest.raises(openai.InternalServerError, match="cannot reach its dealer") as found:
            complete(door, "abc")
        assert found.value.status_code in (502, 503)
        parties.server.close()
        with pytest.raises(openai.InternalServerError, match="could not connect") as found:
            complete(door, "abc")
        assert found.value.status_code == 503 and found.value.code == "peer_unreachable" and found.value.response.headers["Retry-After"]


def test_a_fault_at_this_end_is_no_fault_of_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The gateway's certificate expires while it runs; once it is renewed, the gateway goes on."""
    keys = tmp_path / "keys"
    shutil.copytree(t.keys(), keys)
    with trio(cache=tmp_path / "cache") as parties, gateway(parties, client=parties.client(keys=keys), kept=0) as door:
        complete(door, "abc")
        now = keys_module._now()
        monkeypatch.setattr(keys_module, "_now", lambda: now - datetime.timedelta(days=398))
        renew_keys(keys)
        monkeypatch.undo()
        with caplog.at_level(logging.WARNING, "privinf"), pytest.raises(openai.InternalServerError) as found:
            complete(door, "abc")
        assert found.value.status_code == 502 and str(keys) not in str(found.value)
        renew_keys(keys)
        assert complete(door, "abc").usage.completion_tokens == 2


def test_a_session_that_nobody_renews_is_no_leak(tmp_path: Path) -> None:
    with trio(cache=tmp_path, idle=1.0) as parties, gateway(parties) as door:
        complete(door, "abc")
        (held,) = door.engine.conversations.idle
        wait_for(lambda: not parties.server.peers)  # the server has ended it
        done = complete(door, f"{held.text}d", 1)
        assert done.usage.prompt_tokens_details.cached_tokens == 0 and done.usage.completion_tokens == 1


@pytest.mark.parametrize(("temperature", "kept"), [(0.0, True), (1.0, False)])
def test_a_reply_whose_connection_breaks_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, kept: bool) -> None:
    """In a fresh session, also where it broke in a kept one; a second break ends it."""
    with trio(cache=tmp_path) as parties, gateway(parties, retry=1) as door, door.openai(max_retries=0) as client:
        if kept:
            complete(door, "ab", 2)
            prompt = f"{door.engine.conversations.idle[-1].text}c"
        else:
            prompt = "abc"
        how = {"model": "privinf", "max_tokens": 8, "temperature": temperature, "seed": 7, "extra_body": MORE}
        with gateway(parties) as whole, whole.openai() as other:
            expected = other.completions.create(prompt=prompt, **how).choices[0].text  # type: ignore[call-overload]
        generate, cuts, made = Conversation.generate, [2, 5], [0]

        def cut(conversation: Conversation, *words: Any, **options: Any) -> Iterator[Any]:
            made[0] *= options["begun"] is not None
            for token in generate(conversation, *words, **options):
                yield token
                made[0] += 1
                if cuts and made[0] == cuts[0]:
                    cuts.pop(0)
                    for connection in conversation.session.lines.dialled:
                        connection.close()

        monkeypatch.setattr(Conversation, "generate", cut)
        with pytest.raises(openai.InternalServerError, match="closed"):
            client.completions.create(prompt=prompt, **how)  # type: ignore[call-overload]
        cuts[:] = [5]
        done = client.completions.create(prompt=prompt, **how)  # type: ignore[call-overload]
        assert done.choices[0].text == expected and done.usage.completion_tokens == 8 and cuts == []
        assert done.usage.prompt_tokens_details.cached_tokens == 0
        turn = complete(door, f"{prompt}{expected}x", 1)  # what went on is kept as any other
        assert turn.usage.prompt_tokens_details.cached_tokens == len(prompt) + 7


def test_prompts_in_pieces_and_padded_replies(tmp_path: Path) -> None:
    with trio(cache=tmp_path) as parties:
        expected = "".join(token.text or "" for token in parties.client().generate("abcdefg", max_new_tokens=3, ignore_eos=True))
        with gateway(parties, client=parties.client(chunk=3, pad_reply=4)) as door:
            before = parties.server.counters.counts["passes"]
            done = complete(door, "abcdefg", 3)
            assert done.choices[0].text == expected and done.usage.completion_tokens == 3
            wait_for(
                lambda: parties.server.counters.counts["passes"] == before + 3 + 3
            )  # pieces of 3, 3 and 1; two tokens and one that pads
            again = complete(door, "abcdefg", 4)  # nothing is padded
            turn = complete(door, f"abcdefg{again.choices[0].text}z", 4)
            assert turn.usage.prompt_tokens_details.cached_tokens == 7 + 3
