"""`privinf batch`: each prompt answered once, whatever ends the job, and what it refuses."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import privinf
from privinf.dealer.dealer import DealerService
from privinf.jobs.batch import Progress, _pending
from privinf.jobs.files import Replies, Requests
from tests.support.gateway import ids_of
from tests.support.trio import Process, Services, Trio, is_greedy, keys, services, trio
from tests.support.waiting import wait_for

PROMPTS = [text for _, text in zip(range(14), ("ab", "Hello", "x = 1", "zz top", "(", "privinf") * 3, strict=False)]


@pytest.fixture(scope="module")
def running() -> Iterator[Services]:
    with services() as made:
        yield made


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def replies(path: Path) -> dict[str, dict[str, Any]]:
    """{custom_id: response}, each there once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    made = {each["custom_id"]: each["response"] for each in found}
    assert len(made) == len(found)
    return made


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def so_far(job: Process, path: Path, enough: int) -> bool:
    return not job.alive or count(path) >= enough


def text_of(response: dict[str, Any]) -> str:
    assert response["status_code"] == 200, response
    text: str = response["body"]["choices"][0]["text"]
    return text


def ask(parties: Trio, source: Path, output: Path, **more: Any) -> dict[str, Any]:
    where: dict[str, Any] = {"server": parties.server.address, "dealer": parties.dealer.address, "keys": str(keys())}
    options = privinf.Options(cache=parties.cache)
    return privinf.batch(source, output, **where, options=options, **{"max_new_tokens": 3, "ignore_eos": True, **more})


def test_a_job_killed_at_random_moments_answers_each_prompt_once(running: Services, tmp_path: Path) -> None:
    source, output = written(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS]), tmp_path / "out.jsonl"
    words = (source, "-o", output, "--max-new-tokens", 3, "--ignore-eos", "--sessions", 2)
    for kill in range(3):
        enough = count(output) + random.randrange(1, 4)
        with running.generate(*words, verb="batch") as job:
            wait_for(partial(so_far, job, output, enough))
            job.send(signal.SIGKILL)
            job.wait()
        if kill == 1:  # a last line that was being written
            output.write_bytes(output.read_bytes() + b'{"id": "batch_req_')
    with running.generate(*words, "--json", verb="batch") as job:
        assert job.wait() == 0, job.err
        told = json.loads(job.out)
    assert (told["requests"], told["answered"], told["failed"]) == (len(PROMPTS), len(PROMPTS), 0)
    assert told["before"] >= 3
    found = replies(output)
    assert set(found) == {str(number) for number in range(1, len(PROMPTS) + 1)}
    for number, prompt in enumerate(PROMPTS, 1):
        text = text_of(found[str(number)])
        assert is_greedy(ids_of(prompt), ids_of(text)), "the same as one by one"
        assert found[str(number)]["body"]["usage"]["completion_tokens"] == 3
    assert output.stat().st_mode & 0o077 == 0


