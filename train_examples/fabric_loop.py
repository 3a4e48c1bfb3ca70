"""The plain loop on several devices, with Lightning Fabric: every rank filters its own share of the shards.

    python train_examples/fabric_loop.py --accelerator cpu --devices 2       # drawn scenes, a small CLIP
    python train_examples/fabric_loop.py --accelerator cpu --devices 2 --steps 200 --resume fabric_loop.ckpt
    python train_examples/fabric_loop.py --devices 8 --shards 'data/*.tar' --model openai/clip-vit-base-patch32 \
        --threshold 0.25
"""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.fabric import Fabric
from small_clip import SmallClip, demo_shards, image_view, text_view

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
from clipfilter_wds.demo.run import demo_threshold


def main(
    *,
    accelerator: str = "auto",
    devices: int = 1,
    shards: str | None = None,
    model: str = "demo-tiny",
    threshold: float = demo_threshold(),
    steps: int = 100,
    batch_size: int = 32,
    num_workers: int = 1,
    learning_rate: float = 1e-3,
    checkpoint: Path = Path("fabric_loop.ckpt"),
    save_every: int = 50,
    resume: Path | None = None,
) -> None:
    """Train a small CLIP on several devices, on the pairs that a pretrained one finds well described.

    Args:
        accelerator: cpu, cuda or auto.
        devices: Processes to run, each with a device of its own.
        shards: A path, glob or brace range; by default, the demo's drawn scenes.
        model: The CLIP that filters: a Hugging Face hub id, a local folder, or demo-tiny (drawn scenes only).
        threshold: Keep a pair when its cosine is at least this; 0.25 suits OpenAI's CLIPs.
        steps: Training steps in all, those before a resume included.
        batch_size: Pairs per step and rank, all of them kept ones.
        num_workers: Processes that read and decode, per rank.
        learning_rate: Of AdamW.
        checkpoint: File that is written now and then, and at the end.
        save_every: Steps between two checkpoints.
        resume: Checkpoint to resume from, on any number of devices.
    """
    fabric = Fabric(accelerator=accelerator, devices=devices)
    fabric.launch()
    fabric.seed_everything(0)
    with fabric.rank_zero_first():
        shards = shards or demo_shards()

    # After launch(), so that the loader finds this rank; each has its own copy of the filter on its device.
    scorer = ClipScorer(model, device=fabric.device)
    dataset = ClipWebDataset(
        shards, scorer.preprocess, image_transform=image_view, text_transform=text_view, shuffle=1000, seed=0
    )
    # end="sync", the default: an epoch is over for all ranks when the first has no further batch.
    loader = ClipFilterLoader(
        dataset, scorer, threshold=threshold, batch_size=batch_size, num_workers=num_workers, drop_last=True
    )

    clip = SmallClip()
    clip, optimizer = fabric.setup(clip, torch.optim.AdamW(clip.parameters(), lr=learning_rate))
    step = 0
    if resume is not None:
        saved = fabric.load(resume, {"clip": clip, "optimizer": optimizer}, weights_only=True)
        loader.load_state_dict(saved["loaders"])
        step = saved["step"]

    while step < steps:
        for batch in loader:
            loss = clip(fabric.to_device(batch["image"]), fabric.to_device(batch["text"]))
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            step += 1
            if step % 10 == 0:
                fabric.print(f"step {step}: loss {loss.item():.4f}, kept {loader.stats.keep_rate:.1%} of rank 0's")
            if step % save_every == 0 or step == steps:
                loaders = gather(fabric, loader.state_dict())
                fabric.save(checkpoint, {"clip": clip, "optimizer": optimizer, "loaders": loaders, "step": step})
            if step == steps:
                break


def gather(fabric: Fabric, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's state: only rank 0 writes the checkpoint, and each rank is somewhere else in its shards."""
    if fabric.world_size == 1:
        return [state]
    states: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(states, state)
    return states


if __name__ == "__main__":
    auto_cli(main)
