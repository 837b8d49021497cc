"""The Python source of the running interpreter's standard library, byte by byte: a corpus that is always there.

Without tests, IDLE and generated tables; files are parted by a zero byte. About 11 MB; needs no network.
"""

import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness.corpus_writing import argument_parser, find_files, split_files, write_corpus
from harness.errors import UserError, run_cli
from harness.tokenizer import Bytes

WITHOUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "__pycache__")
VAL_FRACTION = 0.05


def source_files() -> dict[Path, str]:
    """Path → path relative to the library's folder."""
    root = Path(sysconfig.get_path("stdlib"))
    files = find_files(root, ["*.py"], WITHOUT)
    files = {path: key for path, key in files.items() if not Path(key).name.startswith("_sysconfigdata")}
    if len(files) < 2:
        raise UserError(f"no standard library as source files in {root}: use a Python that has one, or another text")
    return files


def main():
    args = argument_parser(__file__, __doc__).parse_args()
    files = source_files()
    write_corpus(
        args.out,
        split_files(files, VAL_FRACTION),
        Bytes(),
        source=f"standard library of Python {platform.python_version()}",
        threads=args.threads,
        shard_bytes=args.shard_size,
        total_bytes=sum(path.stat().st_size for path in files),
        extra={"python_version": platform.python_version()},
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
