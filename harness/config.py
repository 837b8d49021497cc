"""The keys of a config: every one with its type, its default and a line of explanation, which `--help` prints.

How a config is read from YAML files and the command line is for config_files.py to say.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import docstring_parser
import yaml
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from harness.errors import UserError
from measure.feedback import Feedback
from model import GPTConfig

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**64)])  # what PyTorch's generators take
Beta = restricted_number_type("Beta", float, [(">=", 0), ("<", 1)])  # at 1 AdamW's bias correction divides by 0
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])


@dataclass
class RunConfig:
    """What the run is called and where its files go"""

    name: str | None = None
    """the run's folder is <out_dir>/<name>; null: the config file's own name"""
    out_dir: str = "out"
    """the folder that holds all runs"""
    seed: Seed = 1337  # type: ignore[valid-type]  # a class, but one made by a function
    """every random draw is a function of (seed, step, where)"""


@dataclass
class ModelConfig(GPTConfig):
    """The GPT's shape, its attention's normalizer (forward) and backward"""

    vocab_size: PositiveInt | None = None  # type: ignore[assignment]  # the model's own is known with the corpus
    """token ids; null: the corpus's. GPT-2's 50257 padded to 50304 is faster"""

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The model that the section asks for, with this `vocab_size` where the section leaves it out."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(GPTConfig)}
        return GPTConfig(**given | {"vocab_size": self.vocab_size or vocab_size})


@dataclass
class DataConfig:
    """What it learns from"""

    corpus: str = "data/stdlib"
    """a folder with train.bin and val.bin, as its prepare.py or nanoGPT's writes them"""
    windows: Literal["stream", "documents"] = "stream"
    """of text: from anywhere; or from where a document starts, with nothing to learn after its end"""


