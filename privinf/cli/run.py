"""`privinf run`: the three parties on this machine."""

from __future__ import annotations

from privinf.cli import common


def run(
    model: common.Model,
    prompt: common.PromptText = None,
    prompt_file: common.PromptFile = None,
    prompt_ids: common.PromptIds = None,
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
    link: common.LinkName = None,
    device: common.Device = "cpu",
    timeout: common.Timeout = common.TIMEOUT_S,
    cache: common.Cache = None,
    as_json: common.Json = False,
) -> None:
    """Start dealer, server and client on this machine and generate text.

    They are three processes that talk over TLS on loopback, with keys made
    for this run. The new text goes to standard output as it arrives.

    Example: privinf run models/pylib --prompt "def main(" --max-new-tokens 16
    """
    given = common.read_prompt(prompt, prompt_file, prompt_ids)
    sampling = common.make_sampling(temperature, top_k, top_p, seed, stop, stop_ids)
    lengths = {"chunk": chunk, "pad_prompt": pad_prompt, "pad_reply": pad_reply}
    choice = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "logits": logits, "sampling": sampling}
    options = common.make_options(timeout=timeout, link=link, device=device, cache=cache, **lengths)
    from privinf.cli.screen import Screen
    from privinf.local.session import LocalSession

    with Screen(quiet=as_json) as screen:
        screen.say("starting dealer, server and client")
        with LocalSession(model, options, progress=screen.progress) as session:
            tokens = session.generate(given.text, ids=given.ids, **choice)
            screen.write_tokens(tokens, given)
        screen.summary(session.result)
    if as_json:
        common.write_json({**(session.result or {}), "parties": session.parties})
