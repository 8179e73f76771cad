"""Chat templates, rendered in a process of their own that is ended at a deadline (see `template.py`, which is what runs there)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from privinf.gateway.template import FAULTS, MAX_CHARS, read_frame, write_frame
from privinf.gateway.waits import Full
from protocols.errors import Code, ConfigError, PrivinfError

START_S = 60.0
"""How long an interpreter may take to start on a busy machine; before it has, nothing of the template's runs."""
RENDER_S = 5.0
"""How long a template may take to be read, and for each chat: far more than one needs that only writes a chat down."""
log = logging.getLogger("privinf.gateway")


class TemplateFault(PrivinfError):
    """A chat template that did not end, or grew too large: no fault of the chat's."""

    code = Code.TEMPLATE


class Renderer:
    """One template, for one chat at a time; up to `most` callers may wait. A process that was ended is replaced at the next chat.

    ConfigError where the template is none.
    """

    def __init__(self, source: str, words: dict[str, str], *, most: int = 20) -> None:
        self._setup = {"template": source, "words": words}
        self._most = most
        self._process: subprocess.Popen[bytes] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="privinf-template")  # its own: what waits here holds up nothing else
        self._waiting = 0
        try:
            self._pool.submit(self._started).result()
        except (ConfigError, TemplateFault) as error:
            self.close()
            raise ConfigError(f"the chat template cannot be used: {error.message}", remedy="give another one by --chat-template") from None

    async def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """The prompt; ConfigError where the template refuses the chat, TemplateFault where it fails, Full where too many wait."""
        if self._waiting >= self._most:
            raise Full(f"{self._waiting} chats wait for the chat template", math.ceil(RENDER_S))
        self._waiting += 1
        try:
            return await asyncio.wrap_future(self._pool.submit(self._render, {"messages": messages, "tools": tools or None}))
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Ends the process, also while it renders."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if (process := self._process) is not None:
            process.kill()
        self._pool.shutdown()
        self._end()

    # ---- in the pool's thread

    def _render(self, request: dict[str, Any]) -> str:
        return self._ask(self._started(), request, RENDER_S)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "privinf.gateway.template", str(math.ceil(RENDER_S))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what a crash prints may show the chat
                env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **{k: v for k, v in os.environ.items() if k == "TZ"}},
                start_new_session=True,  # Ctrl-C reaches the one who started it, who then ends it
            )
            self._ask(process, None, START_S)
            self._ask(process, self._setup, RENDER_S)
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], request: dict[str, Any] | None, seconds: float) -> str:
        """The text that the process answers. It is ended at the deadline, which ends whatever waits for it here."""
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            if request is not None:
                write_frame(process.stdin, request)
            answer = read_frame(process.stdout)
        except (OSError, EOFError, ValueError, RecursionError):
            answer = None
        finally:
            timer.cancel()
            timer.join()
        if late.is_set():  # it may have answered just before: the next chat needs another one all the same
            self._end()
        told: dict[str, Any] = answer if isinstance(answer, dict) else {}
        if isinstance(text := told.get("text"), str) and len(text) <= MAX_CHARS:
            return text
        if isinstance(why := told.get("refused"), str):
            raise ConfigError(f"the model's chat template refuses this chat: {''.join(c if c.isprintable() else ' ' for c in why[:300])}")
        self._end()
        what = FAULTS.get(told.get("failed", ""), f"it was ended after {seconds:g} s" if late.is_set() else "its process ended")
        log.warning("a chat template failed: %s", what)
        raise TemplateFault(f"the model's chat template failed: {what}", remedy="give the gateway another one by --chat-template")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was still to be written to it
                    pipe.close()  # type: ignore[union-attr]
