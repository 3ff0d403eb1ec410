"""Image classification on Accelerate: the one training loop of the zoo and of every arm that is compared."""

import logging
import math
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneConfig:
    """How a classifier is trained. The defaults are the paper's for generated models (Adam 1e-3, five epochs)."""

    epochs: int = field(default=5, metadata={"help": "Passes over the training images."})
    batch_size: int = field(default=64, metadata={"help": "Images a step and process."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled, on matrices and kernels; 0 makes AdamW Adam."}
    )
    schedule: str = field(default="constant", metadata={"help": "'constant', or 'onecycle' over the whole run."})
    mixed_precision: str = field(default="no", metadata={"help": "'no' or 'bf16', as in Accelerate."})
    seed: int = field(default=0, metadata={"help": "Of the data order, dropout and stochastic depth."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where a GPU is present."})

    def __post_init__(self):
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(f"epochs={self.epochs}, batch_size={self.batch_size}: epochs >= 0, batch_size >= 1.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        if self.schedule not in ("constant", "onecycle"):
            raise ValueError(f"schedule={self.schedule!r} is not known; choose 'constant' or 'onecycle'.")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} is not known; choose 'no' or 'bf16'.")


@dataclass(frozen=True)
class EpochMetrics:
    """After `epoch` passes over the training images; epoch 0 is the model as it was given."""

    epoch: int
    train_loss: float | None
    validation_loss: float
    validation_accuracy: float


def finetune(
    model: nn.Module,
    train: Dataset,
    validation: Dataset,
    config: FinetuneConfig | None = None,
    progress: bool = True,
) -> list[EpochMetrics]:
    """Trains a classifier in place and measures it after every epoch, and once before.

    Two runs with the same seed see the same images in the same order, whatever model they train: the arms of a
    comparison differ in their initial weights and in nothing else.

    Args:
        model: images `[batch, channels, height, width]` to logits `[batch, classes]`; moved to Accelerate's device.
        train, validation: map-style datasets of (image float tensor, label int).
        config: see `FinetuneConfig`.
        progress: show a bar over the steps.

    Returns:
        `epochs + 1` metrics, the first one before training.

    Raises:
        ValueError: no images, or a label that the model has no logit for.
        FloatingPointError: the training loss is not finite.
    """
    config = config or FinetuneConfig()
    for name, dataset in (("training", train), ("validation", validation)):
        if len(dataset) == 0:
            raise ValueError(f"The {name} dataset is empty; it must hold at least one image.")
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.use_cpu)
    set_seed(config.seed)
    # A generator of its own: the order must not depend on what else has drawn random numbers.
    order = torch.Generator().manual_seed(config.seed)
    # A last batch of one image is dropped: batch norm cannot be trained on it.
    drop_last = len(train) > 1 and len(train) % config.batch_size == 1
    loader = DataLoader(train, batch_size=config.batch_size, shuffle=True, generator=order, drop_last=drop_last)
    model.to(memory_format=torch.channels_last)  # depthwise convolutions take half the time on a CPU
    optimizer = _adamw(model, config)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    validation_loader = accelerator.prepare(DataLoader(validation, batch_size=256))
    scheduler = None
    if config.schedule == "onecycle" and config.epochs:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer.optimizer, max_lr=config.learning_rate, total_steps=config.epochs * len(loader)
        )
    history = [EpochMetrics(0, None, *_evaluate(accelerator, prepared, validation_loader))]
    hide_bar = not (progress and accelerator.is_local_main_process)
    with tqdm(total=config.epochs * len(loader), desc="fine-tune", unit="step", disable=hide_bar) as bar:
        for epoch in range(1, config.epochs + 1):
            train_loss = _train_epoch(accelerator, prepared, optimizer, scheduler, loader, bar)
            if not math.isfinite(train_loss):
                raise FloatingPointError(
                    f"The training loss of epoch {epoch} is {train_loss}: the run has diverged. "
                    f"Lower the learning rate (now {config.learning_rate}) or train in float32."
                )
            metrics = EpochMetrics(epoch, train_loss, *_evaluate(accelerator, prepared, validation_loader))
            history.append(metrics)
            bar.set_postfix(accuracy=f"{metrics.validation_accuracy:.3f}")
            logger.debug("%s", metrics)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # takes the autocast off `model.forward` again
    model.to(memory_format=torch.contiguous_format)
    return history


def evaluate_classifier(
    model: nn.Module, dataset: Dataset, batch_size: int = 256, use_cpu: bool = False
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a classifier in eval mode, on Accelerate's device.

    Args:
        model: images `[batch, channels, height, width]` to logits `[batch, classes]`.
        dataset: map-style dataset of (image float tensor, label int).
        batch_size: images at a time; does not change the result beyond rounding.
        use_cpu: stay on the CPU where a GPU is present.
    """
    accelerator = Accelerator(cpu=use_cpu)
    model, loader = accelerator.prepare(model, DataLoader(dataset, batch_size=batch_size))
    return _evaluate(accelerator, model, loader)


def _adamw(model: nn.Module, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only: a norm's scale or a bias has nothing to gain from it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _train_epoch(accelerator, model, optimizer, scheduler, loader, bar) -> float:
    model.train()
    total, count = torch.zeros((), device=accelerator.device), 0
    for images, labels in loader:
        loss = cross_entropy(_logits(model, images, labels), labels)
        accelerator.backward(loss)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        total += loss.detach() * len(labels)
        count += len(labels)
        bar.update()
    totals = accelerator.reduce(torch.stack([total, torch.tensor(float(count), device=total.device)]))
    return (totals[0] / totals[1]).item()


@torch.no_grad()
def _evaluate(accelerator, model, loader) -> tuple[float, float]:
    was_training = model.training
    model.eval()
    losses, hits = [], []
    for images, labels in loader:
        logits = _logits(model, images, labels).float()
        loss = cross_entropy(logits, labels, reduction="none")
        # Gathered image by image, so that the images that pad the last batch of several processes are dropped.
        loss, hit = accelerator.gather_for_metrics((loss, logits.argmax(1) == labels))
        losses.append(loss)
        hits.append(hit)
    model.train(was_training)
    return torch.cat(losses).double().mean().item(), torch.cat(hits).double().mean().item()


def _logits(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(images.contiguous(memory_format=torch.channels_last))
    if int(labels.max()) >= logits.shape[-1]:
        raise ValueError(
            f"Label {int(labels.max())} has no logit: the model gives logits of shape {tuple(logits.shape)}. "
            f"Build it with num_classes={int(labels.max()) + 1} or more."
        )
    return logits
