"""The emulator's log: the lines that vLLM 0.32 prints, with its prefixes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

VERSION = "0.32.0"


class Console:
    """Writes log lines to stdout as vLLM does; ``who`` is the process that vLLM would have had for it."""

    def line(self, text: str, source: str = "launcher.py:186", who: str = "APIServer", level: str = "INFO") -> None:
        """One record; a text of several lines repeats its prefix, as vLLM's formatter does."""
        stamp = time.strftime("%m-%d %H:%M:%S")
        prefix = f"({who} pid={os.getpid()}) {level} {stamp} [{source}] "
        self.raw("\n".join(prefix + part for part in text.split("\n")))

    def error(self, text: str, source: str, who: str = "EngineCore") -> None:
        """An error record."""
        self.line(text, source, who, "ERROR")

    def raw(self, text: str) -> None:
        """Text as it is."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def banner(self, model: str, arguments: Mapping[str, object]) -> None:
        """What vLLM prints first."""
        self.line(
            "\n"
            "       █     █     █▄   ▄█\n"
            f" ▄▄ ▄█ █     █     █ ▀▄▀ █  version {VERSION} (emulated by tuner: no model, no GPU)\n"
            f"  █▄█▀ █     █     █     █  model   {model}\n"
            "   ▀▀  ▀▀▀▀▀ ▀▀▀▀▀ ▀     ▀\n",
            "api_utils.py:347",
        )
        self.line(f"non-default args: {arguments}", "api_utils.py:286")

    def engine_failed(self, error: str, frames: tuple[str, ...]) -> None:
        """The engine core's last words while it starts, then the API server's; ``error`` is ``Kind: text``."""
        source = "core.py:1510"
        self.error("EngineCore failed to start.", source)
        self.error("\n".join(["Traceback (most recent call last):", *map(_frame, frames), error]), source)
        self.raw(f"(EngineCore pid={os.getpid()}) Process EngineCore:")
        self.raw(f"(EngineCore pid={os.getpid()}) {error}")
        self.server_failed(
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
            ("entrypoints/openai/api_server.py", "v1/engine/utils.py"),
        )

    def server_failed(self, error: str, frames: tuple[str, ...]) -> None:
        """The API server's traceback, which vLLM leaves to the interpreter."""
        who = f"(APIServer pid={os.getpid()}) "
        lines = ["Traceback (most recent call last):", *map(_frame, frames), error]
        self.raw("\n".join(who + part for line in lines for part in line.split("\n")))

    def engine_died(self, error: str) -> None:
        """An engine core that dies under load, and what the API server then says."""
        self.error("EngineCore encountered a fatal error.", "core.py:1512")
        if error:
            frames = ("v1/engine/core.py", "v1/worker/gpu_model_runner.py")
            self.error("\n".join(["Traceback (most recent call last):", *map(_frame, frames), error]), "core.py:1512")
        self.error("AsyncLLM output_handler failed.", "async_llm.py:906", "APIServer")
        self.error(
            "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for "
            "the root cause.",
            "async_llm.py:906",
            "APIServer",
        )


def _frame(path: str) -> str:
    return f'  File "/site-packages/vllm/{path}", line 1, in run\n    return run()'
