"""What a run takes, worked out from its config: memory on a device, bytes between devices, checkpoints, steps.

Memory has its peak at one of a few moments of a step: while the loss is computed or goes back, in the backward pass of
the last block (all activations are there) or of the first (all gradients are), or in the optimizer's step. `Plan` adds
up, for each moment, what is alive then, kind by kind; the peak is the largest sum. A tensor of n tokens and C channels
has 4·n·C bytes in the residual stream, which is float32, and itemsize·n·C where matrix products read it.

What is counted is what autograd keeps of the operations in model.py and kernels/, so that a change there wants one
here: tests/harness/test_planning.py compares the sums with what PyTorch allocates. Two parts are not added up by hand
but followed through PyTorch's own code without memory (`follow`): attention that is materialized, whatever its
normalizer, and the KL beside a reference. Not counted are the CUDA context, fragmentation and libraries' workspaces.
"""

import contextlib
from collections import Counter
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.allocations import Followed, follow
from harness.config import Config
from harness.device import choose_compile, choose_dtype
from harness.kl_training import position_kl
from harness.optimizers import BY_MUON, kinds_of
from kernels.backends import native, use_backend
from kernels.loss import ROWS, cross_entropy
from model import GPT, NORMALIZERS, GPTConfig, rotation

Bytes = Counter[str]  # kind → bytes


