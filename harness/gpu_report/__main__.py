"""One section in this process: `python -m harness.gpu_report SECTION OPTIONS ROWS`.

OPTIONS is a JSON file of a Task's fields, ROWS the file that its rows go to, a line each.
"""

import json
import os
import sys
from pathlib import Path


def main(name: str, options: str, rows: str) -> None:
    fields = json.loads(Path(options).read_text())
    if fields["cpu"]:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    from harness.gpu_report import Task
    from harness.gpu_report.plan import SECTIONS

    with open(rows, "w", encoding="utf-8") as file:
        for row in SECTIONS[name].run(Task(**fields)):
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
