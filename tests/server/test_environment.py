"""A server gets what it needs of our environment and nothing that changes it behind the study's back."""

from pathlib import Path

from tuner.server.environment import not_passed, server_environment

OURS = {
    "PATH": "/bin",
    "HOME": "/home/me",
    "HF_TOKEN": "secret",
    "VLLM_ATTENTION_BACKEND": "X",
    "OMP_NUM_THREADS": "4",
    "PYTHONPATH": "/evil",
    "AWS_REGION": "eu",
    "MY_PASSWORD": "p",
    "NO_PROXY": "internal",
    "TMPDIR": "/scratch",
}


def made(wanted: dict[str, str], program: str = "python") -> dict[str, str]:
    return server_environment(wanted, temporary=Path("/run/t"), program=program, ours=OURS)


def test_only_the_allowed_part_is_inherited():
    env = made({})
    assert {name for name in OURS if name in env} == {"PATH", "HOME", "HF_TOKEN", "AWS_REGION", "NO_PROXY", "TMPDIR"}


def test_what_the_config_says_wins():
    assert made({"OMP_NUM_THREADS": "2", "HOME": "/tmp"})["OMP_NUM_THREADS"] == "2"
    assert made({"HOME": "/elsewhere"})["HOME"] == "/elsewhere"


def test_temporary_files_go_where_they_are_removed():
    assert made({})["TMPDIR"] == "/run/t"


def test_this_machine_is_never_reached_through_a_proxy():
    assert made({})["NO_PROXY"] == made({})["no_proxy"] == "internal,127.0.0.1,localhost"


def test_the_compilers_beside_an_interpreter_are_found():
    assert made({}, "/venv/bin/python")["PATH"] == "/venv/bin:/bin"
    assert made({}, "vllm")["PATH"] == "/bin"


def test_what_would_change_a_server_and_is_not_passed_is_named():
    assert not_passed({}, OURS) == ("OMP_NUM_THREADS", "VLLM_ATTENTION_BACKEND")
    assert not_passed({"OMP_NUM_THREADS": "2"}, OURS) == ("VLLM_ATTENTION_BACKEND",)
    assert not_passed({}, {"KMP_DUPLICATE_LIB_OK": "True"}) == ()  # scikit-learn's, in our own process
