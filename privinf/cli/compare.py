"""`privinf compare`: private against float."""

from __future__ import annotations

from typing import Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import Embedding, Model, PromptText, Trust, make_options
from privinf.session.options import Runtime
from privinf.trust import DEALER, TEXTS


@expand(without=("connect_timeout",))
def compare(
    *,
    model: Model,
    prompt: PromptText,
    trust: Trust = DEALER,
    embedding: Embedding = None,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Run one private and one float pass on the same prompt, and show the errors.

    Local processes run the private pass and dump their shares of every
    layer's output to files of their own, where this process adds them up.

    Example: privinf compare models/pylib --prompt "def main("
    """
    given = prompt.read()
    options = make_options(runtime, trust=trust, embedding=embedding)
    from privinf.cli.screen import Screen
    from privinf.local.compare import compare as measure

    with Screen(quiet=as_json, plain=True) as screen:
        screen.say("one private pass and one float pass")
        result = measure(model, prompt=given.text, ids=given.ids, options=options)
    if as_json:
        common.write_json(result)
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    width = max((len(layer["name"]) for layer in result["layers"]), default=0)
    for layer in result["layers"]:
        print(f"{layer['name']:<{width}}  {layer['max_abs_error']:.2e}")
    print(f"{'logits, largest error':<{width}}  {result['max_abs_error']:.2e}")
    for warning in result.get("warnings", ()):
        print(f"warning: {warning}")
    print(f"trust: {TEXTS[result['trust']]}")
    verdict = "agree" if result["agree"] else "DIFFER"
    print(f"tokens {verdict}: private {result['tokens_private']}, float {result['tokens_float']}")
