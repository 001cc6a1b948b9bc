"""The README runs: its blocks in order, in one fresh directory, the Python ones sharing their names.

Every `python` block runs, and every `bash` block under a `<!-- tested -->` line. A block under a
`<!-- not tested: reason -->` line does not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
FENCE = re.compile(
    r"(?:^<!--\ *(?P<note>[^\n]*?)\ *-->[\ ]*\n(?:[\ ]*\n)?)?"
    r"^(?P<ticks>`{3,})(?P<language>[a-z]*)[^\n]*\n(?P<code>.*?)^(?P=ticks)[\ ]*$",
    re.MULTILINE | re.DOTALL,
)
SECONDS_PER_SHELL_BLOCK = 600


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    note: str

    @property
    def runs(self) -> bool:
        if re.match(r"not tested:\s*\S", self.note):
            return False
        return self.language == "python" or (self.language == "bash" and self.note == "tested")


def blocks(text: str) -> list[Block]:
    """Every fenced block of a Markdown text, with the comment right above it and the line its code starts at."""
    return [
        Block(
            match["language"],
            match["code"],
            text.count("\n", 0, match.start("code")) + 1,
            (match["note"] or "").strip(),
        )
        for match in FENCE.finditer(text)
    ]


def run_python(block: Block, names: dict[str, Any], path: Path) -> None:
    code = "\n" * (block.line - 1) + block.code
    exec(compile(code, str(path), "exec"), names)


def run_bash(block: Block, directory: Path, environment: dict[str, str], path: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=directory,
        env=environment,
        text=True,
        capture_output=True,
        timeout=SECONDS_PER_SHELL_BLOCK,
    )
    assert done.returncode == 0, (
        f"{path.name}:{block.line}: exit code {done.returncode}\n{block.code}\n{done.stdout}\n{done.stderr}"
    )


def run(path: Path, directory: Path, environment: dict[str, str]) -> int:
    """Runs the blocks of a Markdown file in `directory`, which is the working directory already; how many ran."""
    tested = [block for block in blocks(path.read_text(encoding="utf-8")) if block.runs]
    names: dict[str, Any] = {"__name__": "__readme__"}
    for block in tested:
        if block.language == "python":
            run_python(block, names, path)
        else:
            run_bash(block, directory, environment, path)
    return len(tested)


@pytest.fixture
def shell(tmp_path_factory: pytest.TempPathFactory, source_environment: dict[str, str]) -> dict[str, str]:
    """An environment in which `python` is this one and `trimtab` is this checkout's command."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "trimtab"
    call = "import sys; from trimtab.cli.main import main; sys.exit(main())"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{call}" "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**source_environment, "PATH": path}


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, shell: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not README.exists():
        pytest.skip("there is no README.md yet")
    monkeypatch.chdir(tmp_path)
    assert run(README, tmp_path, shell) > 0, "no block of README.md is tested"


EXAMPLE = """
# Title
```python
value = 41
```
text
```bash
exit 1
```
<!-- not tested: needs a network -->
```python
raise SystemExit("not reached")
```
<!-- tested -->
```bash
python -c "print(1)" > made.txt
```
```python
assert open("made.txt").read() == "1\\n"
value += 1
```
```json
{}
```
"""


def test_blocks_run_in_order_and_share_their_names(
    tmp_path: Path, shell: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(EXAMPLE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert [block.line for block in blocks(EXAMPLE)] == [4, 8, 12, 16, 19, 23]
    assert run(page, tmp_path, shell) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nassert False\n```\n", AssertionError),
        ("```python\nundefined\n```\n", NameError),
        ("<!-- tested -->\n```bash\nfalse | true\n```\n", AssertionError),
    ],
)
def test_a_block_that_fails_is_a_failure(
    text: str,
    expected: type[Exception],
    tmp_path: Path,
    shell: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(expected):
        run(page, tmp_path, shell)
