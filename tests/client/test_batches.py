"""Replies that are made together: each as it is alone, whatever the others do."""

from __future__ import annotations

import pytest

from privinf.client.conversation import Conversation
from privinf.client.listed import Placed
from privinf.client.sampling import Sampling
from privinf.client.shared import Shared
from privinf.lowering.explain import explain
from protocols.errors import Code, ConfigError, TransportError
from tests.support import trio as t
from tests.support.duo import duo
from tests.support.trio import trio

PROMPTS = [[(7 * i + k) % 90 for i in range(length)] for k, length in enumerate((3, 11, 1, 6))]


def collected(replies: list[Placed], count: int) -> list[list[int]]:
    """The tokens of each."""
    return [[token.id for index, token in replies if index == each] for each in range(count)]


def test_a_reply_in_a_batch_is_the_reply_alone() -> None:
    """Prompts of several lengths, replies that end at different times; and the text."""
    with trio() as three, three.client() as client:
        found = collected(list(client.generate(ids=PROMPTS, max_new_tokens=6, ignore_eos=True)), 4)
        assert [len(each) for each in found] == [6] * 4
        assert all(t.is_greedy(prompt, tokens) for prompt, tokens in zip(PROMPTS, found, strict=True))
        with client.generate(["def f(", "x"], max_new_tokens=3, ignore_eos=True) as texts:
            list(texts)
            assert [len(result["tokens"]) for result in texts.results] == [3, 3]
            assert all(isinstance(result["text"], str) for result in texts.results)


def test_two_parties_alone() -> None:
    """The same without a dealer."""
    with duo() as two, two.client() as client:
        found = collected(list(client.generate(ids=PROMPTS, max_new_tokens=3, ignore_eos=True)), 4)
        assert all(t.is_greedy(prompt, tokens) for prompt, tokens in zip(PROMPTS, found, strict=True))


def test_the_others_go_on() -> None:
    """An empty prompt, one beyond the context, one cancelled, one that waits for room at the server."""
    prompts = [[1, 2], [], [3] * (t.POSITIONS + 1), [4, 5, 6], [7]]
    with trio(batch=2) as three, three.client() as client, client.generate(ids=prompts, max_new_tokens=5, ignore_eos=True) as replies:
        found = []
        with pytest.raises(ConfigError, match="prompt 1 of the list: the prompt is empty"):
            for placed in replies:
                found.append(placed)
                if placed.which == 3 and sum(each.which == 3 for each in found) == 2:
                    replies.cancel(3)
        tokens = collected(found, 5)
        assert [len(each) for each in tokens] == [5, 0, 0, 2, 5]
        assert all(t.is_greedy(prompts[index], tokens[index]) for index in (0, 3, 4))
        reasons = [result.get("finish_reason", result.get("error", {}).get("code")) for result in replies.results]
        assert reasons == ["length", str(Code.CONFIG), str(Code.TOO_LONG), "cancelled", "length"]
        for none in (5, -1):
            with pytest.raises(ConfigError, match=f"no prompt {none} in a list of 5"):
                replies.cancel(none)
        with client.generate(ids=prompts[:1], max_new_tokens=5, ignore_eos=True) as left:
            next(left)
        assert [result["finish_reason"] for result in left.results] == ["cancelled"], "its caller turned away"


def test_who_samples_and_who_does_not() -> None:
    """Sampled replies with a seed are those of the seed, each from a stream of its own start."""
    choice = Sampling(temperature=1.0, seed=5)
    with trio() as three, three.client() as client:
        found = collected(list(client.generate(ids=PROMPTS[:2], max_new_tokens=4, ignore_eos=True, sampling=choice)), 2)
        assert [len(each) for each in found] == [4, 4]


@pytest.mark.parametrize("chunk", [0, 4])
def test_costs_are_what_explain_says(chunk: int) -> None:
    """Online bytes and rounds of a whole batch, as predicted."""
    with trio() as three, three.client(chunk=chunk) as client:
        with client.generate(ids=[[5] * 9] * 3, max_new_tokens=3, ignore_eos=True) as replies:
            list(replies)
        counted = replies.results[0]["traffic"]["online"]
        predicted = explain(t.lowered(), 9, new_tokens=3, batch=3, chunk=chunk)["total"]
        assert counted["payload"] == predicted["online_bytes"] and counted["rounds"] == predicted["rounds"]


def test_padded_lengths() -> None:
    """Prompts and replies are padded each for itself."""
    with trio() as three, three.client(pad_prompt=8, pad_reply=4) as client:
        with client.generate(ids=PROMPTS, max_new_tokens=3, ignore_eos=True) as replies:
            found = collected(list(replies), 4)
        assert [len(each) for each in found] == [3] * 4
        assert [result["padded"]["prompt_tokens"] for result in replies.results] == [8, 16, 8, 8]
        assert [result["padded"]["tokens"] for result in replies.results] == [4] * 4


@pytest.mark.parametrize("together", [False, True])
def test_what_is_open_is_not_opened_again(together: bool) -> None:
    """`with` a conversation that is open already: one session, one seat in it, and neither is left when the block is."""
    with trio() as three, three.client() as client:
        shared = Shared(client, 2)
        made = shared.seat() if together else Conversation(client)
        with made.open() as entered:
            assert entered is made and made.open() is made
            session = made.session
            assert t.is_greedy([1, 2, 3], [token.id for token in made.generate([1, 2, 3], max_new_tokens=3, ignore_eos=True)])
            assert made.session is session and client.sessions == 1
            if together:  # of two seats one is free
                with shared.seat() as other:
                    assert other.session is session
        t.wait_for(lambda: not shared.sessions and not client.sessions)
        with pytest.raises(TransportError, match="was closed"):
            made.open()


def test_several_prompts_on_the_command_line() -> None:
    """Each reply on lines of its own, in the order of the prompts; with --json as `replies`."""
    words = ("--prompt-ids", "1,2,3", "--prompt-ids", "4", "--max-new-tokens", "3", "--ignore-eos")
    with t.services() as served:
        with served.generate(*words, "--json") as process:
            assert process.wait() == 0
            replies = process.document()["replies"]
        assert t.is_greedy([1, 2, 3], replies[0]["tokens"]) and t.is_greedy([4], replies[1]["tokens"])
        with served.generate(*words) as process:
            assert process.wait() == 0 and process.out == "".join(f"{reply['text']}\n" for reply in replies)