class Plan:
    """What the training of `shape` as `config` says takes on each of so many devices, all of them `device`, "cuda" or
    "cpu": by default training.device, whose auto is "cuda". `batch` replaces training.micro_batch_size. UserError where
    they cannot share a batch, or training.device is another kind.
    """

    def __init__(self, config: Config, shape: GPTConfig, gpus: int = 1, device: str = "", batch: int | None = None):
        c = config.training
        device = device or c.device.replace("auto", "cuda").partition(":")[0]
        if device not in ("cuda", "cpu"):
            raise config.error("training.device", f"{c.device}: a plan is for cuda or cpu")
        if c.feedback != "backprop":
            shape = replace(shape, tie_embeddings=False)
        for key, most in {"n_layer": 10**4, "n_embd": 10**6, "vocab_size": 10**8, "block_size": 10**8}.items():
            if getattr(shape, key) > most:
                raise config.error(f"model.{key}", f"{getattr(shape, key)}: a plan is for {most:,} at most")
        self.config, self.shape, self.gpus, self.device = config, shape, gpus, device
        share, rest = divmod(c.batch_size, gpus)
        if rest or not share:
            raise config.error("training.batch_size", _unshared(c.batch_size, gpus))
        most = min(batch or c.micro_batch_size or share, share)
        self.batch = next(n for n in range(most, 0, -1) if share % n == 0)
        self.micro_steps, self.tokens = share // self.batch, self.batch * shape.block_size
        on = torch.device(device)  # which need not be here
        compiled = device == "cuda" and c.feedback != "dfa" if c.compile == "auto" else c.compile
        self.compiled = choose_compile(compiled, on, c.feedback)
        self.by_parts = device == "cpu" and not self.compiled  # some operations are several there, and keep more
        self.by_weights = c.feedback in ("backprop", "dfa")  # by which errors go back, so that they are kept until then
        self.sharded, self.recomputed = c.parallel == "fsdp" and gpus > 1, c.checkpoint_activations
        self.dtype = choose_dtype("bfloat16" if device == "cuda" and c.dtype == "auto" else c.dtype, on)
        self.itemsize = self.dtype.itemsize
        self.model = _without_memory(tuple(asdict(shape).items()))
        self.parameters = sum(p.numel() for p in self.model.parameters())  # a shared embedding counts once
        self.of_block = sum(p.numel() for p in self.model.transformer.h[0].parameters())
        self.of_root = self.parameters - shape.n_layer * self.of_block  # embeddings, the last norm, the head
        self.of_head = shape.vocab_size * shape.n_embd

    @cached_property
    def state_bytes(self) -> int:
        """Of the whole optimizer's state in float32: two moments for AdamW, one for Muon and for SGD with momentum."""
        c = self.config.optimizer
        if c.name == "sgd":
            return 0 if c.momentum == 0 else 4 * self.parameters
        kinds, by_muon = kinds_of(self.model), BY_MUON.get(c.name, ())
        return sum(4 * p.numel() * (1 if kinds[n] in by_muon else 2) for n, p in self.model.named_parameters())

    # --- activations --------------------------------------------------------------------------------------------------

    @cached_property
    def attention(self) -> Followed | None:
        """What a block's attention takes where it is materialized; None where it runs on a fused kernel."""
        c, entry, on_cpu = self.shape, NORMALIZERS[self.shape.normalizer], self.device == "cpu"
        if entry.tile == "softmax" and not (on_cpu and c.dropout):
            return None
        if entry.tile is not None and not c.dropout and (native() if on_cpu else c.head_size <= 128):
            return None
        with FakeTensorMode(), contextlib.nullcontext() if on_cpu else use_backend("materialized"):
            module = GPT(replace(c, n_layer=1)).transformer.h[0].attn
            for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
                for name, p in [*linear.named_parameters()]:  # as autocast's copies, which are counted elsewhere
                    setattr(linear, name, nn.Parameter(p.to(self.dtype), requires_grad=False))
            x = torch.empty(self.batch, c.block_size, c.n_embd, dtype=self.dtype, requires_grad=True)
            rope = rotation(c, 0, c.block_size, x) if c.position == "rope" else None
            return follow(lambda x: module(x, rope), x, known=module.parameters())

    @cached_property
    def block(self) -> Bytes:
        """What a block keeps of a micro-batch for its backward pass."""
        c, n, itemsize = self.shape, self.tokens, self.itemsize
        C, inner, T = c.n_embd, c.resolved()["n_inner"], c.block_size
        q, kv = c.n_head * c.head_size, c.kv_heads * c.head_size  # channels
        in_parts = 4 * self.by_parts  # of RMSNorm, where what is scaled is kept too
        kept: Bytes = Counter()
        kept["residual stream"] = 4 * n * C * (1 if c.parallel_residual else 2)
        # Each linear layer casts its input by itself, and two read the same one.
        casts = ((c.mlp == "swiglu") + (c.gate != "none")) * (itemsize < 4 and not self.compiled)
        kept["norms"] = n * C * itemsize * (2 + casts) + 2 * n * (8 if c.norm == "layernorm" else 4 + C * in_parts)
        kept["MLP"] = n * itemsize * inner * (2 if c.mlp == "gelu" else 4 - self.compiled)
        kept["dropout masks"] = n * C * self._mask(itemsize) * (c.dropout > 0)
        if self.attention:
            kept["attention, T × T"] = self.attention.kept + n * itemsize * q  # what c_proj reads
            return kept
        kept["dropout masks"] *= 2
        qkv, has_null_key = q + 2 * kv, "null_key" in NORMALIZERS[c.normalizer].parameters
        if has_null_key:
            qkv += -(-qkv // T)  # copies of all three, with a row more
        elif c.position == "rope":
            qkv += q + kv  # beside what they are rotated from, which v is a part of
        qkv += q * (NORMALIZERS[c.normalizer].queries is not None)
        kept["queries, keys, values"] = n * itemsize * qkv
        if c.qk_norm:  # in float32
            as_input = 4 * (itemsize < 4 and not self.compiled)
            as_output = itemsize * (c.position == "learned")
            kept["queries, keys, values"] += n * (q + kv) * (in_parts + as_input + as_output)
        copies = 1 + (c.normalizer == "clipped") + has_null_key
        copies += self.dtype == torch.float32 and self.device == "cpu" and c.position == "rope" and not native()
        kept["attention's output"] = n * itemsize * q * copies + 4 * n * c.n_head  # and the logsumexp
        kept["gate"] = n * itemsize * {"none": 0, "head": c.n_head + q, "element": 2 * q}[c.gate]
        return kept

    def _mask(self, width: int) -> int:
        """Bytes of an element's dropout mask: on a CPU it is a tensor of what it multiplies."""
        return width if self.by_parts else 1

    @property
    def around(self) -> Bytes:
        """Activations outside of blocks, from the embedding to the loss."""
        c, n, C = self.shape, self.tokens, self.shape.n_embd
        held = Bytes({"residual stream": 4 * n * C, "norms": n * C * self.itemsize})
        held["norms"] += 4 * n * C * (c.norm == "rmsnorm" and self.by_parts)
        held["dropout masks"] = n * C * self._mask(4) if c.dropout else 0
        return held

    # --- the moments --------------------------------------------------------------------------------------------------

    @cached_property
    def moments(self) -> dict[str, Bytes]:
        """What is alive at each moment that may be the peak."""
        c, n, L, copied = self.shape, self.tokens, self.shape.n_layer, self.gpus > 1 and not self.sharded
        at_once = self.micro_steps == 1 and not copied  # DDP's gradients are there all the time, in its buckets
        stream, head, weights, copies = 4 * n * c.n_embd, 4 * self.of_head, 4 * self.parameters, self._copies
        shards = self.gpus if self.sharded else 1
        base = Bytes({"parameters": weights // shards, "optimizer state": self.state_bytes // shards, "batch": 16 * n})
        base["KL reference"] = weights // shards * bool(self.config.kl.reference)  # as if it had the model's shape
        base["feedback"] = self._feedback
        grads = Bytes({"gradients": weights // shards})
        former = Bytes() if at_once else grads
        inputs = Bytes({"residual stream": stream})
        kept = inputs if self.recomputed else self.block + times(copies, self.by_weights)
        anew = self.block + copies - inputs if self.recomputed else Bytes()
        forward, backward = self._loss

        # What is not kept is in autocast's cache until the loss is there.
        cached = times(copies, L * (self.recomputed or not self.by_weights))
        alive, sharding = base + former + times(kept, L), self._sharding
        found = {
            "the loss": alive + cached + self.around + forward + sharding["root"],
            "the loss, backward": alive + self.around + backward + sharding["root"],
        }
        if self.attention:
            own = inputs + Bytes({"norms": n * c.n_embd * self.itemsize, "attention, T × T": self.attention.forward})
            before = base + former + times(kept, L - 1) + (cached or copies)
            found["the last block, forward"] = before + own + sharding["forward"]

        # Where the head is the embedding its gradient waits for the embedding's, and under FSDP for all of the root's.
        waiting = Bytes({"gradients": head * (c.tie_embeddings or at_once or self.sharded)})
        after = waiting + (former or Bytes({"gradients": 4 * self.of_block * (L - 1) // shards}))
        for name, work, done in self._at_work:
            found[f"the last block, {name}"] = alive + waiting + anew + work - done + sharding["last"]
            found[f"the first block, {name}"] = base + after + self.block + copies + work - done + sharding["first"]
        if self.sharded:
            work = Bytes({"at work": stream})
            found["the last block, gathered"] = alive + waiting + work + sharding["gathered"]
            found["the last block, summed"] = alive - kept + waiting + work + sharding["summed"]
            between = base + after + times(kept, 2) + anew + self._at_work[0][1]
            found["the second block"] = between + sharding["last"] + sharding["between"]
            found["the embedding, summed"] = base + grads + sharding["root, summed"]

        # The embedding's gradient is a tensor of its own before it is added to the head's, and to former ones.
        more = (c.tie_embeddings + (self.sharded or not at_once)) * head
        work = Bytes({"at work": stream, "gradients": more})
        found["the embedding"] = base + grads + work + sharding["embedding"]
        found["the optimizer's step"] = base + grads + Bytes({"at work": self._stepping})
        return found

    @property
    def _sharding(self) -> dict[str, Bytes]:
        """What FSDP holds beside a rank's shares, by the moment.

        The root's parameters, in float32, from the forward to the backward pass; those of a block, in dtype, while it
        computes, and in the backward pass those of the next one already. When a block is done, its gradients in
        float32, to be summed over the ranks while the next one computes. On CPUs gloo copies what it moves.
        """
        root, block, sums = 4 * self.of_root, self.itemsize * self.of_block, 4 * self.of_block
        gloo = self.device == "cpu"
        sizes = {
            "root": root,
            "forward": root + block,
            "gathered": root + (2 + gloo) * block,
            "last": root + 2 * block,
            "summed": root + block + (1 + gloo) * sums + sums // self.gpus,
            "between": sums,
            "first": root + block + sums,
            "embedding": root + (1 + gloo) * sums,
            "root, summed": 2 * root,
        }
        return {moment: Bytes({"gathered by FSDP": size * self.sharded}) for moment, size in sizes.items()}

    @cached_property
    def _loss(self) -> tuple[Bytes, Bytes]:
        """What the head and the loss take forward and backward."""
        c, n, itemsize, V = self.shape, self.tokens, self.itemsize, self.shape.vocab_size
        head = 4 * self.of_head  # its gradient
        copy = self.of_head * itemsize * (itemsize < 4)  # its weight as autocast copies it
        outputs = 4 * n * c.n_embd * (itemsize < 4 and not self.compiled)  # of the last norm, before they are cast
        if not self.config.kl.reference and self.config.training.feedback == "backprop":
            # By chunks of rows: the sums that become the gradients of x and of the head's weight, and a chunk's logits,
            # which on a CPU become log p in another tensor. Backward, both sums are multiplied into new tensors.
            chunks = -(-n // ROWS[self.device])
            rows = min(n, -(-n // (128 * chunks)) * 128)
            chunk = rows * V * (itemsize if self.device == "cuda" else 8 if itemsize == 4 else 10)
            forward = Bytes({"loss": n * c.n_embd * itemsize + head + chunk + copy, "norms": outputs})
            return forward, Bytes({"loss": 2 * (n * c.n_embd * itemsize + head)})
        # All logits at once, forward; backward, their gradient alone, which `follow` counts.
        with FakeTensorMode():
            targets = torch.empty(n, dtype=torch.int64)
            x, reference = (torch.empty(n, V, dtype=self.dtype, requires_grad=grad) for grad in (True, False))
            followed = follow(lambda x: self._loss_of(x, reference, targets), x, known=(reference, targets))
        forward = Bytes({"loss": copy + followed.forward, "norms": outputs, "logits": n * V * itemsize})
        forward["KL reference"] = n * V * itemsize * bool(self.config.kl.reference)
        return forward, Bytes({"loss": copy * self.by_weights + followed.backward})

    def _loss_of(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        loss, c = cross_entropy(logits, targets), self.config.kl
        if c.reference:
            direction = c.direction or ("reverse" if c.mode == "barrier" else "forward")
            temperature = c.temperature if c.mode == "distill" else 1.0
            loss = loss + position_kl(logits, reference, direction, temperature).mean()
        return loss

    @property
    def _copies(self) -> Bytes:
        """A block's weights as autocast gives them to matrix products."""
        if self.sharded or self.itemsize == 4:
            return Bytes()
        linear = [m for m in self.model.transformer.h[0].modules() if isinstance(m, nn.Linear)]
        name = f"weights in {self.dtype}".replace("torch.", "")
        return Bytes({name: self.itemsize * sum(p.numel() for m in linear for p in m.parameters())})

    @property
    def _at_work(self) -> list[tuple[str, Bytes, Bytes]]:
        """(part of a block, what its backward pass makes, what of the block is freed by then): of the MLP, gradients of
        the residual stream, of its hidden layer (of swiglu's two) and of a weight; of attention, if materialized."""
        c, n, itemsize = self.shape, self.tokens, self.itemsize
        C, inner = c.n_embd, c.resolved()["n_inner"]
        gradient = n * C * (4 + itemsize * (itemsize < 4 or c.dropout > 0 or self.config.training.feedback == "dfa"))
        hidden = n * inner * itemsize * (1 if c.mlp == "gelu" else 2)
        found = [("MLP", Bytes({"at work": gradient + hidden + C * inner * itemsize}), Bytes())]
        if self.attention:
            work = self.attention.backward - self.attention.kept + 4 * n * C
            done = Bytes({"MLP": self.block["MLP"], "norms": self.block["norms"] // 2})
            done["residual stream"] = 4 * n * C * (not c.parallel_residual)
            found.append(("attention", Bytes({"at work": work}), done))
        return found

    @property
    def _feedback(self) -> int:
        """The fixed matrices by which errors go back, whole on every rank: as the weights, or from the logits to each
        layer's outputs, with the logits' gradient, which is there until the next."""
        how, linears = self.config.training.feedback, [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        to_each = self.shape.vocab_size * sum(m.out_features for m in linears if m is not self.model.lm_head)
        error = self.tokens * self.shape.vocab_size * self.itemsize
        return {"fa": 4 * sum(m.weight.numel() for m in linears), "dfa": 4 * to_each + error}.get(how, 0)

    @property
    def _stepping(self) -> int:
        """What the optimizer makes beside its state: AdamW nothing, Muon the iterates of a matrix, SGD one parameter's
        gradient with weight decay and then with momentum, or on CUDA all gradients with weight decay."""
        c, kinds, shards = self.config.optimizer, kinds_of(self.model), self.gpus if self.sharded else 1
        if c.name == "sgd":
            one = max(p.numel() for p in self.model.parameters()) * (bool(c.weight_decay) + (c.momentum != 0))
            return 4 * (one if self.device == "cpu" else self.parameters * bool(c.weight_decay)) // shards
        attention = self.model.transformer.h[0].attn
        matrices = [
            (rows, p.size(1))
            for name, p in self.model.named_parameters()
            if kinds[name] in BY_MUON.get(c.name, ())
            for rows in (attention.sizes if kinds[name] == "qkv" else p.shape[:1])
        ]
        return max((8 * m * n + 4 * min(m, n) ** 2 for m, n in matrices), default=0)

    @cached_property
    def peak(self) -> tuple[str, Bytes]:
        """The moment at which most is alive, and what."""
        return max(self.moments.items(), key=lambda moment: sum(moment[1].values()))

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak[1].values())

    # --- what moves, what is written, and what would fit --------------------------------------------------------------

    @property
    def moved(self) -> dict[str, float]:
        """Bytes that a device sends in a step, and receives, by rings: kind → bytes."""
        if self.gpus == 1:
            return {}
        others, blocks = (self.gpus - 1) / self.gpus, self.itemsize * self.shape.n_layer * self.of_block
        if not self.sharded:
            return {"all-reduce of the gradients, float32": 2 * others * 4 * self.parameters}
        again, name = others * self.micro_steps, str(self.dtype).removeprefix("torch.")
        return {
            "all-gather of what is outside of blocks, float32": again * 4 * self.of_root,
            f"all-gather of the blocks before each pass, {name}": again * 2 * blocks,
            "reduce-scatter of the gradients, float32": again * 4 * self.parameters,
        }

    @property
    def flops(self) -> float:
        """Of a device in a step: `GPT.flops_per_token`'s three passes, of which going back is two, and another for what
        checkpoint_activations computes again and for a KL reference of the same shape."""
        passes = 3 + self.recomputed + bool(self.config.kl.reference)
        return self.model.flops_per_token() * self.tokens * self.micro_steps * passes / 3

    def seconds(self, flops: float, bandwidth: float) -> dict[str, float]:
        """Of a step, on devices that do so many FLOP/s and send so many bytes/s."""
        return {"computing": self.flops / flops, "sending": sum(self.moved.values()) / bandwidth}

    def changed(self, gpus: int | None = None, batch: int | None = None, **training) -> "Plan":
        """This plan with other keys of `training`."""
        config = replace(self.config, training=replace(self.config.training, **training))
        config.sources = self.config.sources
        return Plan(config, self.shape, gpus or self.gpus, self.device, batch or self.batch)

    def largest(self, limit: float) -> "Plan | None":
        """This plan with the most sequences at a time, up to all of a device's share, that stay within the limit."""
        share, found = self.batch * self.micro_steps, None
        batches = [n for n in range(1, share + 1) if share % n == 0]
        while batches:  # memory only grows with the batch
            middle = len(batches) // 2
            plan = self.changed(batch=batches[middle])
            fits = plan.peak_bytes <= limit
            found, batches = (plan, batches[middle + 1 :]) if fits else (found, batches[:middle])
        return found


def ways_to_fit(plan: Plan, limit: float) -> list[Plan]:
    """Plans that stay within so many bytes: fewer sequences at a time, activations computed again, a sharded model and
    both; where none of these does, the fewest devices, of 2, 4, 8 …, that share the model so."""
    again: dict[str, Any] = {"checkpoint_activations": True}
    options = [{}, again, {"parallel": "fsdp"}, again | {"parallel": "fsdp"}]
    given = plan.config.training
    new = [o for o in options if not o or any(getattr(given, key) != value for key, value in o.items())]
    new = [o for o in new if plan.gpus > 1 or "parallel" not in o]
    if found := [way for option in new if (way := plan.changed(**option).largest(limit))]:
        return found
    gpus = 2
    while given.batch_size % gpus == 0:
        if gpus > plan.gpus and (way := plan.changed(gpus, **options[-1]).largest(limit)):
            return [way]
        gpus *= 2
    return []


def _unshared(batch_size: int, gpus: int) -> str:
    counts = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    near = [max(n for n in counts if n < gpus), *[n for n in counts if n > gpus][:1]]
    sizes = [n for n in (batch_size // gpus * gpus, -(-batch_size // gpus) * gpus) if n]
    able, shared = (" or ".join(map(str, found)) for found in (near, sizes))
    problem = f"{batch_size} sequences cannot be shared out among {gpus} devices"
    return f"{problem}: among {able} they can, or {shared} among {gpus}"


@lru_cache
def _without_memory(shape: tuple) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(**dict(shape)))


def times(kinds: Bytes, factor: int) -> Bytes:
    return Bytes({kind: size * factor for kind, size in kinds.items()})
