"""The key that servers ask for, where it must be the same at every launch."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def kept_key(folder: Path) -> str:
    """This user's key, made once and kept in ``folder`` where only the user reads it.

    vLLM 0.25 to 0.28 takes ``VLLM_API_KEY`` into the key of its compile cache (``vllm.envs.compile_factors``): with a
    new one per launch nothing that was compiled is ever found again. Where no file can be kept, it is new each time.
    """
    path = folder / "server-key"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            handle = os.open(path.with_suffix(f".{os.getpid()}"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(handle, secrets.token_hex(24).encode())
                os.link(path.with_suffix(f".{os.getpid()}"), path)  # whole or not at all, and the first one stays
            finally:
                os.close(handle)
                path.with_suffix(f".{os.getpid()}").unlink()
        if key := path.read_text(encoding="ascii").strip():
            return key
    return secrets.token_hex(24)
