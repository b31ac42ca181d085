"""Make the default model: `python -m experiments.default_model.train --out DIR`.

transformers' Trainer, a batch for each step: rows share one picture among several questions through
a four-dimensional attention mask, and batches of three tasks are drawn by the number of the step
alone.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GenerationConfig, TrainingArguments

from owl2_hf.modeling import MplugOwl2Config, MplugOwl2ForConditionalGeneration
from owl2_hf.modeling.configuration_mplug_owl2 import padded_vocab_size
from owl2_hf.modeling.modeling_mplug_owl2_abstractor import image_position_table
from owl2_hf.processing import MplugOwl2ImageProcessor, MplugOwl2Processor
from owl2_hf.training.checkpoints import last_checkpoint
from owl2_hf.training.trainer import Owl2Trainer

from .data import (
    COLORS,
    SHAPES,
    SIDE,
    STYLE_WEIGHTS,
    STYLES,
    Emoji,
    Questions,
    load_easy_vqa,
    load_emoji,
    load_style,
    on_white,
    text_only_test,
)
from .prompts import RowEncoder, train_tokenizer

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
NUM_TEXT, NUM_TEXT_QUESTIONS, QUESTIONS_A_SHAPE = 2, 6, 4
# Shapes first: at first a thousand names are noise that keeps the rest from learning.
SHAPE_STEPS = 1500
# Patches that are encoded in the first steps, and what counts as drawn in: standard deviation of
# pixel values.
KEPT_PATCHES, MIN_CONTRAST = 24, 0.1


def build_config(tokenizer) -> MplugOwl2Config:
    num_tokens = len(tokenizer) - 1
    initialised = {"initializer_range": 0.05}
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    abstractor = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = {
        "hidden_size": 160,
        "intermediate_size": 432,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return MplugOwl2Config(
        vision_config={
            **vision,
            **initialised,
            "image_size": SIDE,
            "patch_size": 8,
            "hidden_act": "gelu",
        },
        abstractor_config={**abstractor, **initialised, "num_learnable_queries": 8},
        text_config={
            **text,
            **special,
            "initializer_range": 0.04,
            "num_key_value_heads": text["num_attention_heads"],
            "vocab_size": padded_vocab_size(num_tokens),
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
        },
        image_token_id=num_tokens,
        output_vocab_size=num_tokens,
        tie_word_embeddings=True,
    )


def normalise(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) from 0 to 1 -> the model's pixel values."""
    return (pictures - MEAN) / STD


def vary_emoji(rgba: Tensor, may_flip: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 4, H, W) uint8 -> (N, 3, H, W) from 0 to 1: moved, turned, scaled, recoloured, on grounds
    of many colours.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    n = len(rgba)
    pictures = rgba.float() / 255
    pictures = torch.cat([pictures[:, :3] * pictures[:, 3:], pictures[:, 3:]], dim=1)
    angle, zoom, stretch = uniform(-0.25, 0.25, n), uniform(0.9, 1.4, n), uniform(0.88, 1.14, n)
    flip = torch.where(may_flip & (uniform(0, 1, n) < 0.5), -1.0, 1.0)
    rows = torch.stack([
        torch.stack([zoom * stretch * angle.cos() * flip, -zoom * angle.sin(), uniform(-0.15, 0.15, n)], dim=1),
        torch.stack([zoom * stretch * angle.sin() * flip, zoom * angle.cos(), uniform(-0.15, 0.15, n)], dim=1),
    ], dim=1)  # fmt: skip
    grid = nn.functional.affine_grid(rows, list(pictures.shape), align_corners=False)
    pictures = nn.functional.grid_sample(pictures, grid, align_corners=False)
    color, alpha = pictures[:, :3], pictures[:, 3:]
    gray = color.mean(1, keepdim=True)
    color = gray + (color - gray) * uniform(0.4, 1.5, n, 1, 1, 1)
    color = color * uniform(0.7, 1.25, n, 1, 1, 1) + alpha * uniform(-0.12, 0.12, n, 3, 1, 1)
    ground = uniform(0, 1, n, 3, 1, 1)
    ground = torch.where(uniform(0, 1, n, 1, 1, 1) < 0.6, torch.ones(()), ground)
    return (color.clamp(0, 1) + ground * (1 - alpha)).clamp(0, 1)


