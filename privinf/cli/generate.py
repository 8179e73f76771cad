"""`privinf generate`: the client."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from privinf.cli import common


def generate(
    server: common.ServerAddress,
    dealer: common.DealerAddress,
    keys: common.Keys,
    prompt: common.PromptText = None,
    prompt_file: common.PromptFile = None,
    prompt_ids: common.PromptIds = None,
    expect: Annotated[str | None, typer.Option("--expect", metavar="ID", help="Refuse any model but the one with this id.")] = None,
    expect_tokenizer: common.ExpectTokenizer = None,
    tokenizer: common.TokenizerFile = None,
    max_new_tokens: common.MaxNewTokens = common.NEW_TOKENS,
    ignore_eos: common.IgnoreEos = False,
    logits: common.Logits = False,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    seed: common.Seed = None,
    stop: common.Stop = None,
    stop_ids: common.StopIds = None,
    chunk: common.Chunk = 0,
    pad_prompt: common.PadPrompt = 0,
    pad_reply: common.PadReply = 0,
    retry: common.Retry = 0,
    link: common.LinkName = None,
    device: common.Device = "cpu",
    timeout: common.Timeout = common.TIMEOUT_S,
    connect_timeout: common.ConnectTimeout = common.CONNECT_S,
    cache: common.Cache = None,
    as_json: common.Json = False,
) -> None:
    """Be the client: generate text from a prompt that the server never sees.

    The client has no model: the server sends what is public of it. The new
    text goes to standard output as it arrives.

    Example: privinf generate --server s.example.org:7000 --dealer d.example.org:7001 --keys keys/client --prompt "def main("
    """
    given = common.read_prompt(prompt, prompt_file, prompt_ids)
    sampling = common.make_sampling(temperature, top_k, top_p, seed, stop, stop_ids)
    lengths = {"chunk": chunk, "pad_prompt": pad_prompt, "pad_reply": pad_reply}
    choice = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "logits": logits, "sampling": sampling, "retry": retry}
    pins: dict[str, Any] = {"expect": expect, "expect_tokenizer": expect_tokenizer, "tokenizer": tokenizer}
    options = common.make_options(
        timeout=timeout, connect_timeout=connect_timeout, link=link, device=device, cache=cache, **pins, **lengths
    )
    from privinf.cli.screen import Screen
    from privinf.client.client import Client

    with Screen(quiet=as_json) as screen:
        screen.say(f"connecting to {server}")
        told = {"progress": screen.progress, "waiting": screen.waiting}
        with Client(server, dealer=dealer, keys=str(keys), options=options, **told) as client:
            tokens = client.generate(given.text, ids=given.ids, **choice)
            screen.write_tokens(tokens, given)
            result = client.result
        screen.summary(result)
    if as_json:
        common.write_json(result)
