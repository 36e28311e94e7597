"""Trains the demo language model from plain text, on a CPU or a GPU.

    python train.py --corpus corpus --output run --budget-minutes 10

The same command goes on from the last checkpoint. The learning rate follows the recipe's number of
steps, not the budget: a run in ten pieces is the run in one piece.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from prepare import RECIPE, TOKENIZER_FILES, Prepared, Windows, prepare
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

#: Weight of the past in the moving average of the loss; with it runs agree with the bundled log.
AVERAGE = 0.98


@dataclass(frozen=True)
class Training:
    """The `training` part of `recipe.json`.

    Attributes:
        seed: Of the initial weights and of the order of the windows.
        batch: Windows a step.
        steps: Length of the whole schedule.
        warmup_steps: Steps in which the rate rises to its peak.
        peak_rate: Learning rate of both optimizers.
        final_rate_ratio: Last rate over peak rate, in [0, 1].
        muon_weight_decay: For the layers' matrices.
        adamw_weight_decay: For all other parameters.
        adamw_betas: For all other parameters.
        clip_norm: Largest norm of the gradient.
        bfloat16: Autocast to bfloat16; parameters stay float32.
        evaluate_every: Steps between held-out losses.
        checkpoint_every: Steps between checkpoints.
    """

    seed: int
    batch: int
    steps: int
    warmup_steps: int
    peak_rate: float
    final_rate_ratio: float
    muon_weight_decay: float
    adamw_weight_decay: float
    adamw_betas: tuple[float, float]
    clip_norm: float
    bfloat16: bool
    evaluate_every: int
    checkpoint_every: int


def rate(step: int, training: Training) -> float:
    """Learning rate of a step, counted from 1: linear warm-up, then half a cosine."""
    warmup = training.warmup_steps
    if step <= warmup:
        return training.peak_rate * step / warmup
    done = min(1.0, (step - warmup) / max(1, training.steps - warmup))
    low = training.final_rate_ratio
    return training.peak_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)


def rows_of_step(step: int, windows: int, training: Training) -> np.ndarray:
    """Which windows a step, counted from 1, reads (batch,): a new order in every epoch.

    A function of the step alone, so that a resumed run needs no state of a generator.
    """
    batches = windows // training.batch
    epoch, batch = divmod(step - 1, batches)
    order = np.random.default_rng([training.seed, epoch]).permutation(windows)
    return order[batch * training.batch : (batch + 1) * training.batch]


def optimizers(model: nn.Module, training: Training) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise SystemExit(
            f"training needs torch >= 2.9 for torch.optim.Muon, got {torch.__version__}"
        )
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if ".layers." in name and parameter.ndim == 2 else rest).append(parameter)
    return [
        muon(
            matrices,
            lr=training.peak_rate,
            weight_decay=training.muon_weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            rest,
            lr=training.peak_rate,
            betas=(training.adamw_betas[0], training.adamw_betas[1]),
            weight_decay=training.adamw_weight_decay,
        ),
    ]


def loss_of(model: nn.Module, rows: Windows, *, bfloat16: bool) -> Tensor:
    """Mean next-token cross-entropy in nats, over windows (batch, window)."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(rows.astype(np.int64)).to(device)
    cast = torch.autocast(device.type, dtype=torch.bfloat16) if bfloat16 else nullcontext()
    with cast:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@torch.no_grad()
def heldout_loss(model: nn.Module, windows: Windows, training: Training) -> float:
    """Mean next-token cross-entropy in nats over all held-out windows."""
    model.eval()
    total = 0.0
    for start in range(0, len(windows), training.batch):
        rows = windows[start : start + training.batch]
        total += float(loss_of(model, rows, bfloat16=training.bfloat16)) * len(rows)
    model.train()
    return total / len(windows)


