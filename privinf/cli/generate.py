"""`privinf generate`: the client."""

from __future__ import annotations

from typing import Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import Asked, Choice, Peers, PromptTexts, Retry, make_options
from privinf.session.options import Lengths, Pins, Runtime


@expand()
def generate(
    *,
    peers: Peers,
    prompt: PromptTexts,
    pins: Pins,
    asked: Asked,
    choice: Choice,
    lengths: Lengths,
    retry: Retry = 0,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Be the client: generate text from a prompt that the server never sees.

    The client has no model: the server sends what is public of it, and says
    whether the two need a dealer. The new text goes to standard output as it
    arrives. Several prompts are answered together; then each new text
    stands on lines of its own, in the order of the prompts.

    Example: privinf generate --server s.example.org:7000 --dealer d.example.org:7001 --keys keys/client --prompt "def main("
    """
    given, sampling = prompt.read(), choice.sampling()
    options = make_options(runtime, pins, lengths, trust=peers.trust)
    from privinf.cli.screen import Screen
    from privinf.client.client import Client

    with Screen(quiet=as_json) as screen:
        screen.say(f"connecting to {peers.server}")
        told: dict[str, Any] = {"progress": screen.progress, "waiting": screen.waiting}
        with Client(peers.server, dealer=peers.dealer, keys=str(peers.keys), options=options, **told) as client:
            if isinstance(given, common.PromptOptions):
                replies: Any = client.generate(**given.given, sampling=sampling, retry=retry, **vars(asked))
                screen.write_replies(replies, given)
            else:
                tokens = client.generate(given.text, ids=given.ids, sampling=sampling, retry=retry, **vars(asked))
                screen.write_tokens(tokens, given)
            result = client.result
        screen.summary(result)
    if as_json:
        common.write_json(result)
