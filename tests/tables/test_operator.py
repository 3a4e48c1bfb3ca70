"""The operator gives what the plain loop gives, on any table."""

import numpy as np
import pandas as pd
import pytest

from clipfilter_wds.tables.file_storage import FileStorage
from tests.support.dataflow import Memory, run_operator


class TestTheSameAsTheRowLoop:
    def test_scores(self, operator, row_loop, table):
        expected = [row_loop.similarity(row.image, row.caption) for row in table.itertuples()]
        found = [operator.compute_similarity(row.image, row.caption) for row in table.itertuples()]
        assert np.abs(np.subtract(found, expected)).max() < 1e-5
        assert len(set(found)) > 20

    @pytest.mark.parametrize("quantile", [0.3, 0.7, 0.95])
    def test_rows_order_index_and_columns(self, operator, row_loop, table, quantile):
        scores = [row_loop.similarity(row.image, row.caption) for row in table.itertuples()]
        threshold = float(np.quantile([score for score in scores if score > 0], quantile)) + 1e-4
        returned, kept = run_operator(operator, table, threshold=threshold)
        assert returned == ["image", "caption"]
        assert 0 < len(kept) < len(table)
        pd.testing.assert_frame_equal(kept, row_loop.run(table, threshold))

    def test_zero_keeps_what_could_not_be_scored(self, operator, table):
        _, kept = run_operator(operator, table, threshold=0.0)
        pd.testing.assert_frame_equal(kept, table)

    def test_defaults(self, operator, row_loop, table):
        _, kept = run_operator(operator, table)
        pd.testing.assert_frame_equal(kept, row_loop.run(table, 0.25))

    def test_is_consistent(self, operator, row_loop, table):
        image, caption = table.image[0], table.caption[0]
        score = row_loop.similarity(image, caption)
        assert operator.is_consistent(image, caption, score - 1e-4)
        assert not operator.is_consistent(image, caption, score + 1e-4)

    def test_the_description_is_chinese_or_english(self, operator):
        assert "CLIP" in operator.get_desc("en")
        assert "图" in operator.get_desc("zh") == operator.get_desc()


class TestTables:
    def test_an_empty_table_keeps_its_columns_and_types(self, operator, table):
        _, kept = run_operator(operator, table.iloc[:0])
        pd.testing.assert_frame_equal(kept, table.iloc[:0].reset_index(drop=True))

    def test_a_table_of_nothing_is_written_as_it_is(self, operator):
        _, kept = run_operator(operator, pd.DataFrame())
        assert kept.empty

    def test_when_nothing_is_kept_the_columns_are(self, operator, table):
        _, kept = run_operator(operator, table, threshold=1.0)
        assert not len(kept)
        assert list(kept.columns) == list(table.columns)
        assert list(kept.dtypes) == list(table.dtypes)

    @pytest.mark.parametrize("names", [("image path", "the caption"), ("class", "def"), ("_1", "a-b"), (0, 1)])
    def test_column_names_need_not_be_identifiers(self, operator, table, names):
        renamed = table.rename(columns={"image": names[0], "caption": names[1]})
        returned, kept = run_operator(
            operator, renamed, input_image_key=names[0], input_caption_key=names[1], threshold=0.01
        )
        assert returned == list(names)
        expected = run_operator(operator, table, threshold=0.01)[1]
        pd.testing.assert_frame_equal(kept, expected.rename(columns={"image": names[0], "caption": names[1]}))

    def test_duplicate_indexes_do_not_matter(self, operator, table):
        expected = run_operator(operator, table, threshold=0.01)[1]
        assert 0 < len(expected) < len(table)
        pd.testing.assert_frame_equal(
            run_operator(operator, table.set_axis([3] * len(table)), threshold=0.01)[1], expected
        )

    def test_a_missing_column_is_an_error_that_names_the_columns(self, operator, table):
        with pytest.raises(ValueError, match=r"input_caption_key is 'text', but .* 'image', 'caption', 'n', 'nested'"):
            operator.run(Memory(table), input_caption_key="text")
        with pytest.raises(ValueError, match="input_image_key is 'img'"):
            operator.run(Memory(table.iloc[:0]), input_image_key="img")

    def test_a_threshold_that_is_no_cosine_is_refused(self, operator, table):
        with pytest.raises(ValueError, match=r"Did you mean 0.25\?"):
            operator.run(Memory(table), threshold=25)
        with pytest.raises(ValueError, match=r"Did you mean 0.25\?"):
            operator.is_consistent(table.image[0], "a", threshold=25)
        for threshold in ("0.25", None):
            with pytest.raises(TypeError, match=f"threshold is {threshold!r}; it must be a number"):
                operator.run(Memory(table), threshold=threshold)

    def test_the_table_that_was_read_is_left_alone(self, operator, table):
        before = table.copy(deep=True)
        run_operator(operator, table, threshold=0.01)
        pd.testing.assert_frame_equal(table, before)

    def test_steps_of_a_file_storage_follow_one_another(self, operator, table, tmp_path):
        table.to_parquet(tmp_path / "in.parquet")
        storage = FileStorage(str(tmp_path / "in.parquet"), cache_path=str(tmp_path / "cache"), cache_type="jsonl")
        operator.run(storage.step(), threshold=0.01)
        operator.run(storage.step(), threshold=0.02)
        first, second = (pd.read_json(tmp_path / "cache" / f"dataflow_cache_step{n}.jsonl", lines=True) for n in (1, 2))
        assert len(table) > len(first) > len(second) > 0
        assert list(second.columns) == list(table.columns)
