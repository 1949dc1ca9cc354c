"""On a GPU (`pytest -m gpu`): fused blocks and a whole step of FLUX.1-dev's transformer against the single layers."""

from dataclasses import replace

import pytest
import torch

from bitflux_core.benchmark.models import FLUX_DEV, TINY, random_transformer, step_inputs
from bitflux_core.fused import fuse
from bitflux_core.layers import block_linears

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


# Rounding to bfloat16 at other places, and int8 values that round the other way, add up over blocks.
@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("variant", "tolerance"), [("ternary", 0.03), ("ternary-int8", 0.06)])
@pytest.mark.parametrize("resolution", [1024, 336])
@pytest.mark.parametrize("blocks", ["one of each", "all"])
def test_transformer_against_the_reference(variant, tolerance, resolution, blocks):
    sizes = FLUX_DEV
    if blocks == "one of each":
        sizes = replace(FLUX_DEV, transformer={**FLUX_DEV.transformer, "num_layers": 1, "num_single_layers": 1})
    elif resolution != 1024:
        pytest.skip("the whole transformer is checked at one resolution")
    torch.manual_seed(len(variant) + resolution)
    model = random_transformer(variant, sizes, torch.device("cuda"))
    given = step_inputs(sizes, 1, resolution, torch.device("cuda"))
    for layer in block_linears(model).values():
        layer.execution = "reference"
    with torch.no_grad():
        expected = model(**given, return_dict=False)[0]
        y = fuse(model)(**given, return_dict=False)[0]
    assert y.isfinite().all()
    assert error(y, expected) < tolerance


@pytest.mark.gpu
@needs_gpu
def test_graphs_give_what_single_launches_give():
    torch.manual_seed(0)
    model = fuse(random_transformer("ternary-int8", TINY, torch.device("cuda")), graphs=True)
    expected, given = {}, {}
    with torch.no_grad():
        for batch, resolution in [(1, 64), (2, 64), (1, 128), (1, 48), (3, 64), (1, 80)]:  # more than are kept
            for number in range(2):
                given[batch, resolution, number] = step_inputs(TINY, batch, resolution, torch.device("cuda"))
        model.runs_graphs = False
        expected = {case: model(**inputs, return_dict=False)[0] for case, inputs in given.items()}
        model.runs_graphs = True
        for _ in range(3):
            found = {case: model(**inputs, return_dict=False)[0] for case, inputs in given.items()}
            assert all(torch.equal(found[case], expected[case]) for case in given)
        last = {key: value for key, value in given.items() if key[:2] == (1, 80)}
        for _ in range(3):  # captured, replayed, with other numbers, and after the weights have moved
            for case, inputs in last.items():
                assert torch.equal(model(**inputs, return_dict=False)[0], expected[case])
        assert sum(graph is not None for graph in model._graphs._graphs.values()) >= 1
        model.to("cpu").to("cuda")
        for _ in range(3):
            for case, inputs in last.items():
                assert torch.equal(model(**inputs, return_dict=False)[0], expected[case])


@pytest.mark.gpu
@needs_gpu
def test_compiled_blocks_and_an_outer_graph_give_the_same_step():
    torch.manual_seed(0)
    model = fuse(random_transformer("ternary-int8", TINY, torch.device("cuda")))
    given = step_inputs(TINY, 2, TINY.resolution, torch.device("cuda"))
    with torch.no_grad():
        expected = model(**given, return_dict=False)[0]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(**given, return_dict=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**given, return_dict=False)[0]
        graph.replay()
        assert torch.equal(captured, expected)
        model.compile_repeated_blocks(fullgraph=True)
        assert error(model(**given, return_dict=False)[0], expected) < 0.02
