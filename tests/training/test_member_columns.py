import json

import lightning as L
import pytest
import torch

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.datamodule import ClipFilterDataModule
from clipfilter_wds.training.member_columns import MemberColumns
from clipfilter_wds.types import Member, Sample
from tests.support.batches import write_scores
from tests.support.restore import NUMBERS, Recipe, image_number, numbered_pair, text_number
from tests.support.toys import write_shard

# --- columns of a sample ---


def sample(**members):
    files = tuple(Member(name=f"0.{extension}", extension=extension, data=data) for extension, data in members.items())
    return Sample(key="0", index=0, members=files)


def test_columns_are_lists_with_none_for_what_a_sample_lacks():
    columns = MemberColumns(columns=["json", "cls"])
    rows = [columns.row_of(each, "a.tar") for each in (sample(json=b"{}", cls=b"1"), sample(jpg=b"", cls=b"x"))]
    assert columns.collate(rows) == {"json": [{}, None], "cls": [1, None]}
    assert columns.collate([]) == {}


def test_a_transform_gets_the_decoded_members_and_its_columns_are_collated():
    seen = []
    columns = MemberColumns(transform=lambda each: seen.append(each) or {"weight": each["cls"] / 2})
    rows = [columns.row_of(sample(jpg=b"a", cls=number), "a.tar") for number in (b"1", b"3")]
    assert seen[0] == {"__key__": "0", "__url__": "a.tar", "jpg": b"a", "cls": 1}
    assert columns.collate(rows)["weight"].tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"columns": "json"}, r"give a list of extensions, such as \['json'\]"),
        ({"columns": ["text"]}, "a batch has a column 'text' anyway"),
        ({"columns": [".JSON"]}, "extensions are in lower case and begin with no dot"),
    ],
)
def test_columns_that_there_can_not_be_are_refused(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        MemberColumns(**options)


def test_a_transform_that_gives_what_it_may_not_is_an_error():
    with pytest.raises(ValueError, match="a batch has a column 'score' anyway"):
        MemberColumns(transform=lambda each: {"score": 1}).row_of(sample(cls=b"1"), "a.tar")
    columns = MemberColumns(transform=dict)
    with pytest.raises(ValueError, match=r"one sample the columns \['a'\] and another \['b'\]"):
        columns.collate([{"a": 1}, {"b": 1}])


# --- in a loader ---


def members_of(number):
    """A pair that says its number in other members too; every third has no cls."""
    members = {**numbered_pair(number), "json": json.dumps({"number": number}).encode(), "bin": b"%d" % number}
    return {**members, "cls": b"%d" % number} if number % 3 else members


@pytest.fixture(scope="module")
def recipe(clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    for shard, numbers in enumerate(NUMBERS):
        write_shard(folder / f"{shard}.tar", [members_of(number) for number in numbers], start=numbers[0])
    options = {"image_transform": image_number, "text_transform": text_number, "shuffle": 10, "seed": 1}
    loader = {"threshold": None, "batch_size": 5, "score_batch_size": 4}
    return Recipe(clip=clip_folder, shards=f"{folder}/*.tar", dataset=options, loader=loader)


def check_columns(batches, num_samples=None):
    """Every row's columns tell the number that its key tells."""
    keys = []
    for batch in batches:
        numbers = [int(key) for key in batch["__key__"]]
        assert batch["image"].tolist() == batch["text"].tolist() == numbers
        assert [record["number"] for record in batch["json"]] == [int(data) for data in batch["bin"]] == numbers
        assert batch["cls"] == [number if number % 3 else None for number in numbers]
        keys += batch["__key__"]
    assert len(keys) == (num_samples or len(set(keys)))
    return keys


COLUMNS = {"columns": ["json", "cls", "bin"]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_columns_stay_with_their_samples_through_workers_and_packing(recipe, num_workers):
    keys = check_columns(recipe.but_dataset(**COLUMNS).build(num_workers=num_workers), num_samples=48)
    assert keys == [key for batch in recipe.build(num_workers=num_workers) for key in batch["__key__"]]


def test_columns_may_be_given_by_an_iterator(recipe):
    check_columns(recipe.but_dataset(columns=iter(COLUMNS["columns"])).build(), num_samples=48)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_columns_stay_with_their_samples_when_a_loader_resumes_on_any_number_of_workers(recipe, num_workers):
    recipe = recipe.but_dataset(**COLUMNS)
    loader = recipe.build()
    batches = iter(loader)
    given = [next(batches) for _ in range(4)]
    state = loader.state_dict()
    batches.close()
    resumed = recipe.build(num_workers=num_workers)
    resumed.load_state_dict(state)
    check_columns([*given, *resumed], num_samples=48)


def test_columns_come_with_samples_whose_scores_are_known(recipe, tmp_path):
    recipe = recipe.but_dataset(**COLUMNS)
    loader = recipe.but(record=tmp_path / "record").build()
    check_columns(loader, num_samples=48)
    check_columns(loader, num_samples=48)
    check_columns(recipe.from_table(write_scores(recipe, tmp_path / "scores")).build(), num_samples=48)


class Seen(L.LightningModule):
    """Looks at one batch."""

    def training_step(self, batch, batch_idx):
        self.batch = batch

    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore")  # of Lightning's, about a module with nothing to train
def test_a_data_module_passes_columns_on(recipe):
    scorer, loader = ScorerConfig(model=str(recipe.clip), device="cpu"), LoaderConfig(threshold=None, batch_size=5)
    views = {"image_transform": image_number, "text_transform": text_number}
    data = ClipFilterDataModule(recipe.shards, scorer=scorer, loader=loader, shuffle=0, **views, **COLUMNS)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module = Seen()
    L.Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=1, **quiet).fit(module, data)
    check_columns([module.batch], num_samples=5)


def number_and_weight(members):
    assert members.keys() >= {"__key__", "__url__", "png", "txt", "json", "bin"}
    return {"number": members["json"]["number"], "weight": torch.tensor([1.0, members["json"]["number"]])}


def test_a_transform_of_samples_makes_tensors_in_workers(recipe):
    for batch in recipe.but_dataset(sample_transform=number_and_weight).build(num_workers=1):
        assert batch["number"].tolist() == batch["image"].tolist() == batch["weight"][:, 1].tolist()
        assert not {"json", "cls"} & batch.keys()
