"""What fastspec does with the architectures of transformers: a table over tiny random models.

    python tools/architectures.py [--write] [NAME ...]

`--write` puts the table into docs/architectures.md; tests/test_architectures.py holds the page to what the
checks say.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_architectures import GENERATES, KINDS, build, inputs_of, output_of
from torch import Tensor, nn

import fastspec
from fastspec.model.targets import spectral_layers

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
BEGIN, END = "<!-- begin: tools/architectures.py -->", "<!-- end -->"
RANK = 4
FIT = 2e-5  # relative to the largest output, float32


class Adapted:
    """One architecture: its base model, a batch, and copies of the model with an adapter."""

    def __init__(self, name: str) -> None:
        self.name = name
        # frozen, as `spectralize` leaves it: PyTorch folds the dimensions of a product by requires_grad
        self.base = build(name).requires_grad_(False)
        self.batch = inputs_of(self.base, name)
        with torch.no_grad():
            self.plain = output_of(self.base, self.batch)
        self.fresh = fastspec.spectralize(self.copy(), fastspec.SpectralConfig(rank=RANK))

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.base)

    @functools.cached_property
    def trained(self) -> nn.Module:
        """The adapted model with coefficients of some size."""
        return randomised(copy.deepcopy(self.fresh), 2)

    @property
    def generates(self) -> bool:
        return KINDS[self.name] in GENERATES


def randomised(model: nn.Module, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for _, layer in spectral_layers(model):
        layer.delta.data = 0.3 * layer.s.mean() * torch.randn(layer.delta.shape, generator=g)
    return model


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference in parts of b's largest number."""
    return float((a - b).abs().max() / b.abs().max())


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def converted(case: Adapted) -> str:
    layers = dict(spectral_layers(case.fresh))
    heads = case.fresh.spectral.modules_to_save
    embeddings = {n for n, m in case.base.named_modules() if isinstance(m, nn.Embedding)}

    def counts(name: str) -> bool:
        return (
            not any(name.startswith(f"{h}.") for h in heads)
            and name.rpartition(".")[0] not in embeddings
        )

    total = sum(p.numel() for n, p in case.base.named_parameters() if p.dim() > 1 and counts(n))
    return f"{sum(layer.weight.numel() for layer in layers.values()) / total:.0%}"


def starts_equal(case: Adapted) -> None:
    with torch.no_grad():
        expect(torch.equal(output_of(case.fresh, case.batch), case.plain), "differs")


