"""Rules of the house that can be read off the sources."""

import ast
from pathlib import Path

import pytest

SOURCES = sorted(Path(__file__).parents[1].glob("tuner/**/*.py"))


def runs_text(node: ast.AST) -> bool:
    """Whether ``node`` is a call that may run text as code, or as a command of a shell."""
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    if called in ("eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput"):
        return True
    return any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords)


@pytest.mark.parametrize("text", ["eval(expression)", "os.system(word)", "subprocess.run(words, shell=True)"])
def test_what_runs_text_is_seen(text):
    assert any(map(runs_text, ast.walk(ast.parse(text))))


def test_nothing_that_a_user_writes_is_run_as_code_or_by_a_shell():
    found = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if runs_text(node) and isinstance(node, ast.Call)
    ]
    assert len(SOURCES) > 100 and not found
