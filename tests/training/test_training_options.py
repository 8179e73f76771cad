"""What a run can be told beyond the defaults: first values, normalised FFNs, starting weights, corpora, and what goes wrong in words."""

from __future__ import annotations

import json
import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from privinf.cli.train import train
from privinf.models.base import Activations
from privinf.models.checkpoint import load_checkpoint
from privinf.training.corpus import Tokens, read_corpus
from privinf.training.divergence import Diverged, LossWatch
from privinf.training.entropy import bands
from privinf.training.evaluation import entropy_of_heads
from privinf.training.ladder import ladder_config
from privinf.training.metrics import METRICS
from privinf.training.rows import LARGEST_PART, logarithms, row_penalty
from privinf.training.settings import Limits, Settings
from privinf.training.trainer import STATE, Trainer
from protocols.errors import ConfigError
from tests.support.training import QUICK, SMALL_RUN

LINE = "def area_{n}(width, height):\n    # the area of number {n}\n    return width * height + {n}\n\n\n"
SIZES: dict[str, Any] = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    root.mkdir()
    for n in range(12):
        (root / f"text_{n}.md").write_text(LINE.replace("{n}", str(n)) * 8)
    return root


def trainer(tokens: Tokens, directory: Path, variant: str = "SM+ScFuFFN", **settings: Any) -> Trainer:
    return Trainer(ladder_config(variant, **SIZES), Settings(**(QUICK | settings)), tokens, directory)


def command(*options: str) -> Any:
    app = typer.Typer()
    app.command()(train)
    return CliRunner().invoke(app, list(options))


# ---- normalised FFNs


@pytest.mark.parametrize("kind", ["weight", "spectral"])
@pytest.mark.parametrize("variant", ["SM", "SM+ScFuFFN"])
def test_normalised_ffns_train_resume_to_the_bit_and_are_folded_at_export(tokens: Tokens, tmp_path: Path, kind: str, variant: str) -> None:
    whole = trainer(tokens, tmp_path / "whole", variant, ffn_norm=kind)
    whole.run(8, None)
    trainer(tokens, tmp_path / "parts", variant, ffn_norm=kind).run(8, None, stop_after=3)
    rest = trainer(tokens, tmp_path / "parts", variant, ffn_norm=kind)
    assert rest.resume()
    rest.run(8, None)
    a, b = load_file(tmp_path / "whole" / STATE), load_file(tmp_path / "parts" / STATE)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    whole.export(tmp_path / "checkpoint", torch.float32)
    model, config, _ = load_checkpoint(tmp_path / "checkpoint")
    assert config.variant == variant
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids), whole.model.eval()(ids), rtol=1e-5, atol=1e-5)
    if kind == "spectral":  # the power iteration has converged well enough that the largest singular value is near 1
        matrix = (model.h[0].mlp.fused or model.h[0].mlp.c_fc).weight
        assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(1, abs=0.3)


# ---- first values


