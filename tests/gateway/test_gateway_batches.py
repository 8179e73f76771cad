"""Many callers in the same passes, several replies to one request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from privinf.dealer.dealer import DealerService
from tests.support import trio as t
from tests.support.duo import duo
from tests.support.gateway import MORE, Gateway, gateway, greedy_text, ids_of
from tests.support.trio import Trio, trio, wait_for

PROMPTS = ["def f(", "x", "a longer prompt", "y = 3"]


def complete(door: Gateway, prompt: str, count: int = 6) -> str:
    found: str = (
        door.openai(max_retries=0).completions.create(model="privinf", prompt=prompt, max_tokens=count, extra_body=MORE).choices[0].text
    )
    return found


def expected(parties: Trio, count: int = 6) -> list[str]:
    return [greedy_text(parties, prompt, count) for prompt in PROMPTS]


def crowd(door: Gateway) -> None:
    """From now on it is as if somebody waited, and whoever comes is not alone."""
    door.engine.waiting += 1


def shared(door: Gateway) -> int:
    """Sessions that callers share."""
    return len(door.engine.conversations._sessions)


def test_callers_at_once_share_passes() -> None:
    """Each gets the reply that it gets alone, over fewer passes than all of them have tokens."""
    with trio() as parties:
        want = expected(parties)
        before = parties.server.counters.counts["passes"]
        with gateway(parties, batch=4, kept=0) as door, ThreadPoolExecutor(4) as pool:
            crowd(door)
            assert list(pool.map(lambda prompt: complete(door, prompt), PROMPTS)) == want
            passes = parties.server.counters.counts["passes"] - before
            assert 6 <= passes < 24
            assert door.engine.replies.counts["replies"] == 4 and 0 < door.engine.replies.counts["shared"] <= 4


def test_a_lone_caller_has_a_session_of_its_own() -> None:
    """And keeps it for a next turn; who comes beside others shares one, but where the gateway makes no batches."""
    with trio() as parties:
        with gateway(parties, batch=4) as door:
            texts = [complete(door, prompt, 3) for prompt in PROMPTS[:2]]
            assert shared(door) == 0 and door.engine.client.sessions == len(door.engine.conversations.idle) == 2
            crowd(door)
            assert [complete(door, prompt, 3) for prompt in PROMPTS] == [*texts, *(greedy_text(parties, each, 3) for each in PROMPTS[2:])]
            assert shared(door) == 1 and door.engine.replies.counts["shared"] == 4 == door.engine.replies.counts["replies"] - 2
        with gateway(parties, kept=0) as door:
            crowd(door)
            assert complete(door, PROMPTS[0], 3) == texts[0] and complete(door, PROMPTS[1], 3) == texts[1] and shared(door) == 0


def test_a_prepared_query_is_used_beside_others(tmp_path: Path) -> None:
    """In a session of its own; whoever asks for another length shares one."""
    with trio(cache=tmp_path) as parties:
        parties.client().prepare(len(PROMPTS[0]), max_new_tokens=3)
        with gateway(parties, batch=4) as door:
            crowd(door)
            complete(door, PROMPTS[1], 3)  # in the session that the gateway began with
            assert complete(door, PROMPTS[0], 3) == greedy_text(parties, PROMPTS[0], 3)
            assert door.engine.replies.counts["prepared"] == 1 and shared(door) == 0
            assert complete(door, PROMPTS[0], 3) == greedy_text(parties, PROMPTS[0], 3)
            assert door.engine.replies.counts["prepared"] == 1 and shared(door) == 1, "there was one"


def test_a_conversation_goes_on_in_the_batch() -> None:
    """A next turn takes in only what is new, beside whoever else is there."""
    with trio() as parties, gateway(parties, batch=4) as door:
        complete(door, "not of these", 1)
        crowd(door)
        first = complete(door, PROMPTS[0], 4)
        other = door.openai(max_retries=0).completions.create(model="privinf", prompt=PROMPTS[1], max_tokens=3, extra_body=MORE)
        again = door.openai(max_retries=0).completions.create(
            model="privinf", prompt=PROMPTS[0] + first + "z", max_tokens=3, extra_body=MORE
        )
        assert other.choices[0].text == greedy_text(parties, PROMPTS[1], 3)
        assert again.usage is not None and again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens == len(PROMPTS[0]) + 3
        assert again.choices[0].text == greedy_text(parties, PROMPTS[0] + first + "z", 3)
        assert len(door.engine.conversations.idle) == 3 and door.engine.client.sessions == 2 and shared(door) == 1


def test_one_caller_leaves_and_the_others_go_on() -> None:
    """Its sequence is dropped between two passes."""
    with trio() as parties, gateway(parties, batch=4, kept=0, active=4) as door, ThreadPoolExecutor(1) as pool:
        want = greedy_text(parties, PROMPTS[2], 12)
        complete(door, PROMPTS[1], 1)
        crowd(door)
        stream = door.openai(max_retries=0).completions.create(
            model="privinf", prompt=PROMPTS[0], max_tokens=25, stream=True, extra_body=MORE
        )
        next(stream)
        staying = pool.submit(complete, door, PROMPTS[2], 12)
        next(stream)
        stream.close()
        assert staying.result() == want
        wait_for(lambda: door.engine.replies.counts["cancelled"] == 1 and door.engine.client.sessions == 0)


def test_a_session_that_breaks_costs_nobody_a_reply() -> None:
    """Whoever is in it goes on in one of its own; who comes next has a session again, and the counters keep what moved."""
    with trio() as parties, gateway(parties, batch=4, kept=2) as door:
        client, counts = door.openai(max_retries=0), (25, 24)
        complete(door, PROMPTS[3], 1)
        crowd(door)
        streams = [
            client.completions.create(model="privinf", prompt=prompt, max_tokens=count, stream=True, extra_body=MORE)
            for prompt, count in zip(PROMPTS, counts, strict=False)
        ]
        texts = [next(stream).choices[0].text for stream in streams]
        moved = door.engine.conversations.cells()["server", "online"].payload_sent
        for session in list(door.engine.conversations._sessions):
            session.close()
        texts = [text + "".join(piece.choices[0].text for piece in stream) for text, stream in zip(texts, streams, strict=True)]
        assert texts == [greedy_text(parties, prompt, count) for prompt, count in zip(PROMPTS, counts, strict=False)]
        assert complete(door, PROMPTS[1], 2) == greedy_text(parties, PROMPTS[1], 2)
        assert door.engine.conversations.cells()["server", "online"].payload_sent > moved > 0
        assert door.engine.replies.counts["failed"] == 0


def test_a_limit_of_a_session_is_none_of_those_who_share_it(tmp_path: Path) -> None:
    """The server bounds the tokens of one: who cannot go on there begins one anew, and each caller gets a whole reply."""
    with trio(cache=tmp_path, session_tokens=30) as parties, gateway(parties, batch=4, kept=0) as door:
        want = expected(parties, 12)
        crowd(door)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda prompt: complete(door, prompt, 12), PROMPTS)) == want
        assert door.engine.replies.counts["failed"] == 0


@pytest.mark.parametrize("batch", [1, 4])
def test_lists_of_prompts_and_n(batch: int) -> None:
    """Choices in their order, whole and as a stream; each sample from a seed of its own."""
    with trio() as parties, gateway(parties, batch=batch) as door:
        client, want = door.openai(max_retries=0), expected(parties, 3)
        many = client.completions.create(model="privinf", prompt=PROMPTS, max_tokens=3, extra_body=MORE)
        assert [choice.text for choice in many.choices] == want and [choice.index for choice in many.choices] == [0, 1, 2, 3]
        assert many.usage is not None and many.usage.completion_tokens == 12
        assert many.usage.prompt_tokens == sum(map(len, PROMPTS))
        texts = [""] * 4
        for piece in client.completions.create(model="privinf", prompt=PROMPTS, max_tokens=3, stream=True, extra_body=MORE):
            for choice in piece.choices:
                texts[choice.index] += choice.text
        assert texts == want
        messages = [{"role": "user", "content": "hi"}]
        common = {"model": "privinf", "messages": messages, "temperature": 1.5, "seed": 3, "max_tokens": 4, "extra_body": MORE}
        three = client.chat.completions.create(n=3, **common)  # type: ignore[call-overload]
        alone = client.chat.completions.create(**common)  # type: ignore[call-overload]
        assert three.usage.prompt_tokens == alone.usage.prompt_tokens, "the prompt counts once"
        assert len({choice.message.content for choice in three.choices}) > 1
        assert three.choices[0].message.content == alone.choices[0].message.content


def test_a_dealer_that_began_anew_costs_no_caller_a_reply(tmp_path: Path) -> None:
    """The kept session's link to it is gone, and its link to the server is not: whoever comes gets a session of its own."""
    with trio(cache=tmp_path) as parties, gateway(parties, batch=4) as door:
        want, address = expected(parties, 3), parties.dealer.address
        assert complete(door, PROMPTS[0], 3) == want[0]
        parties.dealer.close()
        with DealerService(listen=address, keys=str(t.keys()), options=parties.dealer.options):
            assert complete(door, PROMPTS[1], 3) == want[1]


def test_without_a_dealer() -> None:
    """The same where server and client are alone: each text is float's."""
    with duo() as parties, gateway(parties, batch=3) as door, ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda prompt: complete(door, prompt, 3), PROMPTS[:3]))
        assert all(t.is_greedy(ids_of(prompt), ids_of(text)) for prompt, text in zip(PROMPTS, found, strict=False))