def trains(case: Adapted) -> str:
    model = copy.deepcopy(case.trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    output_of(model, case.batch).square().mean().backward()
    idle = [name for name, layer in spectral_layers(model) if layer.delta.grad is None]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    heads = model.spectral.modules_to_save
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    stray = [
        n
        for n in moved
        if not n.endswith(".delta") and not any(n.startswith(f"{h}.") for h in heads)
    ]
    expect(not stray, f"moves: {', '.join(stray[:2])}")
    more = f" and {len(idle) - 1} more never run" if len(idle) > 1 else " never runs"
    return f"yes, but {idle[0]}{more}" if idle else "yes"


def loads(case: Adapted) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        fastspec.save_adapter(case.trained, folder)
        loaded = fastspec.load_adapter(case.copy(), folder)
        want = output_of(case.trained, case.batch)
        expect(torch.equal(output_of(loaded, case.batch), want), "differs after loading")
        expect(not torch.equal(want, case.plain), "the coefficients change nothing")


def merges(case: Adapted) -> None:
    with torch.no_grad():
        merged = output_of(fastspec.merge(copy.deepcopy(case.trained)), case.batch)
        off = distance(merged, output_of(case.trained, case.batch))
    expect(off < FIT, f"off by {off:.0e}")


def generated(model: nn.Module, case: Adapted, **options: Any) -> Tensor:
    batch = {k: v for k, v in case.batch.items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, **options}
    return model.generate(**batch, **options)


def generates(case: Adapted) -> None:
    with torch.no_grad():
        merged = fastspec.merge(copy.deepcopy(case.trained))
        for beams in (1, 2):
            got = generated(case.trained, case, num_beams=beams)
            expect(
                torch.equal(got, generated(merged, case, num_beams=beams)),
                f"differs with {beams} beams",
            )


def with_tasks(case: Adapted) -> nn.Module:
    model = copy.deepcopy(case.fresh)
    for seed, task in enumerate(("a", "b")):
        drawn = randomised(copy.deepcopy(model), 5 + seed)
        source = {f"{n}.delta": layer.delta for n, layer in spectral_layers(drawn)}
        fastspec.add_task(model, task, source)
    return model


def mixes(case: Adapted) -> None:
    model, rows = with_tasks(case), ["b", None, "a"]
    with torch.no_grad():
        mixed = output_of(model, case.batch, tasks=rows)
        for row, task in enumerate(rows):
            fastspec.set_task(model, task)
            alone = output_of(model, case.batch)
            off = distance(mixed[row], alone[row])
            expect(off < FIT, f"row off by {off:.0e}")


def mixes_generating(case: Adapted) -> None:
    model, rows = with_tasks(case), ["b", None, "a"]
    with torch.no_grad():
        for beams in (1, 2):
            with fastspec.tasks(rows):
                mixed = generated(model, case, num_beams=beams)
            for row, task in enumerate(rows):
                fastspec.set_task(model, task)
                alone = generated(model, case, num_beams=beams)
                expect(torch.equal(mixed[row], alone[row]), f"row differs with {beams} beams")


def bridges(case: Adapted) -> None:
    from peft import PeftModel, get_peft_model

    import fastspec.peft as bridge

    heads = list(case.fresh.spectral.modules_to_save)
    config = bridge.SpectralConfig(r=RANK, target_modules="all-linear", modules_to_save=heads)
    model = get_peft_model(case.copy(), config)
    for name, p in model.named_parameters():
        if p.requires_grad:
            g = torch.Generator().manual_seed(len(name))
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        want = output_of(model.eval(), case.batch)
        expect(not torch.equal(want, case.plain), "the coefficients change nothing")
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.copy(), folder).eval()
        expect(torch.equal(output_of(loaded, case.batch), want), "differs after loading")
        off = distance(output_of(loaded.merge_and_unload(), case.batch), want)
        expect(off < FIT, f"merged and unloaded: off by {off:.0e}")
        unloaded, base = model.unload().state_dict(), case.base.state_dict()
        kept = [n for n in base if not any(n.startswith(f"{head}.") for head in heads)]
        expect(all(torch.equal(unloaded[n], base[n]) for n in kept), "unloaded: not the base model")


CHECKS: dict[
    str, tuple[Callable[[Adapted], str | None], bool]
] = {  # and whether only for models that generate
    "converted": (converted, False),
    "starts equal": (starts_equal, False),
    "trains": (trains, False),
    "save, load": (loads, False),
    "merged": (merges, False),
    "generates": (generates, True),
    "mixed tasks": (mixes, False),
    "mixed, generating": (mixes_generating, True),
    "PEFT": (bridges, False),
}


def row_of(name: str) -> dict[str, str]:
    """What every check says of an architecture: "yes", a figure, or why not."""
    try:
        case = Adapted(name)
    except Exception as e:
        return dict.fromkeys(CHECKS, "") | {"converted": reason(e)}
    row = {}
    for column, (check, generating) in CHECKS.items():
        if generating and not case.generates:
            row[column] = ""
            continue
        try:
            row[column] = check(case) or "yes"
        except Exception as e:
            row[column] = reason(e)
    return row


def reason(error: Exception) -> str:
    text = str(error).split("\n")[0]
    return "no: " + (
        text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
    )


# -------------------------------------------------------------------------------------------- table


def table(rows: dict[str, dict[str, str]]) -> str:
    """Markdown: a row an architecture, and what its checks said where it is more than a word."""
    lines = ["| architecture | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    notes = []
    for name, row in rows.items():
        cells = []
        for column, said in row.items():
            word, _, rest = said.partition(":" if said.startswith("no") else ",")
            cells.append(word)
            if rest:
                notes.append(f"- **{name}**, {column}:{rest}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes, ""])


def written(page: str) -> str:
    """The part of a page that this program writes."""
    return page.partition(BEGIN + "\n")[2].partition(END)[0]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument(
        "--write", action="store_true", help=f"put the table of all into {PAGE.name}"
    )
    args = parser.parse_args(arguments)
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    text = table({name: row_of(name) for name in args.names or KINDS})
    print(text)
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN + "\n")
        PAGE.write_text(before + BEGIN + "\n" + text + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
