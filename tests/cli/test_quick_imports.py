import gc
import importlib

import pytest

from clipfilter_wds.cli.quick_imports import quick_imports


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


def test_garbage_is_looked_for_again_afterwards_but_not_among_modules(monkeypatch, tmp_path, unfrozen):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "clipfilter_module_of_tests.py").touch()
    before = gc.get_freeze_count()
    with quick_imports():
        assert not gc.isenabled()
        importlib.import_module("clipfilter_module_of_tests")
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


def test_nothing_changes_where_all_was_imported_before():
    before = gc.get_freeze_count()
    with pytest.raises(ImportError), quick_imports():
        importlib.import_module("module_that_does_not_exist")
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_who_has_turned_it_off_keeps_it_off():
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