@dataclass
class OptimizerConfig:
    """What steps the parameters, and how far: a linear warm-up, then a schedule"""

    name: Literal["adamw", "sgd", "muon", "adamw_muon_embeddings"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for the rest; adamw_muon_embeddings: Muon for embeddings, head too"""
    lr: NonNegativeFloat = 1e-3
    """peak learning rate"""
    muon_lr: NonNegativeFloat | None = None
    """of what Muon steps, whose steps are as long as AdamW's are; min_lr is as much less of it; null: lr"""
    min_lr: NonNegativeFloat = 1e-4
    """learning rate from decay_steps on"""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """how the rate falls from lr to min_lr after the warm-up; wsd: stays at lr, then linearly, see decay_share"""
    warmup_steps: NonNegativeInt = 100
    """steps from 0 to lr"""
    decay_steps: PositiveInt | None = None
    """step at which min_lr is reached; null: training.max_steps"""
    decay_share: Share = 0.2  # type: ignore[valid-type]  # as Seed
    """schedule wsd: the last share of decay_steps, in which the rate falls"""
    weight_decay: NonNegativeFloat = 0.1
    """apart from the gradient (decoupled), but with sgd added to it: less by far there, as 1e-4"""
    decay: Literal["matrices_and_embeddings", "matrices", "all"] = "matrices_and_embeddings"
    """what decays; only under all do biases, norms and what the normalizer learns. A head of its own is a matrix"""
    beta1: Beta = 0.9  # type: ignore[valid-type]  # as Seed
    """adamw: decay rate of the gradient's mean"""
    beta2: Beta = 0.99  # type: ignore[valid-type]  # as Seed
    """adamw: decay rate of the gradient's square"""
    eps: PositiveFloat = 1e-8
    """adamw: what is added to the root of that square"""
    momentum: Beta | None = None  # type: ignore[valid-type]  # as Seed
    """Nesterov's, of sgd and of Muon; null: 0.9 for sgd, 0.95 for Muon"""
    grad_clip: NonNegativeFloat = 1.0
    """largest norm of the whole gradient; 0: no clipping"""


@dataclass
class TrainingConfig:
    """How it learns"""

    init_from: str = "scratch"
    """scratch, a checkpoint (its weights only), or hf:NAME_OR_FOLDER of a Hugging Face GPT-2, Llama or their kin"""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: continue the run's checkpoint if there is one; must: insist on it; never: start afresh"""
    overwrite: bool = False
    """with `resume: never`, replace what the run's folder already holds"""
    max_steps: PositiveInt = 2000
    """optimizer steps in all"""
    batch_size: PositiveInt = 64
    """sequences a step, over all devices"""
    micro_batch_size: PositiveInt | None = None
    """sequences one device holds at a time at most, the rest accumulates; null: its whole share of batch_size"""
    feedback: Feedback = "backprop"
    """how errors go back through linear layers: by weights, random matrices, signs, or (dfa) from the logits at once"""
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:N"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of matrix products; auto: bfloat16 where the hardware has it, float16 on older GPUs, else float32"""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model; auto: on CUDA, if there is a C compiler"""
    checkpoint_interval: PositiveInt = 250
    """steps between writes of ckpt.pt; the last step always writes"""
    keep_interval: PositiveInt | None = None
    """steps between checkpoints that are kept, in steps/, for diagnostics along training; null: none"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """what several ranks do with the model: ddp, each has a copy; fsdp, each has a share of every parameter"""
    checkpoint_activations: bool = False
    """keep each block's input alone and compute the block again in the backward pass: less memory, a third more work"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """a gradient that is not finite: stop; or skip that step, up to nonfinite_limit of them in a row"""
    nonfinite_limit: PositiveInt = 10
    """on_nonfinite skip: the steps in a row that may be skipped; one more stops the run"""
    deterministic: bool = False
    """PyTorch's deterministic algorithms alone: on a GPU too, the same run gives the same bits"""


@dataclass
class KLConfig:
    """A penalty on the KL divergence from a reference model: a barrier to fine-tune within, or distillation"""

    reference: str | None = None
    """a checkpoint or hf:NAME_OR_FOLDER, of the same vocabulary; null: no penalty, and the keys below do nothing"""
    mode: Literal["barrier", "distill"] = "barrier"
    """adds to the loss weight · mean over sequences of relu(aggregate KL − tau), or weight · temperature² · mean KL"""
    direction: Literal["forward", "reverse"] | None = None
    """forward: KL(reference‖model); reverse: KL(model‖reference); null: reverse for the barrier, forward to distill"""
    aggregate: Literal["mean", "rmse", "p95", "max"] = "mean"
    """barrier: of the KL over the positions of each sequence"""
    tau: NonNegativeFloat = 0.0
    """barrier: the aggregate, in nats a token, up to which nothing is added"""
    weight: NonNegativeFloat = 1.0
    """of the penalty in the loss; 0 logs the KL and leaves training alone"""
    temperature: PositiveFloat = 1.0
    """distill: what both models' logits are divided by"""


@dataclass
class EvaluationConfig:
    """Validation: the same windows every time, val/…; at the last step the whole set too, val_full/…"""

    interval: PositiveInt = 250
    """steps between evaluations"""
    batches: PositiveInt | Literal["full"] = 50
    """validation windows, in units of training.batch_size, spread evenly; full: the whole set"""
    kurtosis: bool = True
    """log what shows outliers at every evaluation: kurtosis of weights and activations, sinks, row mass"""
    only: bool = False
    """evaluate the run's checkpoint, or another init_from, on the whole validation set, and end"""


@dataclass
class TrackingConfig:
    """Curves: metrics.jsonl always, wandb beside it"""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when logged in, else offline"""
    project: str = "offbyone"
    """the wandb project"""
    log_interval: PositiveInt = 10
    """steps between training metrics"""


class _Idle(NamedTuple):
    """Keys that change nothing where another key has one of these values."""

    keys: str
    beside: str
    values: list[Any]


# Those that come with offbyone: a normalizer of a user's own may read any key of another.
_SHIPPED = (
    *("softmax", "softmax1", "softmax_n", "sink", "kbias", "kvbias", "ssmax"),
    *("clipped", "softpick", "sigmoid", "relu", "entmax15"),
)


def _but(normalizer: str) -> list[str]:
    return [name for name in _SHIPPED if name != normalizer]


_IDLE = (
    _Idle("model.gate_init", "model.gate", ["none"]),
    _Idle("model.rope_theta model.rope_fraction model.rope_scaling", "model.position", ["learned"]),
    _Idle("model.rope_original_context", "model.position", ["learned"]),
    _Idle("model.rope_original_context", "model.rope_scaling", [1]),
    _Idle("model.activation", "model.mlp", ["swiglu"]),
    _Idle("model.softmax_n", "model.normalizer", _but("softmax_n")),
    _Idle("model.sink_init", "model.normalizer", _but("sink")),
    _Idle("model.ssmax_init", "model.normalizer", _but("ssmax")),
    _Idle("model.clipped_alpha model.clipped_by", "model.normalizer", _but("clipped")),
    _Idle("model.clipped_by", "model.clipped_alpha", [0]),
    _Idle("model.sigmoid_bias", "model.normalizer", _but("sigmoid")),
    _Idle("optimizer.beta1 optimizer.beta2 optimizer.eps", "optimizer.name", ["sgd"]),
    _Idle("optimizer.decay_share", "optimizer.schedule", ["cosine", "linear"]),
    _Idle("optimizer.decay", "optimizer.weight_decay", [0]),
    _Idle("training.nonfinite_limit", "training.on_nonfinite", ["stop"]),
    _Idle("training.overwrite", "training.resume", ["auto", "must"]),
    _Idle("kl.mode kl.direction kl.aggregate kl.tau kl.weight kl.temperature", "kl.reference", [None, ""]),
    _Idle("kl.aggregate kl.tau", "kl.mode", ["distill"]),
    _Idle("kl.temperature", "kl.mode", ["barrier"]),
    _Idle("kl.aggregate kl.tau", "kl.weight", [0]),
)


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        self.sources: dict[str, str] = {}  # "section.key" → the file that set it, or "command line"
        self.inherited: set[str] = set()  # those that a file set which this one extends

    @property
    def folder(self) -> Path:
        """The run's folder."""
        assert self.run.name is not None  # load_config has given it one
        return Path(self.run.out_dir) / self.run.name

    def error(self, key: str, problem: str) -> UserError:
        """A UserError about the value of `key` ("section.key"), saying where that was set."""
        return UserError(f"{self.sources.get(key, 'default')}: {key}: {problem}")

    def check(self) -> None:
        """UserError, naming a key, where values that are allowed each by itself do not go together."""
        c = self.optimizer
        if c.momentum is not None and c.name == "adamw":
            raise self.error("optimizer.momentum", "adamw has none, but beta1: choose another optimizer.name")
        if c.muon_lr is not None and c.name in ("adamw", "sgd"):
            raise self.error("optimizer.muon_lr", f"{c.name} steps nothing by Muon: choose another optimizer.name")
        if c.muon_lr is not None and not c.lr:
            raise self.error("optimizer.muon_lr", "its schedule is lr's, in proportion, and optimizer.lr is 0")

    def idle(self, model: GPTConfig) -> list[str]:
        """A line for each key that was set but changes nothing in a run of `model`, and why. It is no mistake: what the
        variants of a base config share may be for some of them alone, and what they inherit from it is not told."""
        known = {f"{section}.{name}": x for section, keys in self.to_dict().items() for name, x in keys.items()}
        given, defaults = dict(known), Config().to_dict()
        known |= {f"model.{name}": x for name, x in dataclasses.asdict(model).items()}
        found: dict[str, str] = {}
        own = self.sources.keys() - self.inherited
        for keys, other, values in _IDLE:
            for key in (key for key in keys.split() if key in own and key not in found):
                section, _, name = key.partition(".")
                if known[other] in values and given[key] != defaults[section][name]:
                    reason = f"{other} is {'null' if known[other] in (None, '') else known[other]}"
                    found[key] = f"{self.sources[key]}: {key}: {given[key]} changes nothing here, since {reason}"
        return list(found.values())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


SECTIONS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config)}


