"""The process in which a chat template runs, which is a program of the server's: `python -m privinf.gateway.template SECONDS`.

It gets frames on stdin and answers each on stdout (4 bytes of length, then JSON), once it has said that it is ready: first the template
and the words that it is given, then chats. It has Jinja's sandbox, little memory, little processor time for each frame, and can open
nothing: no file, no socket. It loads none of the rest of the package, to start quickly. Whoever started it ends it at its deadline.
"""

from __future__ import annotations

import ctypes
import datetime
import html
import json
import pprint
import resource
import sys
import textwrap
import time
from typing import IO, Any, NoReturn

from jinja2 import Template, TemplateError, constants, debug
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 1 << 20
MAX_FRAME = 16 << 20
"""More than a body of HTTP may have, and than a prompt has in JSON."""
MEMORY = 512 << 20
"""Address space, of which the interpreter and its libraries take a few dozen MiB."""
FAULTS = {"long": f"its text is longer than {MAX_CHARS} characters", "memory": "it needs too much memory", "deep": "it goes too deep"}
"""What may be said of a failure: nothing in the template's own words."""

PR_SET_DUMPABLE = 4  # of Linux's prctl.h

LOADED = constants, debug, html, pprint, textwrap
"""What Jinja would load when a template first needs it, and can load no longer once the process is confined."""


def write_frame(stream: IO[bytes], value: Any) -> None:
    """One frame; the ends of the pipe are its only readers."""
    body = json.dumps(value).encode()  # in ASCII, so that whatever a text holds can be written
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any:
    """The next frame; EOFError at the end, or where what comes is no frame."""
    head = stream.read(4)
    length = int.from_bytes(head, "big")
    if len(head) < 4 or length > MAX_FRAME or len(body := stream.read(length)) < length:
        raise EOFError
    return json.loads(body)


class TooLong(Exception):
    """The prompt."""


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def compiled(source: str) -> Template:
    """With what templates of other runtimes expect to find."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def rendered(template: Template, words: dict[str, str], messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    """The prompt; ended as soon as it is too long."""
    pieces, length = [], 0
    for piece in template.generate(messages=messages, tools=tools, add_generation_prompt=True, **words):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_CHARS:
            raise TooLong
    return "".join(pieces)


def hide() -> None:
    """No other process of this user may look into this one, which has the chats; where the kernel is not Linux, that stays as it is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def confine(seconds: int) -> None:
    """From now on nothing can be opened, written but to the pipes, started or kept after a crash, and a frame may take this much time."""
    none = (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
    for what, most in ((resource.RLIMIT_AS, MEMORY), *((each, 0) for each in none)):
        resource.setrlimit(what, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, resource.RLIM_INFINITY))


def main(seconds: int) -> None:
    """Serves until stdin ends."""
    hide()
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    template: Template | None = None
    words: dict[str, str] = {}
    compiled("{% for m in messages %}{{ m.role | trim }}{% endfor %}{{ strftime_now('%Y') }}").render(messages=[{"role": "x"}])
    write_frame(answers, {"text": "ready"})
    while True:
        confine(seconds)
        try:
            request = read_frame(source)
            if template is None:
                template, words = compiled(request["template"]), request["words"]
                answer = {"text": ""}
            else:
                answer = {"text": rendered(template, words, request["messages"], request.get("tools"))}
        except EOFError:
            return
        except TooLong:
            answer = {"failed": "long"}
        except TemplateError as error:
            answer = {"refused": str(error)[:300]}
        except MemoryError:
            answer = {"failed": "memory"}
        except RecursionError:
            answer = {"failed": "deep"}
        except Exception as error:
            answer = {"refused": type(error).__name__}
        write_frame(answers, answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
