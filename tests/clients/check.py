"""Large clients of OpenAI's interface against the gateway: `python -m tests.clients.check URL`, in an environment of their own.

    pip install openai langchain-openai litellm "lm-eval[api]"

URL is a gateway's with the shipped model, whose server grants logits (`privinf gateway --demo models/pylib`); PRIVINF_API_KEY its key. Each
client says the greedy reply that the official one gets, and lm-evaluation-harness scores a task of eight questions of Python, whose
log-likelihoods are held against the float model's. One line each; any difference ends it. Not a test: the clients are not installed there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "pylib"
PROMPT, NEW = "def read_lines(path):\n", 6
QUESTIONS = [  # what comes next, the right one first
    ("for i in", " range(10):", " while True:"),
    ("import", " os", " return"),
    ("def f(self", "):", "]"),
    ("if x is not", " None:", " def"),
    ("try:\n    pass\nexcept", " ValueError:", " import"),
    ("class A(object", "):", "}"),
    ("return self.", "name", "import"),
    ("with open(path) as", " f:", " 1:"),
]
ERROR = 0.15
"""Nats, of a continuation of a few tokens: logits are rounded to 2^-10, and come of fixed-point values."""


def client(name: str) -> Any:
    """A library that this environment has, and the project's has not."""
    return importlib.import_module(name)


def with_openai(url: str, key: str) -> str:
    """The greedy reply, by the official client, which all others are to get."""
    openai = client("openai").OpenAI(base_url=f"{url}/v1", api_key=key)
    whole = openai.completions.create(model="privinf", prompt=PROMPT, max_tokens=NEW).choices[0].text
    stream = openai.completions.create(model="privinf", prompt=PROMPT, max_tokens=NEW, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == whole
    chat = openai.chat.completions.create(model="privinf", messages=[{"role": "user", "content": PROMPT}], max_tokens=NEW)
    said = openai.responses.create(model="privinf", input=PROMPT, max_output_tokens=NEW)
    assert said.output_text == chat.choices[0].message.content
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"n": {"enum": [1, 2]}}}}}
    made = openai.chat.completions.create(
        model="privinf", messages=[{"role": "user", "content": PROMPT}], max_tokens=24, response_format=form
    )
    json.loads(made.choices[0].message.content)
    return str(whole)


def with_langchain(url: str, key: str, expected: str) -> None:
    """`invoke`, `batch` and `stream` of its completions and chats."""
    made = client("langchain_openai")
    about: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": key, "model": "privinf", "max_tokens": NEW, "temperature": 0}
    model = made.OpenAI(**about)
    assert model.invoke(PROMPT) == expected and model.batch([PROMPT, PROMPT]) == [expected] * 2
    assert "".join(model.stream(PROMPT)) == expected
    chat = made.ChatOpenAI(**about)
    whole = chat.invoke("x = ").content
    assert [each.content for each in chat.batch(["x = ", "x = "])] == [whole] * 2
    assert "".join(piece.content for piece in chat.stream("x = ")) == whole


def with_litellm(url: str, key: str, expected: str) -> None:
    """Its completions of text and of chats, and a stream."""
    litellm = client("litellm")
    about: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": key, "max_tokens": NEW, "temperature": 0}
    found = litellm.text_completion(model="text-completion-openai/privinf", prompt=PROMPT, **about)
    assert found.choices[0].text == expected
    messages = [{"role": "user", "content": "x = "}]
    whole = litellm.completion(model="openai/privinf", messages=messages, **about).choices[0].message.content
    stream = litellm.completion(model="openai/privinf", messages=messages, stream=True, **about)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == whole


def with_lm_eval(url: str, key: str, place: Path) -> str:
    """A multiple-choice task, by `local-completions`: the accuracy, and the log-likelihoods against the float model's."""
    lm_eval = client("lm_eval")
    os.environ["OPENAI_API_KEY"] = key
    tokenizer = place / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}')
    lines = [{"question": question, "choices": list(choices), "gold": 0} for question, *choices in QUESTIONS]
    (place / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "python_next",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "task.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (place / "task.json").write_text(json.dumps(task))  # JSON is YAML
    about = (
        f"model=privinf,base_url={url}/v1/completions,tokenizer={tokenizer},tokenizer_backend=huggingface,num_concurrent=2,max_length=256"
    )
    found = lm_eval.simple_evaluate(model="local-completions", model_args=about, tasks=[task], batch_size=4, bootstrap_iters=0)
    (samples,) = found["samples"].values()
    largest = 0.0
    for sample in samples:
        for choice, ((value, _),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            largest = max(largest, abs(float(value) - _float(sample["doc"]["question"], choice)))
    assert largest < ERROR, largest
    accuracy = found["results"]["python_next"]["acc,none"]
    return f"accuracy {accuracy:g} on {len(samples)} questions, log-likelihoods within {largest:.3f} nats of float"


def _float(question: str, choice: str) -> float:
    """The float model's log-likelihood of a choice after a question."""
    import torch
    from tokenizers import Tokenizer

    from privinf.models.checkpoint import load_checkpoint

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    before, ids = len(tokenizer.encode(question).ids), tokenizer.encode(question + choice).ids
    with torch.no_grad():
        rows = torch.log_softmax(load_checkpoint(MODEL)[0](torch.tensor([ids]))[0].double(), -1)
    return sum(float(rows[place - 1, ids[place]]) for place in range(before, len(ids)))


def main(url: str) -> None:
    """All of them, a line each."""
    key, expected = os.environ["PRIVINF_API_KEY"], ""

    def told(name: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        found = work()
        version = importlib.metadata.version(name)
        print(f"{name} {version}: {found if name == 'lm-eval' else 'well'}, {time.monotonic() - began:.0f} s", flush=True)
        return found

    expected = told("openai", lambda: with_openai(url, key))
    told("langchain-openai", lambda: with_langchain(url, key, expected))
    told("litellm", lambda: with_litellm(url, key, expected))
    with tempfile.TemporaryDirectory() as place:
        told("lm-eval", lambda: with_lm_eval(url, key, Path(place)))


if __name__ == "__main__":
    main(sys.argv[1])
