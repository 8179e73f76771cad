"""Training on small corpora: it learns, it resumes to the bit, it stops with a message, and it keeps within the ring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from privinf.cli.train import train
from privinf.models.aero import AeroConfig
from privinf.models.checkpoint import load_checkpoint, load_tokenizer
from privinf.training import corpus
from privinf.training.corpus import END, Tokens, batch_at, encode_corpus, read_corpus, train_tokenizer
from privinf.training.divergence import Diverged
from privinf.training.evaluation import continue_text, evaluate
from privinf.training.ladder import ladder_config
from privinf.training.metrics import METRICS
from privinf.training.settings import Limits, Settings, rate_at
from privinf.training.trainer import STATE, Trainer
from protocols.errors import ConfigError
from tests.support.training import QUICK, SMALL_RUN

SOURCE = '''def area_{n}(width, height):
    """The area of number {n}."""
    if width < {n}:
        raise ValueError("too small")

    return width * height
'''


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    for n in range(20):
        path = root / f"package_{n % 7}" / f"module_{n}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE.replace("{n}", str(n)) * 6)
    return root


SMALL = ladder_config("SM(t)+ScFuFFN", vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False)


def trainer(tokens: Tokens, directory: Path, config: AeroConfig = SMALL, **settings: Any) -> Trainer:
    return Trainer(config, Settings(**(QUICK | settings)), tokens, directory)


# ---- the corpus


def test_whole_modules_are_held_out_with_their_tests(sources: Path) -> None:
    for name, text in {
        "test/test_package_1.py": "x = 1",
        "test/test_package_2/test_more.py": "x = 2",
        "empty.py": " \n",
        "site-packages/other.py": "x = 3",
        "_sysconfigdata__linux.py": "x = 4",
        "package_3/end.py": f"END = '{END}'",
    }.items():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text(text)
    (sources / "latin.py").write_bytes(b"# caf\xe9\n")
    documents = read_corpus(sources)
    assert documents == read_corpus(sources)
    assert [d.name for d in documents] == sorted(d.name for d in documents)
    assert {d.module for d in documents} == {f"package_{n}" for n in range(7)}
    held_out = {d.module for d in documents if d.held_out}
    assert 0 < len(held_out) < 7 and not held_out & {d.module for d in documents if not d.held_out}


@pytest.mark.parametrize("files", [None, {}, {"a.py": ""}, {".a.txt": "x = 1"}, {"a.py": "x = 1"}, {"a/b.txt": "x = 1"}])
def test_a_corpus_without_two_files_is_refused(tmp_path: Path, files: dict[str, str] | None) -> None:
    root = tmp_path / "corpus"
    for name, text in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    if files == {}:
        root.mkdir()
    with pytest.raises(ConfigError, match=r"no such directory|is empty|one file"):
        read_corpus(root)


def test_the_tokenizer_keeps_every_byte_and_indents_in_one_token(sources: Path, tmp_path: Path) -> None:
    corpus.save_tokenizer(train_tokenizer(read_corpus(sources), 340), tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "def f(x):\r\n\tif x:\n        return 'é\u4e2d\U0001f600'  \n\n\n# \x00end 123456\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("\n        ").ids) == 1 and len(tokenizer.encode("\n    ").ids) == 1
    assert tokenizer.token_to_id(END) == 0 and tokenizer.encode(f"a{END}").ids[-1] == 0
    assert tokenizer.get_vocab_size() == 340
    with pytest.raises(ConfigError, match="vocab_size"):
        train_tokenizer(read_corpus(sources), 256)


def test_batches_are_a_function_of_the_step_and_visit_everything(tokens: Tokens) -> None:
    stream = np.arange(1000, dtype=np.uint16)
    first = [batch_at(stream, step, 3, 32, seed=7) for step in range(10)]
    assert all(np.array_equal(a, batch_at(stream, step, 3, 32, seed=7)) for step, a in reversed(list(enumerate(first))))
    assert not np.array_equal(first[0], batch_at(stream, 0, 3, 32, seed=8))
    starts = np.concatenate(first)[:30, 0]
    assert len(set(starts.tolist())) == 30 and len(set((starts % 32).tolist())) == 1  # one pass over 30 windows
    assert all(np.array_equal(row, np.arange(row[0], row[0] + 33)) for row in np.concatenate(first))
    with pytest.raises(ConfigError, match="too few"):
        batch_at(stream[:60], 0, 1, 32, seed=7)


# ---- training


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("SM(t)+ScFuFFN", {}),
        ("SM+LN+G", {}),
        ("SM(t)+ScFuFFN", {"entropy_lambda": 1e-3}),
        ("SM+ScFFN", {"bf16": False}),
        ("SM(t)+ScFuFFN", {"optimizer": "muon"}),
        ("SM+LN+G", {"optimizer": "muon"}),
    ],
)
def test_a_few_steps_lower_the_loss(tokens: Tokens, tmp_path: Path, variant: str, options: dict[str, Any]) -> None:
    config = ladder_config(variant, vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    run = trainer(tokens, tmp_path, config, **options)
    before = run.validate()["held_out_loss"]
    after = run.run(40, None)
    assert before == pytest.approx(np.log(300), abs=0.5) and after["held_out_loss"] < before - 1.5
    assert after["bits_per_byte"] * tokens.held_out_bytes == pytest.approx(
        after["held_out_loss"] / np.log(2) * (len(tokens.held_out) - 1), rel=1e-6
    )
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert rows[0]["step"] == 1 and rows[-1]["max_score"] > 0 and ("entropy_penalty" in rows[0]) == bool(options.get("entropy_lambda"))


@pytest.mark.parametrize(("tied", "optimizer"), [(False, "adamw"), (True, "adamw"), (False, "muon")])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tokens: Tokens, tmp_path: Path, tied: bool, optimizer: str) -> None:
    config = SMALL.model_copy(update={"tie_word_embeddings": tied})
    settings = {"entropy_lambda": 1e-4, "optimizer": optimizer}
    whole = trainer(tokens, tmp_path / "whole", config, **settings)
    whole.run(12, None)
    trainer(tokens, tmp_path / "parts", config, **settings).run(12, None, stop_after=5)
    rest = trainer(tokens, tmp_path / "parts", config, **settings)
    assert rest.resume() and rest.step == 5
    rest.run(12, None)
    a, b = load_file(tmp_path / "whole" / STATE), load_file(tmp_path / "parts" / STATE)
    assert a.keys() == b.keys() and any(name.startswith("exp_avg_sq.") for name in a)
    assert any(name.startswith("momentum_buffer.h.") for name in a) == (optimizer == "muon")
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [[json.loads(line)["step"] for line in (tmp_path / part / METRICS).read_text().splitlines()] for part in ("whole", "parts")]
    assert logs == [[1, 10, 12, 12], [1, 5, 5, 10, 12, 12]]
    assert not list((tmp_path / "parts").glob("*.tmp"))


def test_a_state_of_another_run_or_a_damaged_one_is_refused(tokens: Tokens, tmp_path: Path) -> None:
    assert not trainer(tokens, tmp_path).resume()
    trainer(tokens, tmp_path).run(2, None)
    with pytest.raises(ConfigError, match=r"settings differs in seed"):
        trainer(tokens, tmp_path, seed=2).resume()
    with pytest.raises(ConfigError, match=r"config differs in n_head"):
        trainer(tokens, tmp_path, SMALL.model_copy(update={"n_head": 1})).resume()
    state = tmp_path / STATE
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(ConfigError, match=STATE):
        trainer(tokens, tmp_path).resume()


def test_divergence_ends_with_a_message(tokens: Tokens, tmp_path: Path) -> None:
    run = trainer(tokens, tmp_path)
    with torch.no_grad():
        run.model.wte.weight[:] = 1e30
    with pytest.raises(Diverged, match=r"diverged at step 0.*learning-rate"):
        run.run(3, None)
    assert not (tmp_path / STATE).exists()


def test_the_penalty_holds_values_within_the_ring(tokens: Tokens, tmp_path: Path) -> None:
    largest = {}
    for weight in (0.0, 1.0):
        run = trainer(tokens, tmp_path / str(weight), limits=Limits(score_bound=1.0, residual=0.5, logit=4.0, weight=weight))
        run.run(60, None)
        largest[weight] = run.validate()
    assert all(largest[1.0][name] < largest[0.0][name] for name in ("max_score", "max_residual", "max_logit"))
    assert largest[1.0]["max_score"] < 4 and largest[1.0]["max_logit"] < 9  # about 57 and 20 without


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    settings = Settings(learning_rate=1.0, warmup_steps=10, decay_fraction=0.5)
    assert [rate_at(settings, step, fraction) for step, fraction in ((0, 0.0), (9, 0.1), (50, 0.5), (75, 0.75), (100, 1.0))] == [
        0.1,
        1.0,
        1.0,
        0.5,
        0.0,
    ]


def test_the_clock_ends_a_run(tokens: Tokens, tmp_path: Path) -> None:
    run = trainer(tokens, tmp_path)
    run.run(None, 0.01)
    assert run.step > 0 and run.elapsed == pytest.approx(0.6, abs=0.5)
    with pytest.raises(ConfigError, match="--steps or --minutes"):
        run.run(None, None)
    with pytest.raises(ConfigError, match="n_positions"):
        trainer(tokens, tmp_path, length=33)


def test_a_prompt_of_all_positions_yields_one_token(tokens: Tokens, tmp_path: Path) -> None:
    model = trainer(tokens, tmp_path).model
    assert len(continue_text(model, [1] * 32, 5)) == 1
    assert len(continue_text(model, [1] * 3, 5)) == 5
    assert evaluate(model, tokens, 32, windows=2)["held_out_tokens"] == 64


# ---- the command


def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(train)
    return app


def test_the_command_trains_resumes_and_leaves_a_checkpoint(sources: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["-o", str(output), "--corpus", str(sources), *SMALL_RUN]
    done = CliRunner().invoke(command(), [*options, "--steps", "6"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 6
    again = json.loads(CliRunner().invoke(command(), [*options, "--steps", "8"]).stdout)
    assert again["steps"] == 8 and again["variant"] == "SM(t)+ScFuFFN"
    model, config, tokenizer_file = load_checkpoint(output / "checkpoint")
    assert tokenizer_file is not None
    tokenizer = load_tokenizer(tokenizer_file, config)
    assert config.stop_ids == {tokenizer.token_to_id(END)}
    measured = evaluate(model, encode_corpus(read_corpus(sources), tokenizer), 32)
    assert measured["held_out_loss"] == pytest.approx(again["held_out_loss"], abs=0.01)
    assert {path.name for path in output.iterdir()} == {"checkpoint", "loss.png", METRICS, "run.json", STATE}
    assert str(tmp_path) not in (output / "run.json").read_text() + (output / "checkpoint" / "config.json").read_text()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--steps", "1", "--variant", "SM+Mamba"], "SM+Mamba"),
        (["--steps", "1", "--heads", "3"], "n_head"),
        (["--steps", "1", "--learning-rate", "0"], "learning_rate"),
        (["--steps", "1", "--entropy-gamma", "2", "--entropy-lambda", "nan"], "entropy_gamma"),
        (["--steps", "1", "--positions", "100000"], "n_positions"),
    ],
)
def test_wrong_options_are_refused_in_words(sources: Path, tmp_path: Path, options: list[str], text: str) -> None:
    result = CliRunner().invoke(command(), ["-o", str(tmp_path / "run"), "--corpus", str(sources), "--vocab", "300", *options])
    assert isinstance(result.exception, ConfigError) and text in str(result.exception) and result.stdout == ""
