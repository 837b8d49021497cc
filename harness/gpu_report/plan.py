"""The sections by name, in the order of what is lost if the time runs out."""

from harness.gpu_report import Section, blocks, exactness, hardware, kernels, models, steps, training

SECTIONS: dict[str, Section] = {
    "hardware": hardware.SECTION,
    "exactness": exactness.SECTION,
    "steps": steps.SECTION,
    "models": models.SECTION,
    "resumed": models.RESUMED,
    "kernels": kernels.SECTION,
    "exactness_shapes": exactness.OTHER_SHAPES,
    "steps_variants": steps.OTHER_VARIANTS,
    "training": training.SECTION,
    "steps_tuned": steps.TUNED_PRODUCTS,
    "blocks": blocks.SECTION,
}

BY_NAME = ("steps_tuned", "blocks")
"""Minutes of compiling, for whoever tunes: run only where --sections names them."""
