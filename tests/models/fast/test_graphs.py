import copy
import gc
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter_wds.models.fast.buckets import ROW_COUNTS, row_count
from clipfilter_wds.models.fast.graphs import CudaGraphs, GraphedFunction
from tests.support.cuda import FakeCuda
from tests.support.graphs import CpuGraphs, NoGraphs


class Squares:
    """A function of rows that knows which shapes it is called with."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(rows.shape))
        return rows.float().square().flatten(1)


@pytest.mark.parametrize("graphs", [CpuGraphs, NoGraphs])
@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_every_row_comes_back_once_in_its_place_computed_in_a_few_shapes(graphs, sizes):
    squares = Squares()
    function = GraphedFunction(squares, graphs(), row_count)
    batches = list(torch.arange(3 * sum(sizes)).view(-1, 3).split(sizes))
    with torch.inference_mode():
        results = [function(batch) for batch in batches]  # all kept, while later ones are computed
    for batch, result in zip(batches, results, strict=True):
        assert torch.equal(result, batch.float().square())
    assert {num_rows for num_rows, _ in squares.shapes} == {row_count(size) for size in sizes}


def test_a_shape_is_captured_once_and_then_replayed():
    graphs = CpuGraphs()
    function = GraphedFunction(Squares(), graphs, row_count)
    for num_rows in (3, 8, 5, 9, 16):
        function(torch.ones(num_rows, 2))
    assert (graphs.num_captures, graphs.num_replays) == (2, 5)
    function(torch.ones(4, 3))
    function(torch.ones(4, 2, dtype=torch.uint8))
    assert graphs.num_captures == 4
    function.clear()
    function(torch.ones(4, 3))
    assert graphs.num_captures == 5


def test_smaller_batches_lie_in_the_memory_of_larger_ones():
    function = GraphedFunction(Squares(), CpuGraphs(), row_count)
    for num_rows in (30, 9, 3):
        rows = torch.randn(num_rows, 2)
        assert torch.equal(function(rows), rows.square())
    places = [place for place, _ in function._captured.values()]
    assert [len(place) for place in places] == [32, 16, 8]
    assert len({place.data_ptr() for place in places}) == 1


def test_rows_may_lie_in_memory_in_any_way():
    function = GraphedFunction(Squares(), CpuGraphs(), row_count)
    padded = torch.randint(0, 256, (5, 4, 6, 4), dtype=torch.uint8)
    rows = padded.permute(0, 3, 1, 2)[:, :3]
    for _ in range(2):
        assert torch.equal(function(rows), rows.float().square().flatten(1))


def test_rows_that_are_on_another_device_are_computed_there():
    graphs = CpuGraphs()
    graphs.device = torch.device("meta")
    function = GraphedFunction(Squares(), graphs, row_count)
    assert torch.equal(function(torch.full((5, 2), 3.0)), torch.full((5, 2), 9.0))
    assert graphs.num_captures == 0


def test_threads_take_turns():
    function = GraphedFunction(Squares(), CpuGraphs(), row_count)

    def run(number: int) -> bool:
        rows = torch.full((1 + number % 20, 2), float(number))
        return torch.equal(function(rows), rows.square())

    function(torch.ones(8, 2))
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(200)))


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_a_failed_capture_leaves_memory_and_random_numbers_as_they_were(cuda, caplog):
    graphs = CudaGraphs(torch.device("cpu", 0))

    def fails() -> torch.Tensor:
        if cuda.captured_to:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return torch.ones(1)

    assert graphs.capture(fails) is None
    assert not cuda.captured_to
    assert not cuda.holds_random
    assert len(caplog.records) == 1
    assert CudaGraphs(torch.device("cpu", 0)).capture(lambda: torch.ones(1)) is not None


def test_a_capture_begins_outside_of_inference_mode(cuda):
    """What torch makes for the first one, a capture in training writes to, too."""
    with torch.inference_mode():
        captured = CudaGraphs(torch.device("cpu", 0)).capture(lambda: torch.ones(1) + 1)
        assert torch.is_inference_mode_enabled()
    assert captured.output.is_inference()
    assert cuda.began_in_inference_mode == [False]


def test_no_garbage_is_collected_during_a_capture(cuda):
    """What frees page-locked memory in the thread that captures ends its capture."""
    is_collected = []

    def compute() -> torch.Tensor:
        if cuda.captured_to:
            is_collected.append(gc.isenabled())
        return torch.ones(1)

    CudaGraphs(torch.device("cpu", 0)).capture(compute)
    assert is_collected == [False]
    assert gc.isenabled()


def test_nothing_is_replayed_while_another_model_is_captured(cuda):
    """Until 2.11, random numbers are taken for the capture's, and a replay fails."""
    first, second = (CudaGraphs(torch.device("cpu", 0)) for _ in range(2))
    begun, may_end, is_replayed = (threading.Event() for _ in range(3))

    def compute() -> torch.Tensor:
        begun.set()
        may_end.wait(60)
        return torch.ones(1)

    def replay() -> None:
        with second.turn():
            is_replayed.set()

    threads = [threading.Thread(target=work) for work in (lambda: first.capture(compute), replay)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    assert not is_replayed.wait(0.2)
    may_end.set()
    assert is_replayed.wait(60)
    for thread in threads:
        thread.join()


def test_after_all_graphs_are_gone_others_can_be_captured(cuda, caplog):
    """A module that is moved forgets its graphs."""
    graphs = CudaGraphs(torch.device("cpu", 0))
    first, second = (graphs.capture(lambda: torch.ones(1)) for _ in range(2))
    assert cuda.num_pools == 1
    assert first.replay is not second.replay
    del first, second
    assert graphs.capture(lambda: torch.ones(1)) is not None
    assert not caplog.records


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_function_captures_anew(copied):
    function = GraphedFunction(torch.square, CpuGraphs(), row_count)
    rows = torch.arange(6.0).view(2, 3)
    function(rows)
    copy_ = copied(function)
    assert torch.equal(copy_(rows), rows.square())
    assert copy_._graphs.num_captures == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_graphs_has_memory_of_its_own(cuda, copied):
    graphs = CudaGraphs(torch.device("cpu", 0))
    captured = graphs.capture(lambda: torch.ones(1))
    copy_ = copied(graphs)
    assert copy_.device == graphs.device
    assert None not in (captured, copy_.capture(lambda: torch.ones(1)))
    assert cuda.num_pools == 2


@pytest.fixture
def weights():
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
class TestOnGpu:
    def test_a_replay_gives_what_launching_gives(self, weights):
        function = GraphedFunction(lambda rows: (rows @ weights).relu(), cuda_graphs(), row_count)
        for num_rows in (1, 8, 30, 7, 200, 30):
            rows = torch.randn(num_rows, 64, device="cuda")
            filled = torch.cat([rows, rows.new_zeros(row_count(num_rows) - num_rows, 64)])
            torch.testing.assert_close(function(rows), (filled @ weights).relu()[:num_rows], rtol=0, atol=1e-6)
        assert len(function._captured) == len({row_count(size) for size in (1, 8, 30, 7, 200)})

    def test_streams_and_threads_take_turns(self, weights):
        function = GraphedFunction(lambda rows: (rows @ weights).relu(), cuda_graphs(), row_count)
        for size in ROW_COUNTS[:6]:
            function(torch.zeros(size, 64, device="cuda"))
        num_captured = len(function._captured)

        def run(seed: int) -> bool:
            with torch.cuda.stream(torch.cuda.Stream()):
                generator = torch.Generator("cuda").manual_seed(seed)
                batches = [torch.randn(1 + seed % 190, 64, device="cuda", generator=generator) for _ in range(20)]
                results = [function(batch) for batch in batches]
                close = [
                    torch.allclose(result, (batch @ weights).relu(), atol=1e-4)
                    for batch, result in zip(batches, results, strict=True)
                ]
                return all(close)

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(run, range(40)))
        assert len(function._captured) == num_captured

    def test_nothing_is_captured_in_another_thread_which_may_run_beside_training(self, weights):
        function = GraphedFunction(lambda rows: rows @ weights, cuda_graphs(), row_count)
        results = []
        thread = threading.Thread(target=lambda: results.append(function(torch.ones(5, 64, device="cuda"))))
        thread.start()
        thread.join()
        torch.testing.assert_close(results[0], torch.ones(5, 64, device="cuda") @ weights)
        assert not function._captured

    def test_what_cannot_be_captured_is_launched_and_said_once(self, caplog):
        def waits(rows: torch.Tensor) -> torch.Tensor:
            return rows + float(rows.sum().item() * 0)

        function = GraphedFunction(waits, cuda_graphs(), row_count)
        stream = torch.cuda.current_stream()
        with caplog.at_level(logging.WARNING):
            for num_rows in (3, 3, 20):
                rows = torch.randn(num_rows, 4, device="cuda")
                assert torch.equal(function(rows), rows)
        assert len([record for record in caplog.records if "CUDA graphs" in record.message]) == 1
        assert torch.cuda.current_stream() == stream
        torch.nn.functional.dropout(torch.ones(9, device="cuda"), 0.5)  # torch's random numbers are not stuck

    def test_tf32_is_not_captured(self, weights):
        rows = torch.randn(32, 64, device="cuda")
        expected = (rows.double() @ weights.double()).float()
        torch.set_float32_matmul_precision("high")
        try:
            function = GraphedFunction(lambda rows: rows @ weights, cuda_graphs(), row_count)
            assert (function(rows) - expected).abs().max() < 1e-4 < (rows @ weights - expected).abs().max()
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision("highest")


def cuda_graphs() -> CudaGraphs:
    return CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