def test_first_values_of_temperature_thresholds_and_weights(tokens: Tokens, tmp_path: Path) -> None:
    run = trainer(tokens, tmp_path, "SM(t)+ScFuFFN", temperature=1e-2, entropy_lambda=1e-5, entropy_theta=0.25, initial="gpt2")
    theta = run.objective.theta
    assert bool((run.model.h[0].attn.temperature == 1e-2).all()) and theta is not None and bool((theta == 0.25).all())
    assert float(run.model.wte.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(trainer(tokens, tmp_path).model.wte.weight.detach().std()) == pytest.approx(0.2, rel=0.1)
    before = theta.detach().clone()
    run.run(3, None)
    assert not torch.equal(theta, before)  # learnable


def test_the_entropy_penalty_moves_heads_towards_their_thresholds(tokens: Tokens, tmp_path: Path) -> None:
    """Without the penalty heads at full entropy stay; with a heavy one, and thresholds at a quarter, they come down."""
    ids = torch.from_numpy(tokens.training[:320].astype("int64")).reshape(10, 32)
    seen = {}
    for weight in (1e-9, 3.0):
        run = trainer(tokens, tmp_path / str(weight), "SM(t)+ScFuFFN", entropy_lambda=weight, entropy_theta=0.25, entropy_gamma=0.0)
        run.run(60, None)
        assert run.objective.theta is not None
        seen[weight] = float((entropy_of_heads(run.model, ids) - run.objective.theta.detach() * math.log(32)).abs().mean())
    assert seen[3.0] < 0.5 * seen[1e-9]


def test_the_row_penalty_is_what_is_beyond_the_range() -> None:
    q = torch.tensor([[[[2.0], [1.0], [-3.0]]]])  # (1, 1, 3, 1)
    k = torch.tensor([[[[4.0], [1.0], [2.0]]]])
    rows, most = (part[0, 0].tolist() for part in logarithms(q, k))
    sums = [math.exp(8), math.exp(4) + math.exp(1), sum(math.exp(-3 * x) for x in (4, 1, 2))]
    assert rows == pytest.approx([math.log(total / (place + 1)) for place, total in enumerate(sums)]) and most == [8, 4, -3]
    trace = Activations(queries=[q, q], keys=[k, k], offsets=[torch.zeros(1, 1, 3), torch.tensor([[[-2.0, 0, 3]]])])
    excess = [[8 - 6 + 8 - 7, 0, -1 - rows[2]], [0, 0, max(0.0, -1 - rows[2] - 3)]]
    want = sum(sum(x * x for x in each) / 3 + LARGEST_PART * max(each) for each in excess)
    assert float(row_penalty(trace, Settings(row_low=-1.0, row_high=6.0, row_top=7.0))) == pytest.approx(want, rel=1e-5)


def test_the_row_penalty_holds_rows_within_their_range(tokens: Tokens, tmp_path: Path) -> None:
    """With their offsets, which change no logit; and a run that begins with a model that has none fits them first."""
    ids = torch.from_numpy(tokens.training[:320].astype("int64")).reshape(10, 32)
    seen, limits = {}, {"row_low": -0.05, "row_high": 0.05, "row_top": 9.0}
    for weight in (1e-9, 3.0):
        run = trainer(tokens, tmp_path / str(weight), "SM(t)+ScFuFFN", row_weight=weight, **limits)
        run.run(60, None)
        trace = Activations()
        run.model.eval()(ids, trace=trace)
        seen[weight] = float(row_penalty(trace, run.settings))
        assert ("row_penalty" in run.train_step(1.0)) == (run.step % 4 == 1)
    assert seen[3.0] < 0.5 * seen[1e-9]
    plain = trainer(tokens, tmp_path / "plain", "SM(t)+ScFuFFN")
    plain.run(4, None)
    begun = Trainer(plain.config, Settings(row_weight=1.0, length=32), tokens, tmp_path / "begun", start=plain.model)
    assert begun.config.attn_row_offset and not plain.config.attn_row_offset  # type: ignore[union-attr]
    assert (begun.model.eval()(ids) - plain.model.eval()(ids)).abs().max() < 1e-5
    assert max(float(part.abs().max()) for name, part in begun.model.named_parameters() if "row_offset.weight" in name) > 1e-3


def test_entropy_is_recorded_over_training_and_does_not_change_it(tokens: Tokens, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    a, b = trainer(tokens, tmp_path / "a"), trainer(tokens, tmp_path / "b")
    a.metrics.listeners.append(heard.append)
    a.run(6, None, entropy_every=2)
    b.run(6, None)
    rows = [json.loads(line) for line in (tmp_path / "a" / METRICS).read_text().splitlines()]
    assert rows == heard
    entropies = [row for row in rows if "entropy" in row]
    assert [row["step"] for row in entropies] == [0, 2, 4, 6]
    assert all(len(row["entropy"]) == 2 and len(row["entropy"][0]) == 2 for row in entropies)
    assert all(0 <= value <= row["entropy_max"] for row in entropies for layer in row["entropy"] for value in layer)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_bands_are_fractions_of_heads() -> None:
    entropy = torch.tensor([[0.0, 0.04, 0.3], [0.6, 0.75, 1.0]])
    found = bands(4 * entropy, 4.0)
    assert found == pytest.approx(
        {"overload": 2 / 6, "collapse": 2 / 6, "quarter_1": 2 / 6, "quarter_2": 1 / 6, "quarter_3": 1 / 6, "quarter_4": 2 / 6}
    )


# ---- divergence


def test_a_loss_far_above_guessing_is_divergence_too(tokens: Tokens, tmp_path: Path) -> None:
    run = trainer(tokens, tmp_path, "SM", limits=Limits(weight=0.0))
    with torch.no_grad():
        run.model.lm_head.weight *= 3000
    run.settings = run.settings.model_copy(update={"learning_rate": 1e-9})
    with pytest.raises(Diverged, match=r"step 50.*guessing evenly: 5\.70.*residual stream goes from .* no LayerNorm.*--ffn-norm"):
        run.run(80, None)


def test_a_few_steps_far_off_are_no_lost_run(tokens: Tokens, tmp_path: Path) -> None:
    watch, ids = LossWatch(trainer(tokens, tmp_path, "SM").model), torch.zeros(2, 9, dtype=torch.long)
    for step in range(80):
        watch.check(step, 1e9 if step < 20 else 5.5, 1.0, ids)
    with pytest.raises(Diverged, match=r"loss 7\.5"):
        for step in range(80, 100):
            watch.check(step, 7.5, 1.0, ids)


def test_divergence_keeps_the_last_good_state(tokens: Tokens, tmp_path: Path) -> None:
    run = trainer(tokens, tmp_path)
    run.run(10, None, stop_after=2)
    before = (tmp_path / STATE).read_bytes()
    with torch.no_grad():
        run.model.h[1].attn.c_proj.weight[:] = math.inf
    with pytest.raises(Diverged, match=r"no longer finite after h\.1\.attn"):
        run.run(10, None)
    assert (tmp_path / STATE).read_bytes() == before


# ---- files


@contextmanager
def _small_files(limit: int) -> Iterator[None]:
    """Writing beyond `limit` bytes fails, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_said_and_the_last_good_state_kept(tokens: Tokens, tmp_path: Path) -> None:
    run = trainer(tokens, tmp_path)
    run.run(4, None, stop_after=2)
    run.export(tmp_path / "checkpoint")
    files = [tmp_path / STATE, tmp_path / "checkpoint" / "model.safetensors"]
    before = [file.read_bytes() for file in files]
    run.train_step(0.5)
    with _small_files(4096):
        with pytest.raises(ConfigError, match=rf"{STATE}.*cannot be written.*kept"):
            run.save()
        with pytest.raises(ConfigError, match=r"checkpoint.*cannot be written"):
            run.export(tmp_path / "checkpoint")
    assert [file.read_bytes() for file in files] == before
    assert not list(tmp_path.rglob("*.tmp*"))
    again = trainer(tokens, tmp_path)
    assert again.resume() and again.step == 2


def test_files_that_are_not_utf8_are_left_out_and_said(sources: Path) -> None:
    (sources / "latin.md").write_bytes(b"caf\xe9\n" * 9)
    (sources / "picture.png").write_bytes(b"\x89PNG\0\0\xff")
    (sources / ".hidden.md").write_text("hidden")
    said: list[str] = []
    documents = read_corpus(sources, say=said.append)
    assert [document.name for document in documents] == sorted(f"text_{n}.md" for n in range(12))
    assert said == ["1 files left out, not UTF-8: latin.md"]
    (sources / "code.py").write_text("x = 1")
    (sources / "more.py").write_text("x = 2")
    assert {document.name for document in read_corpus(sources, "*.py")} == {"code.py", "more.py"}
    for path in sources.glob("text_*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"is empty; 1 files left out, not UTF-8: latin\.md"):
        read_corpus(sources, "*.md")


def test_one_folder_of_files_is_split_by_file(sources: Path, tmp_path: Path) -> None:
    sources.rename(tmp_path / "outer")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "outer").rename(tmp_path / "corpus" / "inner")
    documents = read_corpus(tmp_path / "corpus")
    assert 0 < sum(document.held_out for document in documents) < len(documents) == 12


# ---- the command


def test_the_command_goes_on_from_a_checkpoint_and_writes_tensorboard(sources: Path, tmp_path: Path) -> None:
    first = command("-o", str(tmp_path / "a"), "--corpus", str(sources), "--steps", "4", *SMALL_RUN, "--variant", "SM+LN+R")
    assert first.exit_code == 0, first.output
    options = ["--from", str(tmp_path / "a" / "checkpoint"), "--corpus", str(sources), "--threads", "1", "--batch", "4", "--json"]
    second = command("-o", str(tmp_path / "b"), "--steps", "2", *options, "--tensorboard", "--entropy-every", "1")
    assert second.exit_code == 0, second.output
    assert json.loads(second.stdout)["variant"] == "SM+LN+R"
    facts = json.loads((tmp_path / "b" / "run.json").read_text())
    assert len(facts["started_from"]["sha256"]) == 64 and str(tmp_path) not in json.dumps(facts)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "b" / "tensorboard"))
    events.Reload()
    assert {"loss", "overload", "held_out_loss"} <= set(events.Tags()["scalars"]) and events.Tags()["histograms"] == ["entropy"]
    taught = command("-o", str(tmp_path / "d"), "--steps", "2", *options, "--teacher", options[1])
    assert taught.exit_code == 0, taught.output
    about = json.loads((tmp_path / "d" / "run.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "d" / METRICS).read_text().splitlines()]
    assert about["teacher"] == about["started_from"] and [abs(row["divergence"]) < 1e-2 for row in rows if "divergence" in row] == [True]
    stranger = command(
        "-o", str(tmp_path / "e"), "--corpus", str(sources), "--steps", "1", *SMALL_RUN, "--vocab", "290", "--teacher", options[1]
    )
    assert isinstance(stranger.exception, ConfigError) and "its tokenizer or vocabulary is another" in str(stranger.exception)
    clash = command("-o", str(tmp_path / "c"), "--steps", "2", *options, "--layers", "3")
    assert isinstance(clash.exception, ConfigError) and "--layers" in str(clash.exception)
    other = command("-o", str(tmp_path / "b"), "--steps", "3", *options, "--learning-rate", "0.1")
    assert isinstance(other.exception, ConfigError) and "settings differs in learning_rate" in str(other.exception)


def test_a_teacher_is_learned_from_in_place_of_the_text(tokens: Tokens, tmp_path: Path) -> None:
    """The loss is KL(teacher || model) by its definition, none at the teacher itself, and the teacher's weights stay as they are."""
    teacher = trainer(tokens, tmp_path / "teacher", learning_rate=3e-2)
    teacher.run(20, None)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    settings = Settings(**(QUICK | {"limits": Limits(weight=0.0)}))
    run = Trainer(teacher.config, settings, tokens, tmp_path / "run", teacher=teacher.model)
    ids = torch.from_numpy(tokens.training[:132].astype("int64")).reshape(4, 33)
    total, cross_entropy, added = run.objective.loss(ids)
    p, q = (model.eval()(ids[:, :-1]).softmax(-1).double() for model in (teacher.model, run.model))
    assert float(total) == float(added["divergence"]) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert float(cross_entropy) > float(total) > 0.01
    run.run(40, None)
    assert float(run.objective.loss(ids)[0]) < 0.5 * float(total)
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    same = Trainer(teacher.config, settings, tokens, tmp_path / "same", start=teacher.model, teacher=teacher.model)
    assert abs(float(same.objective.loss(ids)[2]["divergence"])) < 1e-5
    plain = Trainer(teacher.config, settings, tokens, tmp_path / "run")
    with pytest.raises(ConfigError, match="teacher differs"):
        plain.resume()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--from", "nowhere"], "nowhere: no such directory"),
        (["--temperature", "0"], "temperature"),
        (["--entropy-theta", "2"], "entropy_theta"),
        (["--range-weight", "-1"], "limits.weight"),
        (["--files", "*.rs"], "is empty"),
    ],
)
def test_wrong_values_are_refused_in_words(sources: Path, tmp_path: Path, options: list[str], text: str) -> None:
    result = command("-o", str(tmp_path / "run"), "--corpus", str(sources), "--steps", "1", "--json", *options)
    assert isinstance(result.exception, ConfigError) and text in str(result.exception) and result.stdout == ""


def test_a_tiny_corpus_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "corpus" / name).write_text("few words\n")
    result = command("-o", str(tmp_path / "run"), "--corpus", str(tmp_path / "corpus"), "--steps", "1", *SMALL_RUN)
    assert isinstance(result.exception, ConfigError) and "too few for sequences of 32" in str(result.exception)
