"""The command line: exit codes, errors in one line, --json, configuration files, signals, and one run as a user types it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from privinf.cli.common import human_bytes, read_prompt
from privinf.cli.signals import Stopped
from privinf.cli.verbs import VERBS
from privinf.session.devices import falls_back
from privinf.session.options import Options
from privinf.transport.keys import init_keys
from protocols import errors
from protocols.errors import ConfigError
from tests.support.command import COMMANDS, ROOT, Call, Done, assert_one_line, finish, start
from tests.support.command import call as call
from tests.support.waiting import PATIENCE

# ---- help and usage


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_verb_has_a_help_text_with_an_example(call: Call, words: list[str]) -> None:
    done = call(*words, "--help")
    assert done.code == 0 and done.err == ""
    assert f"Example: privinf {' '.join(words)}" in " ".join(done.out.split())
    for option in ("--config", "--debug", "--json", "--help"):
        assert option in done.out


def test_the_list_of_verbs_is_short_of_none(call: Call) -> None:
    done = call("--help")
    assert done.code == 0 and all(f" {verb} " in done.out for verb in VERBS)


def test_version(call: Call) -> None:
    assert call("--version") == Done(0, "privinf 0.1.0\n", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "missing command"),
        (["keis"], "did you mean 'keys'"),
        (["keys"], "keys --help"),
        (["keys", "show"], "missing option '--keys'"),
        (["keys", "show", "--keys", "x", "--bogus"], "no such option: --bogus"),
        (["--bogus"], "no such option: --bogus"),
        (["keys", "init", "--keys", "x", "--days", "0"], "--days"),
        (["keys", "init", "--keys", "x", "--days", "many"], "--days"),
        (["run"], "no prompt was given"),  # it has a model of its own
        (["explain", "--seq", "4"], "missing argument 'model'"),
        (["dealer", "--listen", "localhost:0", "--keys", "nowhere", "--workers", "0"], "--workers"),
        (["run", "m", "n", "--prompt", "x"], "unexpected extra argument"),
        (["run", "m", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["run", "m", "--prompt", "x", "--device", "abacus"], "abacus"),
        (["run", "m", "--prompt", "x", "--timeout", "0"], "--timeout"),
        (["run", "m", "--prompt", "x", "--timeout", "nan"], "--timeout"),
        (["run", "m", "--prompt", "x", "--link", "carrier-pigeon"], "20ms:100"),
        (["run", "m"], "no prompt was given"),
        (["run", "m", "--prompt", "x", "--prompt-ids", "1"], "--prompt and --prompt-ids were given"),
        (["run", "m", "--prompt", ""], "the prompt is empty"),
        (["run", "m", "--prompt", "x", "--prompt", "y", "--prompt-ids", "1"], "--prompt and --prompt-ids were given"),
        (["run", "m", "--prompt-ids", "1", "--prompt-ids", "x"], "separated by commas"),
        (["run", "m", "--prompt-ids", "1,,2"], "separated by commas"),
        (["run", "m", "--prompt-ids", "-1"], "--prompt-ids"),
        (["run", "m", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["run", "nowhere", "--prompt", "x"], "nowhere"),
        (["explain", str(ROOT / "README.md"), "--seq", "4"], "readme.md is a file"),
        (["explain", str(ROOT / "models" / "pylib"), "--seq", "4", "--cache", "/proc/nowhere"], "give another --cache"),
        (["explain", "nowhere", "--seq", "4"], "nowhere"),
        (["explain", "nowhere", "--seq", "0"], "--seq"),
        (["convert", "nowhere", "-o", "out"], "nowhere"),
        (["cache", "rm", "--cache", "nowhere"], "give name..., --all or --expired"),
        (["cache", "rm", "something", "--cache", "nowhere"], "something"),
        (["doctor", "--timeout", "-1"], "--timeout"),
        (["doctor", "--connect-timeout", "0"], "--connect-timeout"),
        (["dealer", "--listen", "localhost:0", "--keys", "nowhere"], "keys init"),
        (["dealer", "--listen", "localhost", "--keys", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_2(call: Call, words: list[str], says: str) -> None:
    done = call(*words)
    assert done.code == 2 and done.out == ""
    assert_one_line(done.err)
    assert says in done.err.lower()


# ---- from what is raised to what a user sees


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 2),
        (errors.HandshakeError("x"), 3),
        (errors.PeerUnreachableError("x"), 3),
        (errors.TransportError("x"), 4),
        (errors.ProtocolDesync("x"), 4),
        (errors.RangeError("x"), 2),
        (errors.CorrelationError("x"), 4),
        (errors.UnsupportedOpError("x"), 5),
        (FileNotFoundError(2, "No such file", "x"), 2),
        (MemoryError(), 4),
        (Stopped(signal.SIGINT), 130),
        (Stopped(signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("privinf.cli.keys.show_keys", fail)
    done = call("keys", "show", "--keys", "x", "--json")
    assert done.code == code and done.out == ""
    assert_one_line(done.err)


def test_an_error_is_one_printable_line_whatever_a_peer_put_into_it(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise errors.HandshakeError("no\nentry\x1b[31m", party="client", peer="there", remedy="go\taway")

    monkeypatch.setattr("privinf.cli.keys.show_keys", fail)
    assert call("keys", "show", "--keys", "x").err == "privinf: no entry [31m (at client, peer there); go away\n"


def test_tracebacks_come_with_debug_alone(call: Call) -> None:
    assert "Traceback" not in call("keys", "show", "--keys", "nowhere").err
    done = call("keys", "show", "--keys", "nowhere", "--debug")
    assert done.code == 2 and "Traceback" in done.err and done.err.splitlines()[-1].startswith("privinf: ")


def test_an_output_that_nobody_reads_is_no_error(tmp_path: Path) -> None:
    init_keys(tmp_path / "keys")
    process = start("keys", "show", "--keys", tmp_path / "keys")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(PATIENCE) in (0, 141) and process.stderr is not None and process.stderr.read() == ""
    process.stderr.close()


# ---- configuration files


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def hosts_and_days(call: Call, *words: object) -> tuple[list[str], int]:
    done = call("keys", "init", "--json", *words)
    assert done.code == 0, done.err
    (server,) = [each for each in json.loads(done.out)["certificates"] if each["role"] == "server"]
    return server["hosts"], int(server["not_after"][:4]) - int(server["not_before"][:4])


def test_a_file_gives_options_and_the_command_line_wins(call: Call, tmp_path: Path) -> None:
    file = written(tmp_path / "c.yaml", f"days: 800\nhost: [a.example, b.example]\nkeys: {tmp_path / 'first'}\n")
    hosts, years = hosts_and_days(call, "--config", file)
    assert hosts[-2:] == ["a.example", "b.example"] and years in (2, 3)
    hosts, years = hosts_and_days(call, "--config", file, "--days", 1, "--keys", tmp_path / "second", "--host", "c.example")
    assert "a.example" not in hosts and hosts[-1] == "c.example" and years in (0, 1)


def test_a_table_is_for_its_verb_alone_and_goes_before_the_rest(call: Call, tmp_path: Path) -> None:
    text = f"keys:\n  init:\n    host: inner.example\n    keys: {tmp_path / 'k'}\n    json: true\nrun:\n  nonsense: 1\n"
    done = call("keys", "init", "--config", written(tmp_path / "c.yaml", text))
    assert done.code == 0 and "inner.example" in done.out and json.loads(done.out)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dayz: 3", "'dayz'"),
        ("dayz: 3", "'days'"),
        ("days: many", "days: "),
        ("days: true", "days: "),
        ("days: [1, {}]", "days: "),
        ("days: null", "days: "),
        ("json: 1", "json: must be true or false"),
        ("help: true", "'help'"),
        ("config: x", "'config'"),
        ("sing:\n  days: 3", "'sing'"),
        ("- days", "not a table"),
        ("1: 2", "not a table"),
        ("days: 3\n  x: [", "line 2"),
        ("!!python/object/apply:os.system [true]", "not YAML"),
        (None, "cannot read"),
    ],
)
def test_a_bad_file_is_refused_by_the_name_of_the_key(call: Call, tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "c.yaml"
    if text is not None:
        written(file, text)
    done = call("keys", "init", "--keys", tmp_path / "k", "--config", file)
    assert done.code == 2 and done.out == "" and not (tmp_path / "k").exists()
    assert_one_line(done.err)
    assert says in done.err and "c.yaml" in done.err


# ---- prompts, the cache, doctor


def test_a_prompt_comes_from_text_file_or_ids_and_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("déf f():\n".encode())
    assert read_prompt("a b", None, None).text == "a b"
    assert read_prompt(None, file, None).text == "déf f():\n"
    assert read_prompt(None, None, " 1, 20,3 ").ids == [1, 20, 3]
    assert "a b" not in repr(read_prompt("a b", None, None))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prompt(None, file, None)


def test_the_cache_is_listed_and_removed_by_name(call: Call, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert json.loads(call("cache", "ls", "--cache", cache, "--json").out) == {"cache": str(cache), "entries": [], "bytes": 0}
    for name, size in (("lowered/abc", 10), ("setup/def", 2000)):
        (cache / name).mkdir(parents=True)
        (cache / name / "file").write_bytes(bytes(size))
    found = json.loads(call("cache", "ls", "--cache", cache, "--json").out)
    assert [(entry["name"], entry["bytes"]) for entry in found["entries"]] == [("setup/def", 2000), ("lowered/abc", 10)]
    assert call("cache", "rm", "../cache", "--cache", cache).code == 2
    assert call("cache", "rm", "setup/def", "--cache", cache).code == 0
    assert not (cache / "setup" / "def").exists() and (cache / "lowered" / "abc").exists()
    assert json.loads(call("cache", "rm", "--all", "--cache", cache, "--json").out)["removed"] == ["lowered/abc"]


def test_bytes_for_people() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 1_500_000, 2e10)] == ["0 B", "999 B", "1.0 kB", "1.5 MB", "20.00 GB"]


def test_doctor_finds_a_sound_installation(call: Call, tmp_path: Path) -> None:
    init_keys(tmp_path / "keys")
    done = call("doctor", "--cache", tmp_path / "cache", "--keys", tmp_path / "keys", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    found = {check["name"]: check["detail"] for check in report["checks"]}
    assert report["ok"] and {"torch", "crypten", "clock", "cuda", "cpu", "TLS 1.3", "keys"} <= set(found)
    assert found["certificate of the client"] == "397 days left"


PARTY = ["--dealer", "localhost:1", "--keys", "nowhere"]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "nowhere", "--prompt", "x"],
        ["compare", "nowhere", "--prompt", "x"],
        ["serve", "nowhere", "--listen", "localhost:0", *PARTY],
        ["dealer", "--listen", "localhost:0", "--keys", "nowhere"],
        ["generate", "--server", "localhost:1", "--prompt", "x", *PARTY],
        ["doctor"],
    ],
    ids=lambda words: words[0],
)
def test_a_device_that_is_not_here(call: Call, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By option and by configuration file, with a torch for the CPU and with one that finds no device."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tmp_path / "privinf.yaml"
    config.write_text("device: cuda\n")
    for version, why in ((None, "built for the cpu alone"), ("12.8", "no cuda device is visible")):
        monkeypatch.setattr(torch.version, "cuda", version)
        for given in (["--device", "cuda"], ["--config", str(config)]):
            done = call(*words, *given)
            assert done.code == 2 and (done.out == "" or words[0] == "doctor")
            assert_one_line(done.err)
            assert why in done.err.lower() and "cuda" in done.err
    config.write_text("device: abacus\n")
    done = call(*words, "--config", config)
    assert (done.code, done.out) == (2, "") and "abacus" in done.err
    assert_one_line(done.err)


def test_doctor_lists_the_devices(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pretended ones."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=f"Card {index}", total_memory=(index + 1) << 33)
    )
    done = call("doctor", "--cache", tmp_path, "--device", "cuda", "--json")
    found = {check["name"]: check["detail"] for check in json.loads(done.out)["checks"]}
    devices, otherwise = "cuda:0 Card 0, 8.0 GiB; cuda:1 Card 1, 16.0 GiB", falls_back("cuda")
    assert found["cuda"] == f"{devices}; {otherwise}" and "compiled" in otherwise and "replayed" in otherwise
    done = call("doctor", "--cache", tmp_path, "--json")
    assert {check["name"]: check["detail"] for check in json.loads(done.out)["checks"]}["cuda"] == devices
    with pytest.raises(ConfigError, match="2 CUDA devices"):
        Options(device="cuda:2")
    for wrong in ("abacus", "cuda:x", "cuda:", "cpu:0", "meta"):
        with pytest.raises(ConfigError, match="no device"):
            Options(device=wrong)
    assert Options(device="cuda:1").device == "cuda:1"


def test_doctor_names_what_is_wrong(call: Call, tmp_path: Path) -> None:
    init_keys(tmp_path / "keys", days=1)
    key = tmp_path / "keys" / "client" / "key.pem"
    key.chmod(0o644)
    done = call("doctor", "--cache", tmp_path, "--keys", tmp_path / "keys", "--server", "localhost:1", "--timeout", "0.2")
    assert done.code == 2 and "chmod 600" in done.err
    assert_one_line(done.err)
    assert "FAIL  server at localhost:1" in done.out and "run `privinf keys renew` soon" in done.out
    key.chmod(0o600)
    done = call("doctor", "--cache", tmp_path, "--keys", tmp_path / "keys", "--dealer", "localhost:1", "--timeout", "0.2", "--json")
    assert done.code == 3 and done.out == ""


# ---- processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_says_where_it_listens_and_ends_with_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    init_keys(tmp_path / "keys")
    process = start("dealer", "--listen", "localhost:0", "--keys", tmp_path / "keys", "--json")
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready["role"] == "dealer" and ready["address"].startswith("localhost:") and not ready["address"].endswith(":0")
    process.send_signal(number)
    done = finish(process)
    assert done.code == 0 and done.out == "" and "dealer stops" in done.err


def test_a_signal_ends_any_verb_in_one_line(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = start("run", "nowhere", "--prompt-file", fifo)
    with fifo.open("w"):  # it now reads the prompt, and waits
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert finish(process) == Done(143, "", "privinf: terminated\n")


def test_a_peer_that_is_not_there_is_exit_code_3(tmp_path: Path) -> None:
    init_keys(tmp_path / "keys")
    words = ("--server", "localhost:1", "--dealer", "localhost:1", "--keys", tmp_path / "keys", "--timeout", "0.5", "--json")
    done = finish(start("generate", "--prompt", "x", *words))
    assert done.code == 3 and done.out == ""
    assert_one_line(done.err)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, without a tokenizer."""
    from privinf.models.aero import AeroModel
    from privinf.models.checkpoint import save_checkpoint
    from privinf.training.initial import initialise
    from privinf.training.ladder import ladder_config

    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "eos_token_id": 0, "bos_token_id": 0}
    config = ladder_config("SM(t)+ScFuFFN", **sizes)
    model = AeroModel(config)
    initialise(model, 0)
    directory = tmp_path_factory.mktemp("tiny")
    save_checkpoint(model, config, directory)
    return directory


