"""`privinf run`: the three parties on this machine."""

from __future__ import annotations

from typing import Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import Asked, Choice, Embedding, OwnModel, PromptTexts, Trust, make_options
from privinf.session.options import Lengths, Runtime
from privinf.trust import DEALER


@expand(without=("connect_timeout",))
def run(
    *,
    model: OwnModel = None,
    prompt: PromptTexts,
    asked: Asked,
    choice: Choice,
    lengths: Lengths,
    trust: Trust = DEALER,
    embedding: Embedding = None,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Start dealer, server and client on this machine and generate text.

    They are three processes that talk over TLS on loopback, with keys made
    for this run; with --trust two-party there is no dealer. The new text
    goes to standard output as it arrives. Several prompts are answered
    together; then each new text stands on lines of its own. Without a MODEL
    it is the one that comes with the package.

    Example: privinf run models/pylib --prompt "def main(" --max-new-tokens 16
    """
    given, sampling = prompt.read(), choice.sampling()
    options = make_options(runtime, lengths, trust=trust, embedding=embedding)
    from privinf.cli.screen import Screen
    from privinf.local.session import LocalSession
    from privinf.shipped import shipped_model

    model = model or shipped_model()
    with Screen(quiet=as_json) as screen:
        screen.say(f"starting {'dealer, ' if trust == DEALER else ''}server and client")
        with LocalSession(model, options, progress=screen.progress) as session:
            if isinstance(given, common.PromptOptions):
                replies: Any = session.generate(**given.given, sampling=sampling, **vars(asked))
                screen.write_replies(replies, given)
            else:
                screen.write_tokens(session.generate(given.text, ids=given.ids, sampling=sampling, **vars(asked)), given)
        screen.summary(session.result)
    if as_json:
        common.write_json({**(session.result or {}), "parties": session.parties})
