"""`privinf prepare`: queries prepared ahead of time, and rows for any query."""

from __future__ import annotations

from typing import Annotated, Any

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import Asked, Cluster, Expect, Peers, make_options
from privinf.session.options import Lengths, Runtime
from privinf.setting import Setting
from protocols.errors import ConfigError


@expand(without=("ignore_eos",))
def prepare(
    *,
    peers: Peers,
    seq: Annotated[list[int] | None, Setting("The number of prompt tokens; may be given several times.", "T", least=1)] = None,
    stock: Annotated[int, Setting("Without a dealer: rows of the linear maps for N positions of any later query.", "N", least=0)] = 0,
    expect: Expect = None,
    asked: Asked,
    count: Annotated[int, Setting("How many queries for each length.", "K", least=1)] = 1,
    cluster: Cluster,
    lengths: Lengths,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Prepare queries, so that `generate` pays the online part only.

    What does not depend on the prompt is done now and kept, at the client and
    at the server. A query uses it if its prompt has T tokens, it asks for no
    more than N new ones, and for logits, --chunk, --pad-prompt and --pad-reply
    as here. Each is used once.

    --stock N, without a dealer, makes rows of the model's linear maps for N
    positions: any later query, of whatever length, takes its rows from there
    for as long as there are enough. `explain --stock N` says what that saves.

    With --engine ray the queries are prepared by actors on a Ray cluster, and
    kept here.

    Example: privinf prepare --server s.example.org:7000 --dealer d.example.org:7001 --keys keys/client --seq 128 --count 4
    """
    options = make_options(runtime, lengths, expect=expect, trust=peers.trust)
    if cluster.engine == "ray" and stock:
        raise ConfigError("a stock of rows is made by one session", remedy="leave --engine or --stock out")
    from privinf.cli.screen import Screen
    from privinf.client.client import Client

    with Screen(quiet=as_json, plain=True) as screen:
        screen.say(f"connecting to {peers.server}")
        told: dict[str, Any] = {"progress": screen.progress, "waiting": screen.waiting}
        whom: dict[str, Any] = {"dealer": peers.dealer, "keys": str(peers.keys), "options": options}
        wanted: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "logits": asked.logits, "count": count}
        if cluster.engine == "ray":
            from privinf.jobs.preparing import prepare as on_cluster
            from privinf.session.cluster import aside

            where: dict[str, Any] = {"sessions": cluster.sessions, "ray_address": cluster.ray_address, "progress": screen.progress}
            with aside():
                found = on_cluster(peers.server, seq=seq or [], **whom, **wanted, **where)
        else:
            with Client(peers.server, **whom, **told) as client:
                found = client.prepare(seq or [], stock=stock, **wanted)
    if as_json:
        common.write_json(found)
        return
    _show(found)


def _show(found: dict[str, Any]) -> None:
    """A line for the stock and for each query that is kept."""
    if found["stock"] is not None:
        print(
            "stock: rows for {rows} positions of {maps} maps, {size}".format(
                **found["stock"], size=common.human_bytes(found["stock"]["bytes"])
            )
        )
    for made in found["prepared"]:
        tokens = f"{made['seq']} prompt tokens, {made['max_new_tokens']} new{', logits' if made['logits'] else ''}"
        print(f"prepared: {tokens}, index {made['index']}, {common.human_bytes(made['bytes'])}")