def vary_shapes(pictures: Tensor, rng: random.Random) -> Tensor:
    """(N, 3, H, W) uint8 -> the same from 0 to 1, mirrored and transposed: no question asks about
    sides.
    """
    if rng.random() < 0.5:
        pictures = pictures.flip(2)
    if rng.random() < 0.5:
        pictures = pictures.flip(3)
    if rng.random() < 0.5:
        pictures = pictures.transpose(2, 3)
    return pictures.float() / 255


def patch_contrast(pixel_values: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) -> (N, P), how much is drawn in each patch."""
    pixels = nn.functional.unfold(pixel_values, side, stride=side).unflatten(1, (3, -1))
    return pixels.std(2).amax(1)


def encode_busiest(
    vision_tower: nn.Module, pixel_values: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Encode no more of each picture than the patches in which most is drawn, for a third of the
    cost.

    Returns:
        (N, count, C) features, and (N, count), True where anything is drawn.
    """
    hidden_states = vision_tower.embeddings(pixel_values)
    contrast, kept = patch_contrast(pixel_values, vision_tower.config.patch_size).topk(count, dim=1)
    patches = hidden_states[:, 1:].gather(
        1, kept[..., None].expand(-1, -1, hidden_states.shape[-1])
    )
    hidden_states = torch.cat([hidden_states[:, :1], patches], dim=1)
    for layer in vision_tower.layers:
        hidden_states = layer(hidden_states)
    return vision_tower.post_layernorm(hidden_states)[:, 1:], contrast > MIN_CONTRAST


class Classifier(nn.Module):
    """Linear heads that only training has: colour, shape, group and name of what the mean feature
    shows.
    """

    def __init__(self, width: int, num_classes: tuple[int, ...]):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in num_classes)

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        """(N, P, D) features of pictures, (N, 4) classes with -100 where none is known -> the
        losses of the heads.
        """
        pooled = self.norm(features.mean(1))
        losses = [
            nn.functional.cross_entropy(head(pooled), classes[:, i])
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses)


