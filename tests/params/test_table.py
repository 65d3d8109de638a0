from params.models import model_of

from torchfuse import (
    describe,
)


def test_describe_adds_up():
    model = model_of()
    model.encoder.bfloat16()
    table = describe(model)
    assert table["total"].parameters == sum(p.numel() for p in model.parameters())
    assert table["total"].tensors == len(list(model.parameters()))
    assert table["fusion"].trainable == table["fusion"].parameters == table["total"].trainable
    assert table["decoder"].trainable == 0
    assert table["encoder"].dtype == "bfloat16"
    assert table["total"].dtype == "bfloat16, float32"
    printed = str(table)
    assert [line.split()[0] for line in printed.splitlines()[2:-2]] == ["decoder", "encoder", "fusion"]
    assert "(100.0 %)" in printed
    assert [row.part for row in table][-1] == "total"
