"""Train ResNet-50, or another of torchvision's classifiers, on folders of images: by one-bit vote, or by torch DDP.

Defaults are those of "signSGD with Majority Vote is Communication Efficient and Fault Tolerant" (Bernstein et al.,
2018) and of the authors' commands, for Signum and for their baseline, SGD.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import hashlib
import importlib.util
import inspect
import math
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import Batches, batches_of, make_loader
from flags import HelpFormatter, add_flags, amount, count, end_if_any, parse, rate, said_once, whole
from torch import distributed, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.utils.data import Dataset
from training import distribute, take_device, train

import mpisign

EXAMPLES = """\
examples:
  mpirun -n 8 python scripts/train_imagenet.py --data /data/imagenet --precision bf16 --checkpoint-dir out/ckpt
  mpirun -n 8 python scripts/train_imagenet.py --data /data/imagenet --method lion:beta1=0.95,beta2=0.98 --lr 3e-5
  mpirun -n 8 python scripts/train_imagenet.py --data /data/imagenet --baseline ddp --log-dir out/ddp
  mpirun -n 8 python scripts/train_imagenet.py --data synthetic --epochs 1 --max-steps 100 --log-dir out/speed

DIR holds train/CLASS/*.JPEG and val/CLASS/*.JPEG. --method takes a method's arguments behind a colon.
"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue


def import_torchvision() -> Any:
    """torchvision, also where its compiled operators do not load; None if it is not installed.

    They do not where torch was built for CPUs and torchvision, as the package index has it, for CUDA. No classifier
    needs one, but the import does not get past two that nobody has declared.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


torchvision = import_torchvision()  # here, as DataLoader workers read this file before they unpickle a dataset


def main() -> None:
    mpisign.init()
    args = parse_arguments()
    device = take_device()
    torch.backends.cudnn.benchmark = True  # all batches of training have one shape
    training_set, validation_set, classes = synthetic_images(args) if args.data == "synthetic" else image_folders(args)
    batches = Batches(training_set, args.batch_size, args.seed, args.workers, drop_last=True)
    mine = range(mpisign.rank(), len(validation_set), mpisign.size())  # none twice; ranks may have one more than others
    validation = make_loader(validation_set, args.batch_size, mine, args.workers)

    torch.manual_seed(args.seed)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = torchvision.models.get_model(args.model, num_classes=classes).to(device, memory_format=layout)
    torch.manual_seed(args.seed + mpisign.rank())  # of dropout
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    ddp = args.baseline == "ddp"
    network = in_ddp(model, device) if ddp else model
    optimizer = sgd if ddp else distribute(args, model, sgd, args.method, args.seed)

    def loss_of(batch: Sequence[torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(network(images.contiguous(memory_format=layout)), labels)

    def evaluate() -> dict[str, float]:
        """Loss and accuracies in percent, over the whole validation set. **Collective.**"""
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in batches_of(validation):
            images, labels = (part.to(device, non_blocking=True) for part in batch)
            logits = model(images.contiguous(memory_format=layout)).float()
            hits = logits.topk(min(5, classes)).indices == labels[:, None]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        loss, top1, top5 = np.sum(mpisign.allgather_object(sums.tolist()), axis=0) / len(validation_set)
        return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}

    schedule = partial(rate_after, warmup=args.warmup_epochs, decay=args.decay_epochs)
    train(args, model, optimizer, batches, loss_of, schedule, evaluate)


def rate_after(epoch: float, warmup: float, decay: float) -> float:
    """The learning rate as a share of its highest: up from a tenth in ``warmup`` epochs, a tenth each ``decay``."""
    warm = min(1.0, 0.1 + 0.9 * epoch / warmup) if warmup else 1.0
    return float(warm * 0.1 ** math.floor(epoch / decay))


def in_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in torch DDP, whose processes find each other through our ranks. **Collective.**"""
    store, meeting = None, None
    if mpisign.rank() == 0:
        host = socket.gethostname() if mpisign.num_nodes() > 1 else "127.0.0.1"
        store = TCPStore(host, 0, mpisign.size(), is_master=True, wait_for_workers=False)
        meeting = host, store.port
    host, port = mpisign.broadcast_object(meeting)
    store = store or TCPStore(host, port, mpisign.size(), is_master=False)
    gpu = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=mpisign.rank(), world_size=mpisign.size()
    )
    atexit.register(distributed.destroy_process_group)
    ddp = nn.parallel.DistributedDataParallel
    # train() takes BatchNorm's statistics from rank 0 when they matter; the flag has another name since torch 2.13.
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return ddp(model, device_ids=[device] if gpu else None, gradient_as_bucket_view=True, **options)


# ---------------------------------------------------------------------------------------------------- the data


def image_folders(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Training images, cropped and flipped at random; validation images; the number of classes. **Collective.**"""
    transforms, crop = torchvision.transforms, args.crop
    finish = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augment = [transforms.RandomResizedCrop(crop), transforms.RandomHorizontalFlip(), *finish]
    centre = [transforms.Resize(crop * 256 // 224), transforms.CenterCrop(crop), *finish]
    sets, problem = [], None
    try:
        for part, steps in (("train", augment), ("val", centre)):
            folder = str(Path(args.data, part))
            sets.append(torchvision.datasets.ImageFolder(folder, transforms.Compose(steps), loader=load_image))
        if sets[0].classes != sets[1].classes:
            odd = sorted(set(sets[0].classes) ^ set(sets[1].classes))
            problem = f"train and val in {args.data} differ in classes: {odd[0]} is only in one of them"
    except OSError as error:
        problem = f"{error}; --data DIR must hold train/CLASS/*.JPEG and val/CLASS/*.JPEG"
    end_if_any(problem)

    names = [str(Path(name).relative_to(args.data)) for images in sets for name, _ in images.samples]
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=4).hexdigest()
    mine = f"{len(sets[0].classes)} classes, {len(sets[0])} and {len(sets[1])} images, names' hash {digest}"
    others = mpisign.broadcast_object(mine)
    differs = (
        f"{args.data} has other images here than on rank 0 ({mine}; there {others}): all nodes need the same files"
    )
    end_if_any(None if mine == others else differs)
    return sets[0], sets[1], len(sets[0].classes)


def load_image(path: str) -> Any:
    try:
        return torchvision.datasets.folder.default_loader(path)
    except OSError as error:  # which does not always say which file
        raise OSError(f"{path} cannot be read as an image: {error}. Replace it, or remove it on all nodes") from error


class Noise(Dataset):
    """Images without a disk: each is another window into one large picture of noise. Nothing can be learned."""

    def __init__(self, length: int, crop: int, classes: int) -> None:
        self._length = length
        self._crop = crop
        self._classes = classes
        self._picture = torch.randn(3, crop + 64, crop + 64, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        top, left = index // 64 % 64, index % 64
        return self._picture[:, top : top + self._crop, left : left + self._crop], index % self._classes


def synthetic_images(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """As many images as ImageNet has, or ``--synthetic-images``, and a 25th for validation, in 1000 classes."""
    images = args.synthetic_images
    return Noise(images, args.crop, 1000), Noise(-(-images // 25), args.crop, 1000), 1000


# ------------------------------------------------------------------------------------------------- the options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --data DIR [OPTIONS]", description=__doc__, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR|synthetic", help="the folder of images, or noise to measure speed with")
    add("--synthetic-images", type=whole, default=1281167, metavar="N", help="of noise, to train on")
    add("--model", default="resnet50", metavar="NAME", help="a classifier of torchvision.models, such as resnet18")
    add("--crop", type=whole, default=224, metavar="PIXELS", help="width and height of what the model sees")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="how images lie in memory")
    add("--baseline", choices=["ddp"], help="average gradients by torch DDP (nccl or gloo) instead of --method")
    add("--lr", type=rate, metavar="RATE", help="learning rate (default: 1e-4, ddp: 0.1)")
    add(
        "--weight-decay",
        type=amount,
        help="times the learning rate, what weights lose a step (default: 0.1, ddp: 1e-4)",
    )
    add("--momentum", type=amount, metavar="X", help="of SGD; a vote's is in --method (default: 0, ddp: 0.9)")
    add("--warmup-epochs", type=amount, default=5.0, metavar="N", help="in which the learning rate rises from a tenth")
    add("--decay-epochs", type=rate, default=30.0, metavar="N", help="after which it falls to a tenth, again and again")
    add("--seed", type=count, default=0, metavar="N", help="of weights, order of images, crops, coins")
    add("--workers", type=count, default=4, metavar="N", help="processes a rank that load images; 0: the rank itself")
    add_flags(parser, epochs=90, batch_size=128)
    with said_once():
        args = parse(parser)
        if torchvision is None:
            parser.error("this needs torchvision, which is not installed; in the checkout: pip install '.[imagenet]'")
        # The auxiliary heads of these two need a loss of their own.
        known = set(torchvision.models.list_models(torchvision.models)) - {"googlenet", "inception_v3"}
        if args.model not in known:
            near = difflib.get_close_matches(args.model, known) or ["resnet18", "resnet50"]
            parser.error(f"--model {args.model} is not a classifier that torchvision has here: try {', '.join(near)}")
    defaults = {"lr": 0.1, "weight_decay": 1e-4, "momentum": 0.9}
    if args.baseline is None:
        defaults = {"lr": 1e-4, "weight_decay": 0.1, "momentum": 0.0}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
