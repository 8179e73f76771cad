"""`privinf prepare`: queries prepared ahead of time."""

from __future__ import annotations

from typing import Annotated

import typer

from privinf.cli import common


def prepare(
    server: common.ServerAddress,
    dealer: common.DealerAddress,
    keys: common.Keys,
    seq: Annotated[list[int], typer.Option("--seq", metavar="T", min=1, help="The number of prompt tokens; may be given several times.")],
    expect: Annotated[str | None, typer.Option("--expect", metavar="ID", help="Refuse any model but the one with this id.")] = None,
    max_new_tokens: common.MaxNewTokens = common.NEW_TOKENS,
    logits: common.Logits = False,
    count: Annotated[int, typer.Option("--count", metavar="K", min=1, help="How many queries for each length.")] = 1,
    chunk: common.Chunk = 0,
    pad_prompt: common.PadPrompt = 0,
    pad_reply: common.PadReply = 0,
    link: common.LinkName = None,
    device: common.Device = "cpu",
    timeout: common.Timeout = common.TIMEOUT_S,
    connect_timeout: common.ConnectTimeout = common.CONNECT_S,
    cache: common.Cache = None,
    as_json: common.Json = False,
) -> None:
    """Prepare queries, so that `generate` pays the online part only.

    What does not depend on the prompt is done now and kept, at the client and
    at the server. A query uses it if its prompt has T tokens, it asks for no
    more than N new ones, and for logits, --chunk, --pad-prompt and --pad-reply
    as here. Each is used once.

    Example: privinf prepare --server s.example.org:7000 --dealer d.example.org:7001 --keys keys/client --seq 128 --count 4
    """
    lengths = {"chunk": chunk, "pad_prompt": pad_prompt, "pad_reply": pad_reply}
    options = common.make_options(
        timeout=timeout, connect_timeout=connect_timeout, link=link, device=device, cache=cache, expect=expect, **lengths
    )
    from privinf.cli.screen import Screen
    from privinf.client.client import Client

    with Screen(quiet=as_json, plain=True) as screen:
        screen.say(f"connecting to {server}")
        told = {"progress": screen.progress, "waiting": screen.waiting}
        with Client(server, dealer=dealer, keys=str(keys), options=options, **told) as client:
            found = client.prepare(seq, max_new_tokens=max_new_tokens, logits=logits, count=count)
    if as_json:
        common.write_json(found)
        return
    for made in found["prepared"]:
        tokens = f"{made['seq']} prompt tokens, {made['max_new_tokens']} new{', logits' if made['logits'] else ''}"
        print(f"prepared: {tokens}, index {made['index']}, {common.human_bytes(made['bytes'])}")
