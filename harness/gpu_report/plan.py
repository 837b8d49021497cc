"""The sections by name, in the order of what is lost if the time runs out."""

from harness.gpu_report import Section, exactness, hardware, kernels, steps, training

SECTIONS: dict[str, Section] = {
    "hardware": hardware.SECTION,
    "exactness": exactness.SECTION,
    "steps": steps.SECTION,
    "kernels": kernels.SECTION,
    "exactness_shapes": exactness.OTHER_SHAPES,
    "steps_variants": steps.OTHER_VARIANTS,
    "training": training.SECTION,
}