def test_lines_say_what_they_want_and_failures_are_written(parties: Trio, tmp_path: Path) -> None:
    body = {"model": "any", "prompt": "ab", "max_tokens": 2, "ignore_eos": True}
    lines = [
        {"custom_id": "whole", "method": "POST", "url": "/v1/completions", "body": body},
        {"custom_id": "ids", "body": {"prompt": ids_of("Hello")}},
        {"prompt": ""},
        {"prompt": "a" * 33},
        {"prompt": "ab", "logprobs": 3},
        "",
        {"prompt": "ab", "max_tokens": "many"},
    ]
    told: list[Progress] = []
    counts = ask(parties, written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", progress=told.append)
    assert (counts["requests"], counts["answered"], counts["failed"], counts["tokens"]) == (6, 2, 4, 5)
    assert [now.done for now in told] == [1, 2, 3, 4, 5, 6] and told[-1].left_s == 0
    found = replies(tmp_path / "out.jsonl")
    assert len(ids_of(text_of(found["whole"]))) == 2 and is_greedy(ids_of("Hello"), ids_of(text_of(found["ids"])))
    wrong = {name: (found[name]["status_code"], found[name]["body"]["error"]) for name in ("3", "4", "5", "7")}
    assert {status for status, _ in wrong.values()} == {400}
    assert "empty" in wrong["3"][1]["message"] and wrong["4"][1]["code"] == "context_length_exceeded"
    assert wrong["5"][1]["param"] == "logprobs" and wrong["7"][1]["param"] == "max_tokens"
    again = ask(parties, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert again["before"] == 6 and again["failed"] == 4 and replies(tmp_path / "out.jsonl") == found


def test_a_server_that_grants_tokens_alone_refuses_lines_by_their_field(tmp_path: Path) -> None:
    wishes = [{"logit_bias": {"3": 1}}, {"temperature": 1.0}, {"presence_penalty": 1.0}, {}]
    with trio(cache=tmp_path, allow_logits=False) as parties:
        source = written(tmp_path / "in.jsonl", [{"prompt": "ab", **each} for each in wishes])
        assert ask(parties, source, tmp_path / "out.jsonl")["answered"] == 1
    found = [replies(tmp_path / "out.jsonl")[str(number)]["body"].get("error", {}) for number in range(1, 5)]
    assert [each.get("param") for each in found] == ["logit_bias", "temperature", "presence_penalty", None]
    assert {each["code"] for each in found[:3]} == {"no_logits"}


def test_lines_of_plain_text_are_prompts(parties: Trio, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text('ab\n{"prompt"\n')
    ask(parties, source, tmp_path / "out.jsonl", sessions=1)
    found = replies(tmp_path / "out.jsonl")
    assert is_greedy(ids_of('{"prompt"'), ids_of(text_of(found["2"])))


def test_requests_come_through_a_pipe_and_begin_after_a_byte_order_mark(parties: Trio, tmp_path: Path) -> None:
    """A pipe can be read but once, and a job reads its requests twice."""
    pipe, data = tmp_path / "pipe", '\ufeff{"prompt": "ab", "max_tokens": 2}\r\n{"prompt": "cd"}\r\n'.encode()
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    counts = ask(parties, pipe, tmp_path / "out.jsonl")
    writer.join()
    assert (counts["requests"], counts["answered"], counts["tokens"]) == (2, 2, 5)
    (tmp_path / "in.jsonl").write_bytes(data)
    assert ask(parties, tmp_path / "in.jsonl", tmp_path / "out.jsonl")["before"] == 2, "and a file of the same is the same job"
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfab\n")
    assert [line for _, line in Requests(tmp_path / "in.txt").lines()] == ["ab"]


def test_standard_input_is_read_as_a_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "ab"}\n')))
    requests = Requests(Path("-"))
    assert list(requests.check()) == ["1"] and [line for _, line in requests.lines()] == ['{"prompt": "ab"}']


@pytest.mark.parametrize("after", [["ab"], ["ab", "ef"], ["ab", "cd", "gh"], ["cd", "ab"]])
def test_requests_that_change_meanwhile_end_the_job_in_one_line(tmp_path: Path, after: list[str]) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": text} for text in ("ab", "cd")])
    requests = Requests(source)
    with Replies(tmp_path / "out.jsonl", requests.check()) as there:
        assert [number for number, _ in _pending(requests, there)] == [1, 2]
        written(source, [{"prompt": text} for text in after])
        with pytest.raises(privinf.ConfigError, match="has changed since this job began"):
            list(_pending(requests, there))


def test_replies_go_to_a_file_and_to_nothing_else(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for none in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(privinf.ConfigError, match="it is no file"):
            Replies(none, {}).__enter__()


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (["{"], "line 1 is no JSON"),
        ([{"prompt": "ab"}, "[]"], "line 2 is no JSON object"),
        ([{"text": "ab"}], "line 1 has no prompt"),
        ([{"custom_id": "2", "prompt": "ab"}, {"prompt": "ab"}], "line 2 has a custom_id that an earlier line has"),
        ([{"custom_id": 7, "prompt": "ab"}], "custom_id that is no text"),
        ([{"custom_id": "\ud800", "prompt": "ab"}], "custom_id that is no text"),
        (['{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"], "line 1 is nested too deeply"),
        ([{"url": "/v1/embeddings", "body": {"prompt": "ab"}}], "asks for something else"),
        ([], "has no request"),
    ],
)
def test_a_file_that_is_none_is_refused_before_anything_is_asked(tmp_path: Path, lines: list[Any], what: str) -> None:
    source = written(tmp_path / "in.jsonl", lines)
    with pytest.raises(privinf.ConfigError, match=what) as caught:
        privinf.batch(source, tmp_path / "out.jsonl", server="localhost:1", dealer="localhost:1", keys="nowhere")
    assert not (tmp_path / "out.jsonl").exists() and '"ab"' not in str(caught.value)


def test_replies_of_another_job_stay_as_they_are(parties: Trio, tmp_path: Path) -> None:
    source, output = written(tmp_path / "in.jsonl", [{"prompt": "ab"}, {"prompt": "cd"}]), tmp_path / "out.jsonl"
    ask(parties, source, output)
    before = output.read_bytes()
    written(source, [{"prompt": "ef"}, {"prompt": "cd"}])
    with pytest.raises(privinf.ConfigError, match=r"line \d is no reply to one of these requests"):
        ask(parties, source, output)
    written(source, [{"prompt": "ab"}, {"prompt": "cd"}, {"prompt": "ef"}])
    output.write_bytes(before.replace(b'"model": "', b'"model": "0'))
    with pytest.raises(privinf.ConfigError, match="of another model"):
        ask(parties, source, output)
    output.write_bytes(before)
    assert ask(parties, source, output)["before"] == 2 and len(replies(output)) == 3


def test_one_job_at_a_time_writes_a_file(tmp_path: Path) -> None:
    requests = Requests(written(tmp_path / "in.jsonl", [{"prompt": "ab"}]))
    with Replies(tmp_path / "out.jsonl", requests.check()), pytest.raises(privinf.ConfigError, match="another job writes"):
        Replies(tmp_path / "out.jsonl", requests.check()).__enter__()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    requests, output = Requests(written(tmp_path / "in.jsonl", [{"prompt": "ab"}, {"prompt": "cd"}])), tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Replies(output, requests.check()) as there:
            there.add("1", 200, {"model": "m"})
            whole = output.read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, hard))
            with pytest.raises(privinf.ConfigError, match=f"cannot write {output}"):
                there.add("2", 200, {"model": "m"})
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))  # there is room again before the file is closed
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert output.read_bytes() == whole
    with Replies(output, requests.check()) as there:
        assert there.done == {"1"} and there.model == "m"
        there.add("2", 200, {"model": "m"})
    assert len(replies(output)) == 2


