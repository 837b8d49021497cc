import os
from pathlib import Path

import pytest
from hypothesis import settings

from harness.tokenizer import GPT2
from tests.helpers import SHARED, squares_corpus

# A slow machine is no failure: deadlines would test the machine, not the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

CACHE = SHARED / "tiktoken_cache"
if CACHE.is_dir():  # for every test and every command that one starts, in whatever order they run
    os.environ["TIKTOKEN_CACHE_DIR"] = str(CACHE)


@pytest.fixture(scope="session")
def gpt2() -> GPT2:
    if not CACHE.is_dir():
        pytest.skip(f"{CACHE} is absent: it holds GPT-2's tokenizer file")
    return GPT2()


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
