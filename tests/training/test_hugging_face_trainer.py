"""The Hugging Face Trainer, as docs/pipelines.md has it: it resumes with the very next batch."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments

NUM_STEPS, SAVED_AT = 10, 4


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, image):
        return self.layer(image.float().reshape(len(image), -1)[:, :1]).square().mean()


class FilteringTrainer(Trainer):
    def __init__(self, loader, folder: Path) -> None:
        arguments = TrainingArguments(
            str(folder),
            max_steps=NUM_STEPS,
            save_steps=SAVED_AT,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=5,
            ignore_data_skip=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        self.loader, self.keys = loader, []
        super().__init__(Model(), arguments, callbacks=[SaveLoader(loader)])

    def get_train_dataloader(self):
        return self.loader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.keys.append(inputs["__key__"])
        return model(inputs["image"])


class SaveLoader(TrainerCallback):
    def __init__(self, loader) -> None:
        self.loader = loader

    def on_save(self, args, state, control, **kwargs):
        file = Path(args.output_dir, f"checkpoint-{state.global_step}", f"loader_{args.process_index}.json")
        file.write_text(json.dumps(self.loader.state_dict()))


def test_it_resumes_with_the_very_next_batch(half, tmp_path):
    recipe = half.but(end="repeat", batches_per_epoch=4, num_workers=1).but_dataset(shuffle=7)
    whole = FilteringTrainer(recipe.build(), tmp_path / "out")
    whole.train()
    assert len(whole.keys) == 2 * NUM_STEPS

    loader, checkpoint = recipe.build(), tmp_path / f"out/checkpoint-{SAVED_AT}"
    loader.load_state_dict([json.loads(file.read_text()) for file in checkpoint.glob("loader_*.json")])
    resumed = FilteringTrainer(loader, tmp_path / "out")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.keys == whole.keys[2 * SAVED_AT :]
