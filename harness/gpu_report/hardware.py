"""(a) The card, the versions, and what the card reaches at best: the ceilings that everything else is judged by."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch

from harness.device import peak_flops, processor_name
from harness.gpu_report import Section, Table, Task
from harness.timing import Laps, in_turn, median


def run(task: Task) -> Iterator[dict]:
    for name, value in facts(task).items():
        yield {"what": name, "value": value}
    n, size = (256, 2**20) if task.cpu else (8192, 2**32)
    torch.manual_seed(task.seed)
    a, b = (torch.randn(n, n, device=task.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(256, (size,), device=task.device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def product(laps: Laps) -> None:
        a @ b
        laps.end("")

    def copy(laps: Laps) -> None:
        target.copy_(source)
        laps.end("")

    runs = {"product": product, "copy": copy}
    in_turn(runs, task.device, 3)
    laps = in_turn(runs, task.device, 20)
    for name, amount, what, unit in (
        ("product", 2 * n**3, f"bfloat16 product of {n} × {n} random matrices", "TFLOP/s"),
        ("copy", 2 * size, f"copy of {size / 2**30:.3g} GiB on the device, read and written", "TB/s"),
    ):
        rate = median([amount / seconds[""] / 1e12 for seconds in laps[name]])
        yield {"what": what, "value": rate.value, "error": rate.error, "unit": unit}


def facts(task: Task) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton_version(),
        "processor": f"{processor_name()}, {torch.get_num_threads()} threads",
    }
    if task.cpu:
        return found
    card = torch.cuda.get_device_properties(task.device)
    flops, source = peak_flops(task.device, torch.bfloat16)
    found |= {
        "card": card.name,
        "memory, GiB": f"{card.total_memory / 2**30:.1f}",
        "multiprocessors": str(card.multi_processor_count),
        "L2, MiB": f"{card.L2_cache_size / 2**20:.0f}",
        "CUDA, cuDNN": f"{torch.version.cuda}, {torch.backends.cudnn.version()}",
        "peak for MFU": f"{flops / 1e12:.0f} TFLOP/s, {source}",
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem"]
        answer = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20).stdout
        found["driver, power limit, highest clocks"] = answer.splitlines()[0] if answer.strip() else "no answer"
    return found


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def present(rows: list[dict]) -> list[Table]:
    def cell(row: dict) -> str:
        return f"{row['value']:.4g} ± {row['error']:.1g} {row['unit']}" if "unit" in row else row["value"]

    return [Table("", [{"what": row["what"], "value": cell(row)} for row in rows])]


SECTION = Section("Card, versions, ceilings", 0.5, run, present)
