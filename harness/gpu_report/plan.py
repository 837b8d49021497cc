"""The sections by name, in the order of what is lost if the time runs out."""

from harness.gpu_report import Section, exactness, hardware, kernels, models, steps, training

SECTIONS: dict[str, Section] = {
    "hardware": hardware.SECTION,
    "exactness": exactness.SECTION,
    "steps": steps.SECTION,
    "models": models.SECTION,
    "kernels": kernels.SECTION,
    "exactness_shapes": exactness.OTHER_SHAPES,
    "steps_variants": steps.OTHER_VARIANTS,
    "training": training.SECTION,
    "steps_tuned": steps.TUNED_PRODUCTS,
}

BY_NAME = ("steps_tuned",)
"""Minutes of compiling for one number: run only where --sections names it."""
