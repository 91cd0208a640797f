"""Documentation that cannot go stale: every Python block runs, every link leads somewhere, every quoted error exists.

The blocks of a page run in order, in one namespace, in an empty folder. A block that cannot run here says so, and why:
```python no-run: the reason
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moelora.testing import tiny

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
INFO = re.compile(r"python( no-run: .{10,})?")


class Block(NamedTuple):
    """A block of Python on a page: its first line's number, its text, and whether it runs."""

    line: int
    code: str
    runs: bool


def blocks_of(page: str) -> list[Block]:
    """The Python blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["info"].startswith("python"):
            info = INFO.fullmatch(match["info"])
            assert info, f"{page}: ```{match['info']}; expected ```python, or ```python no-run: and the reason"
            runs = info[1] is None
            found.append(Block(text.count("\n", 0, match.start()) + 2, match["code"], runs))
    return found


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated",  # the name that all our releases of transformers know
    "ignore:Use 'content=<...>':DeprecationWarning",  # the hub client and its HTTP library
)
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks_of(page))])
def test_every_block_runs(page, tmp_path, monkeypatch):
    """As a reader would run it, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    if page == "README.md":
        # the first screen speaks of a base and adapters that a user has
        model = tiny.model("llama")
        model.save_pretrained("base")
        for seed, name in enumerate(["math-lora", "code-lora", "law-lora"]):
            tiny.adapter(model, name, seed=seed)
        namespace |= {"base": "./base", "inputs": tiny.inputs(model)}
    torch.manual_seed(0)

    for block in blocks_of(page):
        if block.runs:
            # empty lines in front, so that a traceback shows the page's own line numbers
            code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
            exec(code, namespace)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_python(page):
    """Also those that do not run here."""
    for block in blocks_of(page):
        compile(block.code, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """Links between pages name files and headings that exist."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page} links to {target}; {name} has {sorted(anchors)}"


def messages() -> str:
    """Every string of the package, one a line, with … for the values in it."""
    found = []
    for path in (ROOT / "moelora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
    return "\n".join(found)


def test_the_errors_of_the_troubleshooting_page_exist():
    """Each heading quotes a message as it stands in the code."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    known = messages()

    assert len(quoted) > 20
    assert [message for message in quoted if message not in known] == []


def test_every_page_is_short_and_reachable():
    """A page is read in a few minutes, and the README or another page leads to it."""
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    for page, text in texts.items():
        assert len(text.splitlines()) <= 200, page
        assert all(len(line) <= 200 or line.startswith("|") for line in text.splitlines()), page
    linked = {Path(link).name for text in texts.values() for link in re.findall(r"\]\(([^)#\s]+\.md)", text)}
    assert {Path(page).name for page in PAGES} - linked - {"README.md", "index.md"} == set()
