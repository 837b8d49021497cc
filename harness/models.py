"""The model that a config asks for."""

from dataclasses import fields

from harness.config import ModelConfig
from model import GPTConfig


def gpt_config(section: ModelConfig, vocab_size: int) -> GPTConfig:
    """The GPTConfig of a config's `model` section; `vocab_size` is the one to take where the section leaves it out."""
    given = {f.name: getattr(section, f.name) for f in fields(GPTConfig)}
    return GPTConfig(**given | {"vocab_size": section.vocab_size or vocab_size})
