"""The models of the whole steps, on random weights, and the candidates: times do not depend on values.

Every candidate adapts the same linears of the same weights: all of the encoder's or the blocks'. The floor
is the model with all of them frozen and a vector below the first block trained, so that dx flows through
every layer; head and optimiser are everybody's.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastspec
from fastspec.nn import together
from fastspec.nn.kept_weight import KeptWeight
from fastspec.ops.kept import Room
from gpu.device import DEVICE, REHEARSING, pick

BF16 = torch.bfloat16
RANK = pick(32, 4)
SHIFT = 1e-3  # of the coefficients: away from zero

# An attention of this name gets no mask: in a capture transformers would build one, though no token is
# padding, and with a mask there is no flash attention.
ALL_ATTENTION_FUNCTIONS.register("unmasked", sdpa_attention_forward)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and a batch of `batch` sequences of `length` tokens; `targets` are the adapted linears."""

    name: str
    batch: int
    length: int
    targets: str
    build: Callable[[], nn.Module]

    def __str__(self) -> str:
        return f"{self.name} {self.batch}x{self.length}"

    @property
    def rows(self) -> int:
        return self.batch * self.length


def bert(hidden: int, layers: int, heads: int) -> nn.Module:
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=pick(30522, 100),
        # dropout would add the same to every candidate and hide the differences
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="unmasked",
    )
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    """Two blocks in the shape of an 8B model."""
    config = LlamaConfig(
        hidden_size=pick(4096, 32),
        intermediate_size=pick(14336, 64),
        num_hidden_layers=2,
        num_attention_heads=pick(32, 4),
        num_key_value_heads=pick(8, 2),
        vocab_size=pick(512, 100),
        use_cache=False,
        attn_implementation="unmasked",
    )
    return LlamaForCausalLM(config)


ENCODER = r".*encoder\.layer\..*\.(query|key|value|dense)"
BLOCKS = r".*layers\..*_proj"
MINILM = Workload(
    "MiniLM", *pick((32, 64), (2, 8)), ENCODER, lambda: bert(*pick((384, 6, 12), (32, 2, 4)))
)
BASE = Workload(
    "BERT-base", *pick((32, 128), (2, 8)), ENCODER, lambda: bert(*pick((768, 12, 12), (32, 2, 4)))
)
LARGE = Workload("8B-like", *pick((4, 2048), (2, 8)), BLOCKS, llama)
WORKLOADS = pick((MINILM, BASE, LARGE), (MINILM, LARGE))


def base_of(load: Workload, dtype: torch.dtype = BF16) -> nn.Module:
    """The plain model on the device, its weights drawn there."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return load.build().to(dtype)


def trained_head(model: nn.Module) -> nn.Module:
    """Everything frozen but the classifier, where there is one."""
    model.requires_grad_(False)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    return model


class Shifted(nn.Module):
    """An embedding plus a trained vector."""

    def __init__(self, inner: nn.Module, width: int, like: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.shift = nn.Parameter(torch.zeros(width, dtype=like.dtype, device=like.device))

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids) + self.shift


def floor(model: nn.Module, load: Workload) -> nn.Module:
    trained_head(model)
    embeddings = model.get_input_embeddings()
    model.set_input_embeddings(Shifted(embeddings, embeddings.weight.shape[1], embeddings.weight))
    return model


_factors: dict[str, dict[str, tuple[Tensor, ...]]] = {}  # of `spectral`, for others to take


def spectral(core: str = "diag") -> Callable[[nn.Module, Workload], nn.Module]:
    def prepare(model: nn.Module, load: Workload) -> nn.Module:
        config = fastspec.SpectralConfig(
            rank=RANK,
            core=core,
            basis="random",  # times do not depend on it, and it is there at once
            target_modules=load.targets,
            modules_to_save=["classifier"] if hasattr(model, "classifier") else [],
        )
        fastspec.spectralize(model, config, progress=False)
        g = torch.Generator().manual_seed(0)
        for _, layer in adapted(model):
            drawn = SHIFT * torch.randn(layer.delta.shape, generator=g)
            layer.delta.data.copy_(drawn)
        if core == "diag":
            _factors[load.name] = {
                name: (layer.u, layer.s, layer.vh, layer.delta.detach().clone())
                for name, layer in adapted(model)
            }
        return model

    return prepare


def kept(model: nn.Module, load: Workload) -> nn.Module:
    """`spectral` with a copy of every adapted weight, made again after each optimiser step."""
    return fastspec.keep_merged(spectral()(model, load))


def kept_with(
    joined: Collection[str] = ("y", "dx"), at_once: bool = True, shared: bool = True
) -> Callable[[nn.Module, Workload], nn.Module]:
    """`kept` with some of its parts: which products are joined; all copies made at once; shared inputs."""

    def room(layer: Any) -> Room:
        factors = layer.u, layer.vh
        whole = Room.like(layer.weight.detach(), layer.bias, *factors)
        if whole.u is None or not joined:
            return Room(torch.empty_like(layer.weight))
        if "y" not in joined:  # a factor that lies elsewhere is multiplied by itself
            return dataclasses.replace(whole, vh=layer.vh)
        return whole if "dx" in joined else dataclasses.replace(whole, u=layer.u)

    def prepare(model: nn.Module, load: Workload) -> nn.Module:
        model = kept(model, load)
        for _, layer in adapted(model):
            layer._kept = KeptWeight(layer, None, room(layer))  # type: ignore[assignment]
        if not at_once:
            together.remove(model)
        elif not shared:
            state = together._known.setdefault(model, together.Together())
            state.sharing.learn = lambda runs: None  # type: ignore[method-assign]
        return model

    return prepare


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of spectral layers."""
    for name, module in model.named_modules():
        if isinstance(module, fastspec.SpectralLinear):
            yield name, module


