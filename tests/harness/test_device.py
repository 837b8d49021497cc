"""A device and a dtype that are there, or one line that says which are."""

import re

import pytest
import torch

from harness.device import choose_compile, choose_device, choose_dtype, deterministic_cost, peak_flops, peak_memory
from harness.errors import UserError
from tests.helpers import random_ids, tiny_gpt
from tests.processes import assert_same_run, finished

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "tpu", "", "meta"])
def test_a_device_of_another_kind_is_refused_with_the_choices(name):
    with pytest.raises(UserError, match=rf"no device '{name}': choose auto, cpu, mps, cuda or cuda:N"):
        choose_device(name)


def test_a_gpu_that_is_not_there_is_refused():
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"PyTorch sees {count} CUDA devices"):
        choose_device(f"cuda:{count}")


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    assert choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto").type == "cuda"


def test_auto_is_bfloat16_where_the_cpu_multiplies_in_it(monkeypatch):
    for multiplies, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("harness.device._cpu_multiplies_bfloat16", lambda m=multiplies: m)
        assert choose_dtype("auto", CPU) == dtype
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="float16 needs a GPU"):
        choose_dtype("float16", CPU)


def test_a_cpu_compiles_only_if_it_is_told_to():
    assert [choose_compile(setting, CPU) for setting in ("auto", True, False)] == [False, True, False]


def test_what_passes_between_layers_outside_of_the_graph_is_not_compiled():
    assert [choose_compile(setting, CPU, "fa") for setting in ("auto", True, False)] == [False, True, False]
    assert not choose_compile("auto", torch.device("cuda"), "dfa")
    assert not choose_compile(False, CPU, "dfa")
    with pytest.raises(UserError, match=r"training\.compile: feedback dfa cannot be compiled"):
        choose_compile(True, CPU, "dfa")


def test_the_peak_memory_holds_what_was_allocated():
    before = peak_memory(CPU)
    block = torch.ones(2**25)  # 128 MiB, every page of it written
    assert peak_memory(CPU) >= max(before, block.nbytes)


def test_the_peak_rate_is_positive_and_says_of_what():
    rate, what = peak_flops(CPU, torch.float32)
    assert rate > 0
    assert what


def test_what_deterministic_algorithms_cost_is_measured_and_they_stay_on():
    model = tiny_gpt()
    try:
        x = random_ids(1, 12)
        said = deterministic_cost(model, (x, x), torch.autocast("cpu", torch.bfloat16, enabled=False))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    ms, any_ms, ratio = map(float, re.findall(r"([\d.e+]+)(?: ms| times)", said))
    assert ratio == pytest.approx(ms / any_ms, rel=0.02)
    assert all(p.grad is not None for p in model.parameters())


def test_a_deterministic_run_gives_the_same_bits(training_folder):
    how = ("--training.max_steps", "6")
    assert_same_run(finished("a", *how), finished("b", *how, "--training.deterministic", "true"))