@pytest.mark.parametrize("what", ["the only copy of it", '{"prompt": "ab"}', '{"id": "batch_req_', '{"id": 7}'])
def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path, what: str) -> None:
    """Also one whose last line has no end, as what is left of a job that was killed: that alone is cut off, and zeros after it."""
    wanted, output = {"1": "a", "2": "b"}, tmp_path / "out.jsonl"
    output.write_text(what)
    with pytest.raises(privinf.ConfigError, match="line 1 is no reply to one of these requests"), Replies(output, wanted):
        pass
    assert output.read_text() == what
    output.unlink()
    with Replies(output, wanted) as there:
        there.add("2", 200, {"model": "m"})
        whole = output.read_bytes()
        there.add("1", 200, {"model": "m"})
    both = output.read_bytes()
    for end in (b"", both[len(whole) : -1], both[len(whole) : len(whole) + 9], both[len(whole) : len(whole) + 30] + bytes(50), bytes(9)):
        output.write_bytes(whole + end)
        with Replies(output, wanted) as there:
            assert there.done == {"2"} and output.read_bytes() == whole
    output.write_bytes(whole[:-1].replace(b", ", b",  ", 1))
    with pytest.raises(privinf.ConfigError, match="line 1 is no reply"), Replies(output, wanted):
        pass


def test_a_server_that_is_away_is_waited_for_no_longer_than_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = written(tmp_path / "in.jsonl", [{"prompt": "ab"}])
    options = privinf.Options(connect_timeout=0.2, cache=tmp_path)
    where: dict[str, Any] = {"server": "127.0.0.1:1", "dealer": "127.0.0.1:1", "keys": str(keys()), "options": options}
    with pytest.raises(privinf.PeerUnreachableError):
        privinf.batch(source, tmp_path / "out.jsonl", **where, patience=1.5)
    assert os.path.getsize(tmp_path / "out.jsonl") == 0
    assert len([line for line in caplog.messages if "trying again" in line]) == 2, "why it is dialled again, and that the job waits"


def test_a_job_whose_dealer_is_away_says_so_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Several sessions, and one line: the server refuses for want of its dealer, which comes back."""
    source = written(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS[:6]])
    with trio(cache=tmp_path, connect_timeout=0.5) as parties:
        address, again = parties.dealer.address, list[DealerService]()
        parties.dealer.close()

        def back(record: logging.LogRecord) -> bool:
            if "cannot reach its dealer" in record.getMessage() and not again:
                again.append(DealerService(listen=address, keys=str(keys()), options=parties.dealer.options).start())
            return True

        log = logging.getLogger("privinf.jobs")
        log.addFilter(back)
        try:
            counts = ask(parties, source, tmp_path / "out.jsonl", sessions=3)
        finally:
            log.removeFilter(back)
            for dealer in again:
                dealer.close()
    assert (counts["answered"], counts["failed"]) == (6, 0)
    assert len([line for line in caplog.messages if "cannot reach its dealer" in line and "trying again" in line]) == 1
