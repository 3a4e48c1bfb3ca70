"""Train on filtered pairs in a plain PyTorch loop, stop whenever you like, and resume exactly there.

python train_examples/plain_loop.py                          # drawn scenes, a small CLIP, some seconds on a CPU
python train_examples/plain_loop.py --steps 200 --resume plain_loop.pt
python train_examples/plain_loop.py --shards 'data/*.tar' --model openai/clip-vit-base-patch32 --threshold 0.25
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli
from small_clip import SmallClip, demo_shards, image_view, text_view

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
from clipfilter_wds.demo.run import demo_threshold


def main(
    *,
    shards: str | None = None,
    model: str = "demo-tiny",
    threshold: float = demo_threshold(),
    steps: int = 100,
    batch_size: int = 32,
    num_workers: int = 1,
    learning_rate: float = 1e-3,
    checkpoint: Path = Path("plain_loop.pt"),
    save_every: int = 50,
    resume: Path | None = None,
) -> None:
    """Train a small CLIP on the pairs that a pretrained one finds well described.

    Args:
        shards: A path, glob or brace range; by default, the demo's drawn scenes.
        model: The CLIP that filters: a Hugging Face hub id, a local folder, or demo-tiny (drawn scenes only).
        threshold: Keep a pair when its cosine is at least this; 0.25 suits OpenAI's CLIPs.
        steps: Training steps in all, those before a resume included.
        batch_size: Pairs per step, all of them kept ones.
        num_workers: Processes that read and decode.
        learning_rate: Of AdamW.
        checkpoint: File that is written now and then, and at the end.
        save_every: Steps between two checkpoints.
        resume: Checkpoint to resume from.
    """
    torch.manual_seed(0)
    # The filter: shards -> samples -> scores -> the pairs that are kept, in batches of constant size.
    scorer = ClipScorer(model)
    dataset = ClipWebDataset(
        shards or demo_shards(),
        scorer.preprocess,
        image_transform=image_view,
        text_transform=text_view,
        shuffle=1000,
        seed=0,
    )
    loader = ClipFilterLoader(
        dataset, scorer, threshold=threshold, batch_size=batch_size, num_workers=num_workers, drop_last=True
    )

    clip = SmallClip().to(scorer.device)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=learning_rate)
    step = 0
    if resume is not None:
        saved = torch.load(resume, map_location=scorer.device, weights_only=True)
        clip.load_state_dict(saved["clip"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        step = saved["step"]

    while step < steps:
        for batch in loader:  # one epoch, or what a resumed one has left
            loss = clip(batch["image"].to(scorer.device), batch["text"].to(scorer.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 10 == 0:
                print(f"step {step}: loss {loss.item():.4f}, kept {loader.stats.keep_rate:.1%} of {loader.stats.seen}")
            if step % save_every == 0 or step == steps:
                states = {"clip": clip.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
                torch.save({**states, "step": step}, checkpoint)
            if step == steps:
                break


if __name__ == "__main__":
    auto_cli(main)
