"""Trainer for scorers: level and pair losses, SRCC during training, and the best checkpoints.

B: images, of n pairs 2 n; L: positions, V: embedding rows, K: levels.
"""

import inspect
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..scoring.losses import (
    LossWeights,
    in_level_loss,
    level_kl,
    level_logits,
    level_positions,
    level_scores,
    pair_loss,
    rest_loss,
    to_device,
    total_loss,
)
from ..scoring.statistics import plcc, srcc
from .recipe import ScoreRecipe
from .trainer import Owl2Trainer


class ScoreTrainer(Owl2Trainer):
    """Trains a scorer on batches of `ScoreCollator`.

    Args:
        scores: The losses and their weights.
        prefix: Token ids of the answer in front of the level.
        level_ids: Token ids of the levels, best first.
        dataset_names: What the numbers in `datasets` of the rows to evaluate on mean.
        args, kwargs: As `Owl2Trainer` takes them.
    """

    def __init__(
        self,
        *args: Any,
        scores: ScoreRecipe,
        prefix: Sequence[int],
        level_ids: Sequence[int],
        dataset_names: Sequence[str] = (),
        **kwargs: Any,
    ):
        self.scores, self.prefix, self.level_ids = scores, list(prefix), list(level_ids)
        self.dataset_names = list(dataset_names)
        super().__init__(*args, compute_metrics=self._agreement, **kwargs)
        if scores.labels == "soft":
            self.model_accepts_loss_kwargs = False  # the loss is the mean of each batch
        if scores.keep_best is not None:
            self.add_callback(KeepBest(scores.keep_best))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        epoch = inspect.signature(Trainer._run_epoch).bind(self, *args, **kwargs).arguments["epoch"]
        self.train_dataset.begin_epoch(epoch)
        super()._run_epoch(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The next-token loss for hard labels; for soft ones those of pairs and single images."""
        opinions = {name: inputs[name] for name in ("level_probs", "mos", "mos_stds")}
        inputs = {
            name: value
            for name, value in inputs.items()
            if name not in opinions and name != "datasets"
        }
        if self.scores.labels == "hard":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # What the losses select by goes to the host at once, before the model has work to wait for.
        has_std = opinions["mos_stds"].isfinite().to(inputs["labels"])
        read = torch.cat([inputs.pop("labels"), has_std[:, None]], 1).cpu()
        labels, has_std = read[:, :-1], read[:, -1].bool()
        outputs = model(**inputs)
        loss = self._soft_loss(
            outputs["logits"], labels, opinions, has_std, in_pairs=model.training
        )
        return (loss, outputs) if return_outputs else loss

    def _soft_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        opinions: Mapping[str, Tensor],
        has_std: Tensor,
        in_pairs: bool,
    ) -> Tensor:
        """The total; of single images their part alone.

        Args:
            logits: (B, L, V).
            labels: (B, L), on the CPU.
            has_std: (B,), on the CPU, False where the opinion has no standard deviation.
        """
        positions = level_positions(labels, self.prefix)
        found = level_logits(logits, positions)  # (B, V)
        size = len(logits) // 2 if in_pairs else len(logits)
        parts = [slice(start, start + size) for start in range(0, len(logits), size)]
        rest = [rest_loss(logits[part], labels[part], positions[part]) for part in parts]
        kl = [
            level_kl(found[part], self.level_ids, opinions["level_probs"][part]) for part in parts
        ]
        outside = [in_level_loss(found[part], self.level_ids) for part in parts]
        pairs = self._pair_loss(found, opinions, has_std, *parts) if in_pairs else 0.0
        recipe = self.scores
        weights = LossWeights(
            recipe.pair_weight, recipe.image_weight, recipe.level_weight, recipe.in_level_weight
        )
        return total_loss(pairs, rest, kl, outside, weights)

    def _pair_loss(
        self,
        found: Tensor,
        opinions: Mapping[str, Tensor],
        has_std: Tensor,
        first: slice,
        second: slice,
    ) -> Tensor:
        """The mean over pairs; one without both standard deviations has a target of 0 or 1."""
        scores, stds = level_scores(found, self.level_ids)  # (B,) each
        is_known = has_std[first] & has_std[second]  # (pairs,)
        total = scores.sum() * 0  # a zero with a gradient, also where no pair is left
        for has_stds, mask in ((True, is_known), (False, ~is_known)):
            if not mask.any():
                continue
            pairs = to_device(mask.nonzero()[:, 0], found)

            def both(values: Tensor, pairs: Tensor = pairs) -> tuple[Tensor, Tensor]:
                return values[first][pairs], values[second][pairs]

            loss = pair_loss(
                both(scores),
                both(opinions["mos"]),
                both(opinions["mos_stds"]) if has_stds else None,
                both(stds) if self.scores.score_stds == "predicted" else None,
                kind="fidelity" if has_stds else self.scores.pair_loss,
            )
            total = total + loss * len(pairs)
        return total / len(is_known)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Loss, scores (B, 1), and MOS with the number of the data set (B, 2)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        found = level_logits(outputs["logits"], level_positions(inputs["labels"], self.prefix))
        scores, _ = level_scores(found, self.level_ids)
        # (B, 2)
        known = torch.stack([inputs["mos"].to(scores), inputs["datasets"].to(scores)], -1)
        return loss.detach().mean(), scores[:, None], known

    def _agreement(self, prediction: EvalPrediction) -> dict[str, float]:
        """SRCC and PLCC (without a fit), the mean over data sets, and those of each where there are
        several.
        """
        scores, (mos, datasets) = prediction.predictions[:, 0], prediction.label_ids.T
        found = {}
        for name, statistic in (("srcc", srcc), ("plcc", plcc)):
            own = {
                self.dataset_names[number]: statistic(
                    scores[datasets == number], mos[datasets == number]
                )
                for number in range(len(self.dataset_names))
                if (datasets == number).sum() > 1
            }
            found[name] = float(np.mean(list(own.values()))) if own else math.nan
            found |= (
                {f"{name}_{dataset}": value for dataset, value in own.items()}
                if len(own) > 1
                else {}
            )
        return found


class KeepBest(TrainerCallback):
    """Removes checkpoints but those with the highest SRCC, and the newest one.

    Args:
        count: How many of the best stay.
    """

    def __init__(self, count: int):
        self.count = count

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        found = {row["step"]: row["eval_srcc"] for row in state.log_history if "eval_srcc" in row}
        folders = {
            int(path.name.rpartition("-")[2]): path
            for path in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
            if path.name.rpartition("-")[2].isdigit()
        }

        def rank(step: int) -> tuple[float, int]:
            value = found.get(step, math.nan)
            return (-math.inf if math.isnan(value) else value, step)

        best = sorted(folders, key=rank, reverse=True)[: self.count]
        for step in folders.keys() - {*best, state.global_step}:
            shutil.rmtree(folders[step], ignore_errors=True)