def test_a_run_as_a_user_types_it(checkpoint: Path, tmp_path: Path) -> None:
    """One run in full: ids on stdout, the contract's JSON, and what `explain` foretold."""
    common = (checkpoint, "--prompt-ids", "1,2,3,4", "--ignore-eos", "--cache", tmp_path / "cache")
    plain = finish(start("run", *common, "--max-new-tokens", 2))
    assert plain.code == 0 and plain.err == ""
    ids = [int(word) for word in plain.out.split()]
    assert len(ids) == 2 and plain.out.endswith("\n")
    two = json.loads(finish(start("explain", checkpoint, "--seq", 4, "--max-new-tokens", 2, "--cache", tmp_path / "cache", "--json")).out)
    result = finish(start("run", *common, "--max-new-tokens", 1, "--json"))
    assert result.code == 0 and result.err == "" and result.out.count("\n") == 1
    document = json.loads(result.out)
    fields = {
        "text",
        "prompt_tokens",
        "tokens",
        "finish_reason",
        "timing",
        "traffic",
        "trust",
        "ring_bits",
        "fractional_bits",
        "model",
        "parties",
    }
    assert fields <= set(document)
    assert document["text"] is None and document["prompt_tokens"] == 4 and document["tokens"] == ids[:1]
    assert set(document["parties"]) == {"server", "client", "dealer"}
    assert len({party["pid"] for party in document["parties"].values()}) == 3
    foretold = json.loads(finish(start("explain", checkpoint, "--seq", 4, "--cache", tmp_path / "cache", "--json")).out)["total"]
    online = document["traffic"]["online"]
    assert (online["payload"], online["rounds"]) == (foretold["online_bytes"], foretold["rounds"])
    assert document["traffic"]["offline"]["dealer"]["payload"] == foretold["dealer_bytes"]
    assert two["total"]["online_bytes"] > foretold["online_bytes"]


def test_a_run_that_cannot_be_is_refused_with_an_empty_stdout(checkpoint: Path, tmp_path: Path) -> None:
    for words, says in (
        (["--prompt-ids", "1,99"], "vocabulary"),
        (["--prompt-ids", ",".join("1" * 17)], "context"),
        (["--prompt", "text"], "tokenizer"),
    ):
        done = finish(start("run", checkpoint, *words, "--json", "--cache", tmp_path / "cache"))
        assert done.code == 2 and done.out == "", done
        assert_one_line(done.err)
        assert says in done.err
