"""Write a checkpoint as a Hugging Face model: `python scripts/export_hf.py CHECKPOINT FOLDER`.

As a GPT-2, Llama, Qwen2, Qwen3, GPT-NeoX or Mistral, the first of these that can express it. Needs safetensors.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.checkpoint import load_model
from harness.errors import run_cli
from harness.pretrained import save_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="ckpt.pt of this project or of nanoGPT, or hf:NAME_OR_FOLDER")
    parser.add_argument("folder", help="where to write config.json and the weights")
    args = parser.parse_args()
    model, _ = load_model(args.checkpoint)
    written = save_hf(model, args.folder)
    print(f"wrote {args.folder}: {written}.from_pretrained({args.folder!r}) of transformers loads it")


if __name__ == "__main__":
    sys.exit(run_cli(main))
