"""Real training on the card: SST-2 on MiniLM, fast and reference path, bfloat16 and float32; copies kept.

Scores and losses, no times: the runs share the card. All have the same rows and steps, so that they can be
compared. A plain loop with the schedule of `fastspec glue`; that command's trainer needs libraries which a
bare machine has not. In bfloat16 the body is bfloat16, head and coefficients stay float32.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastspec
from fastspec.studies.encoders import default_model, quiet
from fastspec.studies.glue import data
from fastspec.studies.glue.tasks import TASKS, predictions, score_split
from gpu import record, workers
from gpu.device import DEVICE, pick
from gpu.record import Record

PROCESSES = pick(5, 1)
EPOCHS = pick(2, 1)
BATCH = pick(32, 4)
LENGTH = pick(64, 12)
ROWS, DEV_ROWS = pick((4000, None), (8, 8))
RATE, HEAD_RATE, WARMUP = 1e-2, 3e-3, 0.1
HEADS = ["classifier", "pooler"]  # a sentence encoder's pooler was never trained
PACKED = Path("build/gpu/minilm")
TASK = "sst2"
RUNS = [
    (TASK, path, dtype)
    for dtype in pick((torch.bfloat16, torch.float32), (torch.bfloat16,))
    for path in ("reference", "fast", "kept")
    if path != "kept" or dtype == torch.bfloat16
]


def folder() -> str:
    """The pretrained encoder: the packed copy, else the installed one."""
    return str(PACKED) if PACKED.is_dir() else default_model()


def model_of(path: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder(), num_labels=2, dtype=dtype
        )
    for name in HEADS:
        head = model.base_model.pooler if name == "pooler" else model.classifier
        head.float().register_forward_pre_hook(lambda module, args: (args[0].float(),))
    shown = "reference" if path == "reference" else "fast"
    config = fastspec.SpectralConfig(rank=32, path=shown, modules_to_save=HEADS)
    model = fastspec.spectralize(model.to(DEVICE), config, progress=False)
    return fastspec.keep_merged(model, path == "kept")


def batches(texts: list, labels: list, order: list[int], tokenizer: Any) -> list[dict]:
    """Padded batches on the device, in the order given."""
    found = []
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        columns = map(list, zip(*[texts[i] for i in rows], strict=True))
        batch = tokenizer(
            *columns, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
        )
        batch["labels"] = torch.tensor([labels[i] for i in rows])
        found.append({key: value.to(DEVICE) for key, value in batch.items()})
    return found


def rate(step: int, steps: int) -> float:
    """The share of the rate: up over the warm-up, then down to zero."""
    rising = max(1, round(WARMUP * steps))
    return (step + 1) / rising if step < rising else max(0.0, (steps - step) / (steps - rising))


def check(index: int) -> dict[str, Any]:
    """One run: its losses, scores after every epoch, and last predictions."""
    name, path, dtype = RUNS[index]
    task = TASKS[name]
    source = data.load(task, os.environ.get("FASTSPEC_GLUE_DIR"))
    if source.task is not task:
        raise FileNotFoundError("no GLUE files: set FASTSPEC_GLUE_DIR, or pack them")
    train, dev = source.train.head(ROWS), source.dev["dev"].head(DEV_ROWS)
    tokenizer = AutoTokenizer.from_pretrained(folder())
    model = model_of(path, dtype)
    groups = fastspec.parameter_groups(model, lr=RATE, head_lr=HEAD_RATE)
    optimizer = torch.optim.AdamW(groups, fused=True)
    g = torch.Generator().manual_seed(0)
    whole = []
    for _ in range(EPOCHS):
        order = torch.randperm(len(train), generator=g).tolist()
        whole.append(batches(train.texts, train.labels or [], order, tokenizer))
    steps = sum(map(len, whole))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    tests = batches(dev.texts, dev.labels or [], list(range(len(dev))), tokenizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[torch.Tensor] = []
    scores: list[float] = []
    predicted: list = []
    started = time.perf_counter()
    for epoch in whole:
        model.train()
        for batch in epoch:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(**batch).logits for batch in tests]).float()
        predicted = predictions(task, logits.cpu().numpy())
        scores.append(score_split(task, predicted, dev.labels or [])["score"])
    seconds = time.perf_counter() - started
    curve = torch.stack(losses).float().cpu()
    return {
        "steps": len(losses),
        "train_seconds": seconds,
        "loss_first": float(curve[:20].mean()),
        "loss_last": float(curve[-20:].mean()),
        "scores": scores,
        "predicted": predicted,
        "curve": F.avg_pool1d(curve[None], 10, 10)[0].tolist() if steps >= 10 else curve.tolist(),
    }


def main() -> int:
    rows = Record("glue")
    results: dict[int, dict[str, Any]] = {}

    def answered(index: int, result: dict[str, Any]) -> None:
        name = " ".join(
            (RUNS[index][0], RUNS[index][1], str(RUNS[index][2]).removeprefix("torch."))
        )
        if "error" in result or "skipped" in result:
            rows.fail(name, result.get("error", "no time left"))
            return
        results[index] = result
        rows.add(name, **{k: v for k, v in result.items() if k not in ("predicted", "curve")})

    ends = time.time() + record.left()
    workers.run("gpu.glue", range(len(RUNS)), PROCESSES, record.left(), answered, ends)
    for index, result in results.items():
        task, path, dtype = RUNS[index]
        plain = results.get(RUNS.index((task, "reference", dtype)))
        if path != "reference" and plain is not None:
            pairs = list(zip(result["predicted"], plain["predicted"], strict=True))
            apart = [abs(a - b) for a, b in zip(result["curve"], plain["curve"], strict=True)]
            rows.add(
                f"{task} {str(dtype).removeprefix('torch.')}: {path} against reference",
                steps_each=result["steps"],
                largest_difference_of_losses=max(apart),
                predictions=len(pairs),
                differing=sum(a != b for a, b in pairs),
            )
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