def describe(annotation: Any) -> str:
    """A type in words: "a positive int or 'full'"."""
    names = {
        int: "an int",
        float: "a number",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        PositiveInt: "a positive int",
        NonNegativeInt: "an int ≥ 0",
        Seed: "an int ≥ 0 and below 2⁶⁴",
        PositiveFloat: "a positive number",
        NonNegativeFloat: "a number ≥ 0",
        Beta: "a number in [0, 1)",
        Share: "a number in (0, 1]",
    }
    if get_origin(annotation) is Literal:
        return " or ".join(str(choice) for choice in get_args(annotation))
    if annotation in names:
        return names[annotation]
    return " or ".join(describe(a) for a in get_args(annotation))


def describe_field(f: dataclasses.Field) -> str:
    """What a key takes, in words: its type, or its choices where they are a table's entries (`model.NORMALIZERS`)."""
    return " or ".join(f.metadata["choices"]) if "choices" in f.metadata else describe(f.type)


def help_text() -> str:
    """Every key with its type, default and explanation."""
    lines = [
        "usage: python train.py CONFIG [--section.key value …] [--print_config]",
        "",
        "CONFIG is a YAML file of the sections below; `extends: FILE` at its top names a base that it changes.",
        "--print_config prints the resolved config and ends.",
    ]
    for section, cls in SECTIONS.items():
        lines += ["", f"{section}: {cls.__doc__}"]
        explanations: dict[str, str | None] = {}
        for base in reversed(cls.__mro__[:-1]):
            doc = docstring_parser.parse_from_object(base)
            explanations |= {p.arg_name: p.description for p in doc.params}
        for f in dataclasses.fields(cls):
            default = yaml.safe_dump(f.default).splitlines()[0]
            lines.append(f"  --{section}.{f.name}".ljust(36) + f"{explanations[f.name]}")
            lines.append(" " * 36 + f"({describe_field(f)}; default: {default})")
    return "\n".join(lines)
