"""What `privinf analyze` finds, against what is known of small models; and that it works on any checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tokenizers import Tokenizer
from torch.nn import functional as F
from typer.testing import CliRunner

from privinf.cli.analyze import analyze
from privinf.models.aero import AeroModel
from privinf.models.base import configure
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.training.corpus import read_corpus, save_tokenizer, train_tokenizer
from privinf.training.evaluation import continue_text, entropy_of_heads, token_loss
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from privinf.training.removal import deepest, loss_without, recommend, without_ffns
from privinf.training.tracing import KINDS, PLACES, choose_prompts, mean_and_error, trace_prompts
from protocols.errors import ConfigError

SIZES: dict[str, Any] = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
OPTIONS = ["--windows", "3", "--length", "12", "--prompts", "2", "--prompt-length", "8", "--threads", "1"]


def made(variant: str, seed: int = 1, **fields: Any) -> AeroModel:
    """Random weights, no scalar at its resting value."""
    torch.manual_seed(seed)
    model = AeroModel(ladder_config(variant, **(SIZES | fields)))
    with torch.no_grad():
        initialise(model, seed)
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta", "temperature")):
                parameter.copy_(0.6 + torch.rand_like(parameter))
            elif "weight" in name and ".ln_" not in "." + name:
                parameter.mul_(1.5)
    return model.requires_grad_(False).eval()


def some_ids(rows: int = 4, columns: int = 13) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, columns), generator=torch.Generator().manual_seed(3))


def run(*options: str) -> Any:
    app = typer.Typer()
    app.command()(analyze)
    return CliRunner().invoke(app, list(options))


# ---- removal


@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+ScFFN", "SM(t)+ScFuFFN", "SM+ScFuFFN_i1", "SM+R"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_left_after_a_removal_is_the_model_without_the_ffn(variant: str, tied: bool) -> None:
    """Without an FFN a block is beta (X + MHA(X)): computed here by setting its last matrix to zero."""
    model, ids = made(variant, tie_word_embeddings=tied), some_ids()
    left = without_ffns(model, [1])
    assert left.config.model_type == "aero" and 1 in left.config.ffn_removed
    zeroed = made(variant, tie_word_embeddings=tied)
    last = zeroed.h[1].mlp.last
    last.weight.zero_()
    last.bias.zero_()
    tolerance = 1e-4 * float(zeroed(ids).abs().max())
    torch.testing.assert_close(left(ids), zeroed(ids), rtol=0, atol=tolerance)
    assert loss_without(model.folded(), ids, [1]) == pytest.approx(token_loss(zeroed, ids), rel=1e-4)
    torch.testing.assert_close(without_ffns(model, [])(ids), model(ids), rtol=0, atol=tolerance)


def test_the_recommendation_is_the_cheapest_set_and_the_rule_is_the_deepest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that the model itself wrote, so that every FFN that does something is missed; two do nothing."""
    model = made("SM(t)+ScFuFFN", n_layer=5)
    for layer in range(5):
        model.h[layer].mlp.last.weight.mul_(0 if layer in (1, 3) else 10)
    model.lm_head.weight.mul_(20)
    ids = torch.tensor([[first, *continue_text(model, [first], 12)] for first in range(6)])
    folded = model.folded()
    assert recommend(folded, ids, 2) == (1, 3) and deepest(model.config, 2) == (3, 4)
    assert all(block.mlp is not None for block in folded.h)
    monkeypatch.setattr("privinf.training.removal.MOST_SETS", 1)  # one after the other
    assert recommend(folded, ids, 2) == (1, 3)


