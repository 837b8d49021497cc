"""What the documents say is so: their examples run, the files and scripts that they name are there."""

import ast
import re

import pytest
import torch

import model
from model import GPT, NORMALIZERS, GPTConfig, attention_rows
from tests.helpers import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/README.md")])
FOLDERS = ("benchmarks", "configs", "docs", "harness", "kernels", "measure", "scripts", "tests")
MADE_BY_HAND = re.compile(r"[<…{]|NAME|CONFIG")  # out/<run>/…: a pattern, not a path


def fences(text: str, language: str = "") -> list[str]:
    """The contents of the fenced blocks of a language; of all, without one."""
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in ("", name)]


def named_paths(text: str) -> set[str]:
    """The words in code spans and code blocks that look like paths in this repository."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    words = {word.strip("',;:()").removeprefix("./") for code in (*spans, *fences(text)) for word in code.split()}
    at_root = re.compile(r"[\w-]+\.(py|sh|md|cff|toml|txt)")  # data/ holds a user's own corpora too
    in_folder = re.compile(rf"({'|'.join(FOLDERS)})/.*|data/\S+\.py")
    return {w for w in words if (at_root.fullmatch(w) or in_folder.fullmatch(w)) and not MADE_BY_HAND.search(w)}


def example_of_a_normalizer() -> str:
    page = (ROOT / "docs/architecture.md").read_text()
    (code,) = [code for code in fences(page, "python") if "NORMALIZERS[" in code]
    return code


@pytest.fixture
def softplus(monkeypatch) -> str:
    """The name of the normalizer that docs/architecture.md adds, which the table holds during this test."""
    monkeypatch.setitem(NORMALIZERS, "softplus", NORMALIZERS["softmax"])  # so that the entry goes away again
    exec(example_of_a_normalizer(), dict(vars(model)))  # as if it stood in model.py
    return "softplus"


def test_the_example_of_a_normalizer_is_softplus_attention(softplus):
    q, k = torch.randn(2, 1, 2, 64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    P, null = attention_rows(q, k, normalizer=softplus)
    expected = (1 + (q @ k.mT / 8**0.5).exp()).log().tril()
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(P, expected, rtol=64 * torch.finfo(P.dtype).eps, atol=0)  # a sum of up to 64 terms
    assert null is None


def test_a_model_runs_with_the_example(softplus):
    shape = {"block_size": 64, "vocab_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    idx = torch.arange(64)[None] % 32
    losses = {}
    for name in (softplus, "softmax"):
        torch.manual_seed(0)
        losses[name] = GPT(GPTConfig(**shape, normalizer=name))(idx, idx.roll(-1, 1))[1]
    assert losses[softplus].isfinite()
    assert losses[softplus] != losses["softmax"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_is_there(page):
    missing = [path for path in sorted(named_paths(page.read_text())) if not [*ROOT.glob(path.rstrip("/"))]]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page):
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_an_example_imports_can_be_imported(page):
    for code in fences(page.read_text(), "python"):
        for statement in ast.parse(code).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                exec(ast.unparse(statement), {})


def test_every_script_is_documented():
    text = (ROOT / "docs/diagnostics.md").read_text() + (ROOT / "README.md").read_text()
    missing = [path.name for path in ROOT.glob("scripts/*.py") if path.name not in text]
    assert not missing


def test_every_module_has_a_line_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text()
    modules = [path for floor in ("kernels", "measure", "harness") for path in (ROOT / floor).glob("*.py")]
    missing = [name for path in modules if (name := str(path.relative_to(ROOT))) not in text and "__" not in name]
    assert not missing


def test_the_tests_of_paths_see_them():
    text = "`scripts/none.py --help`, `none.py`, `out/<run>/ckpt.pt`\n```sh\n./none.sh configs/none_*.yaml\n```\n"
    assert named_paths(text) == {"scripts/none.py", "none.py", "none.sh", "configs/none_*.yaml"}
