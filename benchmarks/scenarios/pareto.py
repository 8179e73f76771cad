"""Trained checkpoints: held-out perplexity in float beside what one private pass costs online."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.backends.plain import one_thread
from benchmarks.backends.privinf_backend import PrivinfBackend
from benchmarks.measure import Run
from benchmarks.schema import Absent
from privinf.training.corpus import encode_corpus, read_corpus
from privinf.training.evaluation import evaluate
from privinf.training.families import load_trained
from protocols.errors import ConfigError


def trained(root: Path) -> list[Path]:
    """Checkpoints with a tokenizer in the checkout: `models/*`, and what `privinf train` left in `runs/*`."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    found = sorted([*root.glob("models/*"), *root.glob("runs/*"), *root.glob("runs/*/*")])
    return [path for path in found if all((path / name).is_file() for name in names)]


def pareto(run: Run, work: Path, *, models: Sequence[Path], seq: int) -> None:
    """Perplexities compare among models of one tokenizer, bits per byte among all. Text: modules of the standard library held out."""
    from tokenizers import Tokenizer

    if not models:
        raise ConfigError("there is no trained checkpoint", remedy="name directories, or train one: make train")
    documents = read_corpus()
    for number, path in enumerate(models):
        try:
            model, config, _ = load_trained(path)
            if seq > config.n_positions:
                raise ConfigError(f"{seq} tokens do not fit {path.name}'s context of {config.n_positions}")
            tokens = encode_corpus([d for d in documents if d.held_out], Tokenizer.from_file(str(path / "tokenizer.json")))
            (work / str(number)).mkdir()
            network = run.network(path, work / str(number))
        except ConfigError as error:
            run.absent.append(Absent(path.name, " ".join(str(error).split())))
            continue
        with one_thread():  # two wait for each other where anything else runs
            found = evaluate(model, tokens, config.n_positions, values=False)
        run.measure("held-out perplexity", found["held_out_perplexity"], "", network, seq, of=path.name)
        run.measure("bits per byte", found["bits_per_byte"], "", network, seq, of=path.name)
        machine.require_memory(PrivinfBackend.needs(network.parameters, seq, config.vocab_size), path.name)
        with PrivinfBackend(network, seq) as used:
            used.once(network.ids(seq))
            online = used.session.traffic["online"]
        run.measure("online bytes", online["sent"] + online["received"], "B", network, seq, of=path.name)
        run.measure("online rounds", online["rounds"], "", network, seq, of=path.name)
    run.note(f"perplexity over all held-out text, in windows of the context's length; bytes of one pass over {seq} tokens")