def eigentune(model: nn.Module, load: Workload) -> nn.Module:
    """EigenTune with the same coefficients on the same factors as `spectral`."""
    from eigentune import EigenTuneConfig, get_eigentune_model
    from eigentune.svd import Bases

    if load.name not in _factors:
        spectral()(copy.deepcopy(model), load)
    ours = _factors[load.name]
    bases = {name: Bases(u, s, vh, tuple(range(RANK)), "") for name, (u, s, vh, _) in ours.items()}
    config = EigenTuneConfig(rank=RANK, target_modules=load.targets)
    model = get_eigentune_model(model, config, bases=bases)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    for name, (*_, delta) in ours.items():
        model.get_submodule(name).delta.data.copy_(delta)
    return model


def lora(model: nn.Module, load: Workload) -> nn.Module:
    """PEFT's LoRA of rank 8, in the model's dtype: faster than its default, float32."""
    from peft import LoraConfig, get_peft_model

    trained_head(model)
    config = LoraConfig(r=pick(8, 2), target_modules=load.targets)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    inner = model.get_base_model()
    if hasattr(inner, "classifier"):
        inner.classifier.requires_grad_(True)
    return model


def full(model: nn.Module, load: Workload) -> nn.Module:
    return model.requires_grad_(True)


OURS = "fastspec"
KEPT = "fastspec, copies kept"
FLOOR = "frozen floor"
LORA = "PEFT LoRA r8"
CANDIDATES: dict[str, Callable[[nn.Module, Workload], nn.Module]] = {
    OURS: spectral(),
    KEPT: kept,
    "EigenTune": eigentune,
    LORA: lora,
    "full finetuning": full,
}


# what each part of the kept copies brings, in graphs alone
PARTS: dict[str, Callable[[nn.Module, Workload], nn.Module]] = {
    "all": kept,
    "nothing shared": kept_with(shared=False),
    "dx joined, nothing shared": kept_with(("dx",), shared=False),
    "y joined, nothing shared": kept_with(("y",), shared=False),
    "nothing joined": kept_with(()),
    "nothing joined, each layer for itself": kept_with((), at_once=False),
}


class TrainingStep:
    """Forward, backward and AdamW of a prepared copy of a model on one batch that stays where it is."""

    def __init__(self, model: nn.Module, load: Workload, autocast: bool = False) -> None:
        self.model = model.train()
        self.autocast = autocast
        trained = [p for p in model.parameters() if p.requires_grad]
        # an optimiser in a graph must count its steps on the device
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True, capturable=not REHEARSING)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 100, (load.batch, load.length), generator=g).to(DEVICE)
        labels = torch.randint(0, 2, (load.batch,), generator=g).to(DEVICE)
        self.batch = {"input_ids": ids, "labels": labels if load.targets == ENCODER else ids}

    def loss(self) -> Tensor:
        with torch.autocast(DEVICE.type, BF16, enabled=self.autocast):
            return self.model(**self.batch).loss

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        # to None: inside a graph the gradients then are the graph's own, written anew by each replay
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def compile(self) -> None:
        """Compile block by block: all blocks are of one kind, which is compiled once."""
        backend = pick("inductor", "eager")
        for module in self.model.modules():
            if type(module).__name__ in ("BertLayer", "LlamaDecoderLayer"):
                module.compile(backend=backend)


def make(
    prepare: Callable[[nn.Module, Workload], nn.Module],
    base: nn.Module,
    load: Workload,
    autocast: bool = False,
) -> TrainingStep:
    return TrainingStep(prepare(copy.deepcopy(base), load), load, autocast)


def plain(ours: TrainingStep, load: Workload) -> TrainingStep:
    """A copy that runs the plain formulas on the same factors and coefficients."""
    model = copy.deepcopy(ours.model)
    for _, layer in adapted(model):
        layer.path = "reference"
    return TrainingStep(model, load)