def export(model: nn.Module, prepared: Prepared, config: dict[str, Any], folder: Path) -> None:
    """Writes a folder that transformers loads: float16 weights, configuration, tokenizer."""
    folder.mkdir(exist_ok=True)
    tensors = {
        name: parameter.detach().to("cpu", torch.float16).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((prepared.folder / name).read_bytes())


class Log:
    """A JSON Lines file; what comes after the step that a run resumes from is dropped."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        old = path.read_text().splitlines() if step and path.is_file() else []
        keep = [line for line in old if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in keep))

    def write(self, **entry: object) -> None:
        """Appends one entry."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class Run:
    """A model, its optimizers, and how far they are.

    Attributes:
        step: The last step made, 0 before the first.
        average: Moving average of the loss.
        seconds: Time that the steps up to the last checkpoint took.
    """

    def __init__(self, recipe: dict[str, Any], origin: str, device: str) -> None:
        self.training = Training(**recipe["training"])
        self.origin = origin
        torch.manual_seed(self.training.seed)
        model = LlamaForCausalLM(LlamaConfig.from_dict(recipe["model"]))
        self.model: nn.Module = nn.Module.to(model, device)
        self.optimizers = optimizers(self.model, self.training)
        self.step, self.average, self.seconds = 0, 0.0, 0.0

    def make_step(self, windows: Windows) -> float:
        """Makes the next step on its windows of the epoch; returns its loss."""
        self.step += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate(self.step, self.training)
        rows = windows[rows_of_step(self.step, len(windows), self.training)]
        loss = loss_of(self.model, rows, bfloat16=self.training.bfloat16)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(f"the loss is {value} at step {self.step}; lower peak_rate")
        past = AVERAGE * self.average + (1 - AVERAGE) * value
        self.average = past if self.step > 1 else value
        return value

    def save(self, checkpoint: Path) -> None:
        """Replaces the checkpoint; a run that is cut off meanwhile keeps the older one."""
        state = {
            **{name: getattr(self, name) for name in ("origin", "step", "average", "seconds")},
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = checkpoint.with_suffix(".tmp")
        torch.save(state, partial)
        partial.replace(checkpoint)

    def load(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            SystemExit: If it is of another recipe or corpus.
        """
        device = next(self.model.parameters()).device
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["origin"] != self.origin:
            raise SystemExit(
                f"a run goes on with the same recipe and corpus, {checkpoint} is of others; "
                "give another --output"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.average = state["step"], state["average"]
        self.seconds = state["seconds"]


def train(
    prepared: Prepared,
    recipe: dict[str, Any],
    folder: Path,
    *,
    budget_minutes: float = math.inf,
    last_step: int | None = None,
    device: str = "cpu",
    show_progress_bar: bool = True,
) -> int:
    """Trains until the schedule, the budget or `last_step` ends, from a checkpoint if there is one.

    Args:
        prepared: Windows and tokenizer.
        recipe: `recipe.json`.
        folder: Gets `checkpoint.pt`, `log.jsonl` and `model/`.
        budget_minutes: Wall-clock time of this call's steps; at least one is made.
        last_step: Stop after this step; None for the schedule's last one.
        device: "cpu", "cuda" or another device of torch.
        show_progress_bar: Show a bar.

    Returns:
        The last step made.

    Raises:
        SystemExit: If the checkpoint is of another recipe or corpus, the corpus has less than one
            batch, or the loss is not finite.
    """
    run = Run(
        recipe,
        json.dumps([recipe["model"], recipe["training"], prepared.fingerprint]),
        device,
    )
    training = run.training
    if len(prepared.train) < training.batch:
        raise SystemExit(
            f"one batch is {training.batch} windows, the corpus has {len(prepared.train)}; "
            "give more text or a smaller batch"
        )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.is_file():
        run.load(checkpoint)
    log = Log(folder / "log.jsonl", step=run.step)
    if run.step == 0:
        log.write(
            step=0,
            parameters=sum(parameter.numel() for parameter in run.model.parameters()),
            windows=len(prepared.train),
            heldout_windows=len(prepared.heldout),
            device=torch.device(device).type,
            torch=torch.__version__,
            transformers=transformers.__version__,
        )
    end = min(training.steps, last_step or training.steps)
    start = time.monotonic() - run.seconds
    deadline = time.monotonic() + budget_minutes * 60
    with tqdm(
        initial=run.step,
        total=training.steps,
        desc="training",
        unit="step",
        disable=None if show_progress_bar else True,
    ) as bar:
        while run.step < end:
            loss = run.make_step(prepared.train)
            run.seconds = time.monotonic() - start
            now = {"step": run.step, "seconds": round(run.seconds, 1)}
            log.write(
                **now,
                loss=round(loss, 4),
                average=round(run.average, 4),
                rate=rate(run.step, training),
            )
            bar.set_postfix(loss=f"{run.average:.3f}")
            bar.update()
            last = run.step == end or time.monotonic() >= deadline
            if last or run.step % training.evaluate_every == 0:
                heldout = heldout_loss(run.model, prepared.heldout, training)
                log.write(**now, heldout_loss=round(heldout, 4))
                perplexity = math.exp(heldout)
                bar.write(f"step {run.step}: held-out {heldout:.3f}, perplexity {perplexity:.1f}")
            if last or run.step % training.checkpoint_every == 0:
                run.save(checkpoint)
            if last:
                break
    export(run.model, prepared, recipe["model"], folder / "model")
    return run.step


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, metavar="PATH")
    parser.add_argument("--output", type=Path, default=Path("run"), metavar="DIR")
    parser.add_argument("--recipe", type=Path, default=RECIPE, metavar="FILE")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, metavar="N")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    if not args.budget_minutes > 0:
        parser.error(f"--budget-minutes must be above 0, got {args.budget_minutes}")
    recipe = json.loads(args.recipe.read_text())
    bars = not args.quiet
    prepared = prepare(args.corpus, args.output / "data", recipe, show_progress_bar=bars)
    step = train(
        prepared,
        recipe,
        args.output,
        budget_minutes=args.budget_minutes,
        device=args.device,
        show_progress_bar=bars,
    )
    steps = recipe["training"]["steps"]
    print(f"step {step} of {steps}; the model is in {args.output / 'model'}")
    if step < steps:
        print("The same command goes on from here.")


if __name__ == "__main__":
    main()