@pytest.mark.parametrize(
    ("variant", "count", "text"), [("SM+ScFuFFN", 4, "has 3 FFNs"), ("SM+ScFuFFN_i3", 1, "has no FFN"), ("SM", 0, "1 to 3")]
)
def test_a_removal_that_cannot_be_is_refused(tmp_path: Path, variant: str, count: int, text: str) -> None:
    model = made(variant)
    save_checkpoint(model, model.config, tmp_path / "model")
    result = run(str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--remove", str(count), "--json", *OPTIONS)
    assert isinstance(result.exception, ConfigError) and text in str(result.exception) and result.stdout == ""


# ---- tracing


def test_traces_of_a_model_that_reads_nothing_but_the_last_token() -> None:
    """Attention that writes nothing: no other token has an effect, and at the last token the state of any layer carries all."""
    model = made("SM+ScFFN")
    for block in model.h:
        block.attn.c_proj.weight.zero_()
        block.attn.c_proj.bias.zero_()
    found = trace_prompts(model, choose_prompts(model, some_ids(12, 9), 3))
    assert found.clean_probability == pytest.approx(found.corrupted_probability, abs=1e-6)
    assert all(abs(value) < 1e-6 for kind in KINDS for row in found.probability[kind] for value in row)


def test_restoring_the_last_state_restores_everything_and_the_past_nothing() -> None:
    model = made("SM(t)+ScFuFFN_i1")
    found = trace_prompts(model, choose_prompts(model, some_ids(40, 9), 4))
    whole = found.clean_probability - found.corrupted_probability
    last = PLACES.index("last")
    assert whole > 0 and found.total_entropy_change > 0
    assert found.probability["state"][2][last] == pytest.approx(whole, abs=1e-5)
    assert found.probability["state"][2][:last] == pytest.approx([0.0] * last, abs=1e-6)  # nobody reads them any more
    assert found.probability["FFN"][2] == [0.0] * len(PLACES)  # is not there
    assert found.entropy["state"][2] == pytest.approx([0.0] * len(PLACES), abs=1e-6)  # attention is over by then
    assert trace_prompts(model, choose_prompts(model, some_ids(40, 9), 4)) == found
    mean, error = found.whole["probability"]["state"][2]
    assert mean == pytest.approx(whole, abs=1e-5)
    assert 0 < error < whole and found.whole["entropy"]["state"][2][1] < 1e-6


def test_effects_have_the_standard_error_of_their_mean() -> None:
    values = torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]], [[8.0, 5.0]]])  # three prompts, one kind, two layers
    (first, second), *others = mean_and_error(values)[0], *mean_and_error(values[:1])[0]
    assert first == pytest.approx((4.0, math.sqrt(13 / 3))) and second == (5.0, 0.0) and others == [(1.0, 0.0), (5.0, 0.0)]


def test_prompts_are_those_whose_end_the_model_expects() -> None:
    model, windows = made("SM+LN+R"), some_ids(60, 9)
    model.lm_head.weight.mul_(20)
    with torch.no_grad():
        expected = F.softmax(model(windows[:, :-1])[:, -1], dim=-1)
        for row in (21, 7, 40):
            windows[row, -1] = expected[row].argmax()
    found = [float(expected[row, windows[row, -1]]) for row in range(60)]
    sure = [row for row in range(60) if found[row] >= 0.3 and found[row] == float(expected[row].max())]
    rest = sorted(set(range(60)) - set(sure), key=lambda row: -found[row])
    assert sure and torch.equal(choose_prompts(model, windows, len(sure) + 2), windows[[*sure, *rest[:2]]])


# ---- entropy


def test_entropy_of_attention_that_looks_evenly() -> None:
    model = made("SM+ScFuFFN")
    for block in model.h:
        block.attn.c_attn.weight[:, :16].zero_()
        block.attn.c_attn.bias[:16].zero_()
    even = sum(math.log(n) for n in range(1, 13)) / 12
    assert entropy_of_heads(model, some_ids(5, 12)).flatten().tolist() == pytest.approx([even] * 6, rel=1e-5)


# ---- the command


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    root.mkdir()
    for n in range(8):
        (root / f"part_{n}.txt").write_text(f"the number {n} is one of the numbers, and {n + 1} is the next one\n" * 40)
    return root