def each_patch(patches: Tensor, drawn: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Each patch in which anything is drawn has to tell what the whole picture shows.

    Its own edges already tell a little, so learning starts there.

    Args:
        patches: (N, P, C) features.
        drawn: (N, P), True where anything is drawn.
        classes: (N, 4).

    Returns:
        (F, 1, C) and (F, 4).
    """
    return patches[drawn][:, None], classes[:, None].expand(-1, drawn.shape[1], -1)[drawn]


class ModelWithClassifiers(MplugOwl2ForConditionalGeneration):
    """The model with the heads that its training needs on top."""

    _auto_class = None  # a checkpoint is not to be loaded as one of the package's models

    def __init__(self, config: MplugOwl2Config, num_classes: tuple[int, ...]):
        super().__init__(config)
        widths = {
            "encoded": config.vision_config.hidden_size,
            "tokens": config.text_config.hidden_size,
        }
        self.classifier = nn.ModuleDict(
            {name: Classifier(width, num_classes) for name, width in widths.items()}
        )

    def loss_of_classes(self, pixel_values: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        """What is descended at first: the classes of pictures (N, 3, H, W), with the weights (4,)
        of the heads.
        """
        patches, drawn = encode_busiest(self.model.vision_tower, pixel_values, KEPT_PATCHES)
        return weighted(self.classifier["encoded"](*each_patch(patches, drawn, classes)), weights)

    def loss_of_answers(
        self, pixel_values: Tensor, classes: Tensor, weights: Tensor, **row: Tensor
    ) -> Tensor:
        """What is descended then: the answers, and the classes less."""
        features = self.get_image_features(pixel_values)
        drawn = patch_contrast(pixel_values, self.config.vision_config.patch_size) > MIN_CONTRAST
        patches = each_patch(features.last_hidden_state[:, 1:], drawn, classes)
        loss = weighted(self.classifier["encoded"](*patches), weights)
        loss = loss + weighted(
            self.classifier["tokens"](torch.stack(features.pooler_output), classes), weights
        )
        return self(**row, mm_encoder_outputs={"image": features}).loss + 0.2 * loss


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """The losses of the heads (colour, shape, group, name), some of them without a target, as
    one.
    """
    return (losses * weights).nansum()


@torch.no_grad()
def initialise_embeddings(
    model: MplugOwl2ForConditionalGeneration, pixel_values: Tensor, floor: float = 0.02
) -> None:
    """Start from whitened patches and sin-cos positions.

    Drawn at random, both edges and positions are drowned by the brightness of the ground and take
    long to be learned.

    Args:
        pixel_values: (N, 3, H, W) sample of training pictures.
    """
    embeddings = model.model.vision_tower.embeddings
    weight = embeddings.patch_embedding.weight
    patches = nn.functional.unfold(pixel_values, weight.shape[-1], stride=weight.shape[-1])
    patches = patches.transpose(1, 2).flatten(0, 1)  # (patches, 3 * side * side)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    values, vectors = values.flip(0)[: len(weight)], vectors.flip(1)[:, : len(weight)]
    weight.copy_((vectors / (values + floor).sqrt()).T.view_as(weight))
    embeddings.position_embedding.copy_(image_position_table(model.config.abstractor_config))


class Batches(Dataset):
    """The batches of all steps; the number of the step alone decides what is drawn.

    Args:
        num_steps: Steps in all.
        num_vision_steps: First steps, on classes of pictures alone.
    """

    def __init__(
        self,
        emoji: list[Emoji],
        encoder: RowEncoder,
        seed: int,
        num_steps: int,
        num_vision_steps: int,
    ):
        self.emoji, self.encoder, self.seed = emoji, encoder, seed
        self.num_steps, self.num_vision_steps = num_steps, num_vision_steps
        self.shapes, self.shape_pairs = load_easy_vqa("train")
        self.shape_classes = torch.tensor([shape_classes(pairs) for pairs in self.shape_pairs])
        self.styles = [load_style(style) for style in STYLES]
        self.questions = Questions(emoji, random.Random(0))
        group_names = sorted({one.group for one in emoji})
        self.groups = torch.tensor([group_names.index(one.group) for one in emoji])
        self.num_classes = (len(COLORS), len(SHAPES), len(group_names), len(emoji))
        self.may_flip = torch.tensor([one.may_flip for one in emoji])
        usable = [not one.held_out for one in emoji]
        # What the model only tells the kind of is shown less often, and flags, which are many,
        # least.
        weights = [[0.05 if one.name == "flag" else 1.0 if one.named else 0.2] for one in emoji]
        # (emoji * styles,)
        self.weights = torch.cat(
            [
                weight * there[:, None] * torch.tensor(usable)[:, None] * torch.tensor(weights)
                for (_, there), weight in zip(self.styles, STYLE_WEIGHTS, strict=True)
            ],
            dim=1,
        ).flatten()

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        weights = torch.tensor([1.0, 1.0, 1.0, 0.3 if step < SHAPE_STEPS else 1.0])
        if step < self.num_vision_steps:
            pixel_values, classes, _, _ = self.pictures(step)
            return {"pixel_values": pixel_values, "classes": classes, "weights": weights}
        row, pixel_values, classes = self.rows(step)
        return {**row, "pixel_values": pixel_values, "classes": classes, "weights": weights}

    def pictures(self, step: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Pixel values (N, 3, H, W), classes (N, 4), and which shape and emoji pictures were
        drawn.
        """
        rng = random.Random(self.seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        num_shapes, num_emoji = (20, 16) if step < SHAPE_STEPS else (8, 40)
        shapes = [rng.randrange(len(self.shapes)) for _ in range(num_shapes)]
        drawn = torch.multinomial(self.weights, num_emoji, generator=generator)
        emoji, style = drawn // len(STYLES), drawn % len(STYLES)
        rgba = torch.stack(
            [self.styles[s][0][e] for e, s in zip(emoji.tolist(), style.tolist(), strict=True)]
        )
        pictures = torch.cat(
            [
                vary_shapes(self.shapes[shapes], rng),
                vary_emoji(rgba, self.may_flip[emoji], generator),
            ]
        )
        unknown = torch.full_like(emoji, -100)
        emoji_classes = torch.stack([unknown, unknown, self.groups[emoji], emoji], dim=1)
        classes = torch.cat([self.shape_classes[shapes], emoji_classes])
        return normalise(pictures), classes, shapes, emoji.tolist()

    def rows(self, step: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Questions of a step as the model takes them, the pixel values (N, 3, H, W) and classes
        (N, 4).
        """
        pixel_values, classes, shapes, emoji = self.pictures(step)
        self.questions.rng = random.Random(self.seed * 1_000_003 + step)
        rows = [
            (True, self.questions.about_shape(self.shape_pairs[i], QUESTIONS_A_SHAPE))
            for i in shapes
        ]
        rows += [(True, self.questions.about_emoji(self.emoji[i])) for i in emoji]
        rows += [
            (False, [self.questions.without_picture() for _ in range(NUM_TEXT_QUESTIONS)])
            for _ in range(NUM_TEXT)
        ]
        return self.encoder(rows), pixel_values, classes


def shape_classes(pairs: list[tuple[str, str]]) -> list[int]:
    """Classes of an easy-VQA picture as far as its questions other than yes/no tell them."""
    words = {
        word for q, a in pairs if a not in ("yes", "no") for word in (*q.rstrip("?").split(), a)
    }
    color = [i for i, name in enumerate(COLORS) if name in words]
    shape = [i for i, name in enumerate(SHAPES) if name in words]
    return [*(color or [-100])[:1], *(shape or [-100])[:1], -100, -100]


def rate_factor(step: int, steps: int, decay_steps: int, warmup: int = 150) -> float:
    """Warm-up, plateau, and a decay to zero over the last steps."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay_steps))


@torch.no_grad()
def exact_answers(
    model, encoder: RowEncoder, pictures: Tensor | None, rows: list[list[tuple[str, str]]]
) -> list[bool]:
    """Whether greedy decoding gives each answer to the letter: every token of it is the likeliest
    after those before.

    Args:
        pictures: (R, 3, H, W) uint8, one for each of the `rows`; `None` for questions without
            pictures.
    """
    was_training = model.training
    model.eval()
    right = []
    for start in range(0, len(rows), 64):
        batch = encoder([(pictures is not None, pairs) for pairs in rows[start : start + 64]])
        labels = batch.pop("labels")
        if pictures is not None:
            batch["pixel_values"] = normalise(pictures[start : start + 64].float() / 255)
        hits = model(**batch).logits[:, :-1].argmax(-1).eq(labels[:, 1:])
        for row_labels, row_hits in zip(labels[:, 1:], hits, strict=True):
            ends = row_labels.eq(encoder.tokenizer.eos_token_id).nonzero().flatten().tolist()
            first = 0
            for end in ends:
                wanted = row_labels[first : end + 1] != -100
                right.append(bool(row_hits[first : end + 1][wanted].all()))
                first = end + 1
    model.train(was_training)
    return right


def quick_scores(model, encoder: RowEncoder, emoji: list[Emoji]) -> dict[str, float]:
    """Held-out accuracies on parts of the test sets, to watch a run."""
    shapes, pairs = load_easy_vqa("test")
    twitter, there = load_style("twitter")
    seen = [i for i, one in enumerate(emoji) if one.named and there[i] and not one.held_out][::4]
    names = [[("What is this?", emoji[i].name)] for i in seen]
    kinds = [[("What kind of thing is it?", emoji[i].group)] for i in seen]
    noto = load_style("noto")[0]
    results = {
        "easy-VQA": exact_answers(model, encoder, shapes[:200], pairs[:200]),
        "name, unseen artist": exact_answers(model, encoder, on_white(twitter[seen]), names),
        "kind, unseen artist": exact_answers(model, encoder, on_white(twitter[seen]), kinds),
        "name, trained picture": exact_answers(model, encoder, on_white(noto[seen]), names),
        "text only": exact_answers(
            model, encoder, None, [[pair] for pair in text_only_test(emoji)]
        ),
    }
    return {name: round(sum(right) / len(right), 4) for name, right in results.items()}


def export(trained: ModelWithClassifiers, tokenizer, folder: Path) -> None:
    """Write model and processor as the package holds them, weights rounded to 16 bits."""
    model = MplugOwl2ForConditionalGeneration(trained.config).to(torch.bfloat16)
    weights = {
        name: value
        for name, value in trained.state_dict().items()
        if not name.startswith("classifier.")
    }
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=24, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model.save_pretrained(folder)
    image_processor = MplugOwl2ImageProcessor(size={"height": SIDE, "width": SIDE})
    num_image_tokens = model.config.num_image_tokens
    MplugOwl2Processor(
        image_processor, tokenizer, num_image_tokens=num_image_tokens
    ).save_pretrained(folder)


class DefaultModelTrainer(Owl2Trainer):
    """A Trainer whose batches are those of `Batches`, and whose evaluation is a part of the test
    sets.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        return (
            model.loss_of_answers(**inputs)
            if "input_ids" in inputs
            else model.loss_of_classes(**inputs)
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        batches = self.train_dataset
        scores = quick_scores(self.model, batches.encoder, batches.emoji)
        self.log(scores)
        return scores


def optimizer_of(model: nn.Module, peak: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-6)


def build_trainer(args: argparse.Namespace) -> DefaultModelTrainer:
    """Model, data and optimizer as the arguments say."""
    torch.manual_seed(args.seed)
    emoji = load_emoji()
    tokenizer = train_tokenizer(emoji, load_easy_vqa("train")[1], args.vocab_size)
    config = build_config(tokenizer)
    batches = Batches(
        emoji,
        RowEncoder(tokenizer, config.num_image_tokens),
        args.seed,
        args.steps,
        args.vision_steps,
    )
    model = ModelWithClassifiers(config, batches.num_classes)
    initialise_embeddings(model, torch.cat([batches.pictures(step)[0] for step in range(40)]))
    optimizer = optimizer_of(model, args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, args.steps, args.decay_steps)
    )
    arguments = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=1,  # a batch of rows
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        max_grad_norm=1.0,
        logging_steps=args.log_every,
        save_steps=args.save_every,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=args.save_every,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=args.seed,
    )
    return DefaultModelTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        eval_dataset=batches,
        data_collator=lambda batch: batch[0],
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the model and of checkpoints to go on from",
    )
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument(
        "--vision-steps", type=int, default=6500, help="first steps, on classes of pictures alone"
    )
    parser.add_argument("--decay-steps", type=int, default=650)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vocab-size", type=int, default=1400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def run(args: argparse.Namespace) -> DefaultModelTrainer:
    """Train from the last checkpoint in the folder, if there is one, and write the model."""
    trainer = build_trainer(args)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.out))
    export(trainer.model, trainer.processing_class, args.out / "model")
    return trainer


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    run(args)


if __name__ == "__main__":
    main()
