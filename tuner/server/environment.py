"""The environment a server gets: a short list of what it needs from ours, and what the config says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# fmt: off
_NAMES = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "CUDA_HOME", "CUDA_PATH", "CUDA_DEVICE_ORDER", "VLLM_CACHE_ROOT",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "HUGGING_FACE_HUB_TOKEN",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION",
    "AWS_ENDPOINT_URL",
})
# fmt: on
_PREFIXES = ("LC_", "HF_", "NVIDIA_", "NCCL_", "UCX_")
# These change what a server does; taken from a shell they would be part of the result and of no record.
_TELLING = ("VLLM_", "SGLANG_", "SGL_", "OMP_", "KMP_", "MKL_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_")
# scikit-learn sets these in our own process when it is imported; nobody asked a server for them.
_OUR_LIBRARIES = frozenset({"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"})


def server_environment(
    wanted: Mapping[str, str], *, temporary: Path, program: str = "", ours: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The whole environment of a server: the allowed part of ``ours`` (this process's), then ``wanted`` over it.

    ``temporary`` becomes ``TMPDIR``; the folder of ``program`` (an interpreter) leads ``PATH``, for the compilers that
    live beside it.
    """
    ours = os.environ if ours is None else ours
    env = {name: value for name, value in ours.items() if name in _NAMES or name.startswith(_PREFIXES)}
    env.setdefault("PATH", os.defpath)
    if os.sep in program:
        env["PATH"] = f"{Path(program).parent}{os.pathsep}{env['PATH']}"
    local = [name for name in (env.get("NO_PROXY") or env.get("no_proxy") or "").split(",") if name]
    env["NO_PROXY"] = env["no_proxy"] = ",".join([*local, "127.0.0.1", "localhost"])
    # SPT_NOENV: process titles must not overwrite the environment, where the launch's marker is read from.
    env |= {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "SPT_NOENV": "1"}
    return env | dict(wanted)


def not_passed(wanted: Mapping[str, str], ours: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Variables of ours that would change the server and are not handed on; to be named to the user once."""
    ours = os.environ if ours is None else ours
    known = _NAMES | _OUR_LIBRARIES | wanted.keys()
    return tuple(sorted(name for name in ours if name.startswith(_TELLING) and name not in known))
