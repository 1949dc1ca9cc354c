import pytest
import torch

from bitflux_core.accounting import resident_bytes, size_report
from bitflux_core.convert import quantize_transformer
from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.ternary import absmean, least_squares, snr_db


@pytest.mark.parametrize(("method", "quantize"), [("absmean", absmean), ("least_squares", least_squares)])
def test_every_block_linear_becomes_ternary_and_nothing_else_changes(transformer, method, quantize):
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    names = list(block_linears(transformer))
    report = quantize_transformer(transformer, method)

    assert [layer.name for layer in report] == names
    after = transformer.state_dict()
    for layer in report:
        ternary = quantize(before[f"{layer.name}.weight"])
        module = transformer.get_submodule(layer.name)
        assert isinstance(module, TernaryLinear)
        assert torch.equal(module.dequantize(), ternary.dequantize())
        assert layer.snr_db == pytest.approx(snr_db(before[f"{layer.name}.weight"], ternary))
    untouched = before.keys() - {f"{name}.weight" for name in names}
    assert after.keys() - untouched == {f"{name}.{part}" for name in names for part in ("packed", "scale")}
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_size_report_counts_dense_and_ternary_alike(transformer):
    dense = size_report(transformer)
    quantize_transformer(transformer)
    assert size_report(transformer) == dense
    assert resident_bytes(transformer.to(torch.bfloat16)) == size_report(transformer, "planes").storage_bytes


def test_weights_that_are_not_finite_are_named(transformer):
    transformer.single_transformer_blocks[0].proj_out.weight.data[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"single_transformer_blocks\.0\.proj_out\.weight .* not finite"):
        quantize_transformer(transformer)


def test_quantizing_twice_is_refused(transformer):
    quantize_transformer(transformer)
    with pytest.raises(UserError, match="ternary already"):
        quantize_transformer(transformer)