def with_tokenizer(directory: Path, sources: Path, variant: str, **fields: Any) -> Path:
    tokenizer = train_tokenizer(read_corpus(sources), 300)
    model = made(variant, vocab_size=tokenizer.get_vocab_size(), n_positions=64, **fields)
    save_checkpoint(model, model.config, directory)
    save_tokenizer(tokenizer, directory / "tokenizer.json")
    return directory


def test_the_command_analyses_removes_trains_and_writes_one_page(sources: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tmp_path / "run" / "checkpoint", sources, "SM(t)+ScFuFFN")
    row = {"step": 0, "entropy": [[1.0, 2.0]] * 3, "entropy_max": 2.5, "overload": 0.5, "collapse": 0.0}
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row | {"step": step}) + "\n" for step in (0, 5)) + '{"cut of')
    out = tmp_path / "out"
    options = ["--corpus", str(sources), "-o", str(out), "--remove", "1", "--train-steps", "12", "--batch", "4"]
    done = run(str(tmp_path / "run"), "--json", *options, *OPTIONS)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((out / "analysis.json").read_text())
    assert len(found["entropy"]["heads"]) == 3 and len(found["entropy"]["over_training"]) == 2
    assert [entry["layer"] for entry in found["ffn"]["ablation"]] == [0, 1, 2]
    removal = found["removal"]
    assert removal["deepest"]["layers"] == [2] and removal["recommended"]["loss"] <= removal["deepest"]["loss"]
    assert removal["recommended"]["trained_held_out_loss"] < removal["recommended"]["held_out_loss"]
    for effect in ("probability", "entropy"):
        sizes = {int(layer): abs(mean) for layer, (mean, _) in found["ffn"]["traced"][effect].items()}
        assert removal["least_" + effect]["layers"] == [min(sizes, key=sizes.__getitem__)]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and "http" not in page and str(tmp_path) not in page
    _, config, tokenizer = load_checkpoint(out / "recommended" / "checkpoint")
    assert config.ffn_removed == tuple(removal["recommended"]["layers"]) and tokenizer is not None
    plain = run(str(model), *options[:4], *OPTIONS)
    assert plain.exit_code == 0 and "in overload" in plain.stdout and "report.html" in plain.stdout


@pytest.mark.parametrize("kind", ["gpt2", "aero without ffn"])
def test_any_checkpoint_is_analysed_with_or_without_a_tokenizer(tmp_path: Path, kind: str) -> None:
    if kind == "gpt2":
        config = configure(SIZES | {"model_type": "gpt2", "activation_function": "gelu"})
        model = AeroModel(config)
        initialise(model, 1)
    else:
        model = made("SM(t)+ScFuFFN_i3")
    save_checkpoint(model, model.config, tmp_path / "model")
    done = run(str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--json", *OPTIONS)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert "random" in found["text"]["source"] and found["removal"] is None
    assert len(found["ffn"]["ablation"]) == (3 if kind == "gpt2" else 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [(["--train-steps", "5"], "--remove"), (["--length", "17"], "16 tokens at most"), (["--learning-rate", "0"], "learning_rate")],
)
def test_wrong_options_are_refused_in_words(tmp_path: Path, options: list[str], text: str) -> None:
    model = made("SM")
    save_checkpoint(model, model.config, tmp_path / "model")
    result = run(str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--prompt-length", "8", *options)
    assert isinstance(result.exception, ConfigError) and text in str(result.exception)


def test_a_tokenizer_of_another_model_is_refused(sources: Path, tmp_path: Path) -> None:
    directory = with_tokenizer(tmp_path / "model", sources, "SM")
    model = made("SM")
    save_checkpoint(model, model.config, directory)
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size() > 40
    result = run(str(directory), "-o", str(tmp_path / "out"), "--prompts", "0", "--length", "8")
    assert isinstance(result.exception, ConfigError) and "vocab_size is 40" in str(result.exception)
