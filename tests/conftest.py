import os
from pathlib import Path

import pytest
from hypothesis import settings

from harness.tokenizer import GPT2

# A slow machine is no failure: deadlines would test the machine, not the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

CACHE = Path(__file__).parents[2] / "shared" / "data" / "tiktoken_cache"
if CACHE.is_dir():  # for every test and every command that one starts, in whatever order they run
    os.environ["TIKTOKEN_CACHE_DIR"] = str(CACHE)


@pytest.fixture(scope="session")
def gpt2() -> GPT2:
    if not CACHE.is_dir():
        pytest.skip(f"{CACHE} is absent: it holds GPT-2's tokenizer file")
    return GPT2()
